//! KubeVirt's VirtualMachineInstance (kubevirt.io/v1), as far as it is read
//! here. Pure. Every field may be missing: KubeVirt fills them in over time.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kube::ResourceExt as _;
use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::Value;

/// What to watch.
#[must_use]
pub fn api_resource() -> ApiResource {
    let kind = GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachineInstance");
    ApiResource::from_gvk_with_plural(&kind, "virtualmachineinstances")
}

/// A VM as KubeVirt reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vmi {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub labels: BTreeMap<String, String>,
    pub deleting: bool,
    /// The SMBIOS system UUID that the guest's kernel shows.
    pub firmware_uuid: Option<String>,
    pub phase: String,
    pub node: Option<String>,
    /// Pod UID to node name; two while migrating.
    pub active_pods: BTreeMap<String, String>,
    /// A live migration has begun and has neither ended nor failed.
    pub migrating: bool,
    /// Addresses that the guest agent or KubeVirt saw.
    pub addresses: Vec<IpAddr>,
    /// Some interface is masqueraded: the guest's own address is not KubeVirt's.
    pub masqueraded: bool,
}

/// Drops what is never read, so that the cache of a big cluster stays small.
pub fn strip(object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
    object.metadata.annotations = None;
    let keep = |value: &mut Value, pointer: &str, keys: &[&str]| {
        if let Some(Value::Object(map)) = value.pointer_mut(pointer) {
            map.retain(|key, _| keys.contains(&key.as_str()));
        }
    };
    let data = &mut object.data;
    keep(data, "", &["spec", "status"]);
    keep(data, "/spec", &["domain"]);
    keep(data, "/spec/domain", &["firmware", "devices"]);
    keep(data, "/spec/domain/devices", &["interfaces"]);
    keep(
        data,
        "/status",
        &[
            "phase",
            "nodeName",
            "activePods",
            "migrationState",
            "interfaces",
        ],
    );
}

/// The firmware UUID alone, without the cost of [`Vmi::read`].
#[must_use]
pub fn firmware_uuid(object: &DynamicObject) -> Option<&str> {
    object.data.pointer("/spec/domain/firmware/uuid")?.as_str()
}

impl Vmi {
    /// Reads what is there.
    #[must_use]
    pub fn read(object: &DynamicObject) -> Self {
        let text = |pointer: &str| {
            let found = object.data.pointer(pointer).and_then(Value::as_str);
            found.filter(|s| !s.is_empty()).map(str::to_owned)
        };
        let list = |pointer: &str| {
            let found = object.data.pointer(pointer).and_then(Value::as_array);
            found.map_or(&[][..], Vec::as_slice)
        };
        let flag = |pointer: &str| object.data.pointer(pointer) == Some(&Value::Bool(true));
        let pods = object
            .data
            .pointer("/status/activePods")
            .and_then(Value::as_object);
        Self {
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
            labels: object.labels().clone(),
            deleting: object.metadata.deletion_timestamp.is_some(),
            firmware_uuid: firmware_uuid(object).map(str::to_owned),
            phase: text("/status/phase").unwrap_or_default(),
            node: text("/status/nodeName"),
            active_pods: pods
                .into_iter()
                .flatten()
                .filter_map(|(uid, node)| Some((uid.clone(), node.as_str()?.to_owned())))
                .collect(),
            migrating: object
                .data
                .pointer("/status/migrationState")
                .is_some_and(Value::is_object)
                && !flag("/status/migrationState/completed")
                && !flag("/status/migrationState/failed"),
            addresses: list("/status/interfaces")
                .iter()
                .flat_map(addresses)
                .collect(),
            masqueraded: list("/spec/domain/devices/interfaces")
                .iter()
                .any(|i| i.get("masquerade").is_some_and(Value::is_object)),
        }
    }
}

/// `ipAddress` and `ipAddresses` of one interface; KubeVirt may append a prefix length.
fn addresses(interface: &Value) -> Vec<IpAddr> {
    let one = interface.get("ipAddress").into_iter();
    let all = interface.get("ipAddresses").and_then(Value::as_array);
    one.chain(all.into_iter().flatten())
        .filter_map(Value::as_str)
        .filter_map(|text| text.split('/').next()?.parse().ok())
        .collect()
}

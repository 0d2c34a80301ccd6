//! The host controller's plan for one claim, over objects as an API server gives them: a tenant
//! writes the claim, and an older schema may have let through what today's would not.

use common::api::{
    Admitted, DEFAULT_CLASS_ANNOTATION, GuestCluster, HOST_FINALIZER, VFClaim, VFClass,
};
use common::kube::finalizer;
use host_provisioner::controller::plan::{Known, Plan, plan};
use host_provisioner::controller::vmi::{Vmi, strip};
use host_provisioner::kernel::MacAddr;
use kube::ResourceExt as _;
use kube::api::DynamicObject;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// An input. Objects that cannot be read are not there, as in a watch.
#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct World {
    claim: Value,
    clusters: Vec<Value>,
    classes: Vec<Value>,
    vmis: Vec<Value>,
    others: u8,
}

fn read<T: DeserializeOwned>(values: Vec<Value>) -> Vec<T> {
    let read = values.into_iter().map(serde_json::from_value);
    read.filter_map(Result::ok).collect()
}

pub fn run(data: &[u8]) {
    let Ok(world) = serde_json::from_slice::<World>(data) else {
        return;
    };
    let Ok(claim) = serde_json::from_value::<VFClaim>(world.claim) else {
        return;
    };
    let clusters: Vec<GuestCluster> = read(world.clusters);
    let classes: Vec<VFClass> = read(world.classes);
    let vmis: Vec<DynamicObject> = read(world.vmis);
    let vmis: Vec<Vmi> = vmis
        .into_iter()
        .map(|object| {
            let whole = Vmi::read(&object);
            let mut stripped = object;
            strip(&mut stripped);
            assert_eq!(
                Vmi::read(&stripped),
                whole,
                "what is cached is all that is read"
            );
            whole
        })
        .collect();
    let known = Known {
        clusters: &clusters.iter().collect::<Vec<_>>(),
        classes: &classes.iter().collect::<Vec<_>>(),
        vmis: &vmis,
        admitted_others: world.others.into(),
        pf: None,
    };
    let due = plan(&claim, &known);
    if claim.metadata.deletion_timestamp.is_some() {
        return going(&claim, &due);
    }
    assert!(!due.release, "a claim that is wanted is released");
    let Some(patch) = &due.decision else { return };
    let fields: Vec<&String> = patch.as_object().expect("a patch").keys().collect();
    for field in &fields {
        let own = ["admitted", "vm", "hostNode", "launcher"].contains(&field.as_str());
        assert!(own, "{field} is not the controller's");
    }
    assert!(
        due.finalizer || finalizer::has(&claim, HOST_FINALIZER),
        "granted without a finalizer"
    );
    let after = patched(&claim, patch);
    decided(&claim, &after, &known);
    let again = plan(&after, &known);
    assert_eq!(again.decision, None, "planned again, it decides anew");
}

/// A release gives the VF back first.
fn going(claim: &VFClaim, due: &Plan) {
    let status = claim.status.clone().unwrap_or_default();
    let back = status.device.is_none() && status.attachment.is_none();
    assert!(!due.release || back, "released while its VF is in use");
    let only = Plan {
        release: due.release,
        ..Plan::default()
    };
    assert_eq!(*due, only, "a claim that goes is granted nothing");
}

fn patched(claim: &VFClaim, patch: &Value) -> VFClaim {
    let mut after = claim.clone();
    let mut status = serde_json::to_value(claim.status.clone().unwrap_or_default()).expect("JSON");
    merge(&mut status, patch);
    after.status = Some(serde_json::from_value(status).expect("a status"));
    after
}

/// RFC 7386, as the API server does it.
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = Value::Object(Default::default());
    }
    let Value::Object(map) = into else { return };
    for (key, change) in changes {
        if change.is_null() {
            map.remove(key);
        } else {
            merge(map.entry(key.clone()).or_insert(Value::Null), change);
        }
    }
}

fn decided(claim: &VFClaim, after: &VFClaim, known: &Known<'_>) {
    let before = claim.status.clone().unwrap_or_default();
    let now = after.status.clone().unwrap_or_default();
    if before.device.is_some() || before.attachment.is_some() {
        assert_eq!(
            now.host_node, before.host_node,
            "a VF in use is left behind"
        );
    }
    let guest = claim.spec.guest.as_ref().expect("a grant is a guest's");
    let mut own = known
        .clusters
        .iter()
        .filter(|c| c.name_any() == guest.cluster);
    let cluster = own.next().expect("a grant is of a cluster that is known");
    assert_eq!(
        claim.namespace(),
        Some(cluster.spec.claim_namespace.clone())
    );
    if now.vm != before.vm
        && let Some(vm) = &now.vm
    {
        assert_eq!(
            vm.namespace, cluster.spec.vm_namespace,
            "another tenant's VM"
        );
        let named = known
            .vmis
            .iter()
            .find(|v| v.uid == vm.uid && v.name == vm.name);
        let uuid = named.and_then(|v| v.firmware_uuid.as_deref());
        assert!(uuid.is_some_and(|u| u.eq_ignore_ascii_case(&guest.system_uuid)));
    }
    let Some(granted) = now
        .admitted
        .as_ref()
        .filter(|a| before.admitted.as_ref() != Some(a))
    else {
        return;
    };
    match &before.admitted {
        None => first(claim, granted, cluster, known),
        Some(old) => assert_eq!(
            Admitted {
                observed_generation: old.observed_generation,
                network: old.network.clone(),
                ..granted.clone()
            },
            *old,
            "an edit does not change the class"
        ),
    }
    let asked = claim.spec.network.clone().unwrap_or_default();
    assert!(
        granted.network.is_some() != granted.storage.is_some(),
        "a grant is of one kind"
    );
    let Some(network) = &granted.network else {
        assert_eq!(claim.spec.network, None, "network settings of storage");
        return;
    };
    if asked.mac_address.is_some() {
        let mac: MacAddr = network
            .mac_address
            .parse()
            .expect("a MAC address is granted");
        assert!(!mac.is_zero() && !mac.is_multicast(), "{mac}");
    }
    if asked.vlan.is_some() {
        let vlan = network.vlan.as_ref().expect("a VLAN was asked for");
        let qos = vlan.qos.unwrap_or(0);
        assert!(
            (1..=4094).contains(&vlan.id) && qos <= 7,
            "{vlan:?} cannot be configured"
        );
    }
}

fn first(claim: &VFClaim, granted: &Admitted, cluster: &GuestCluster, known: &Known<'_>) {
    assert!(!cluster.spec.cordoned, "admitted while cordoned");
    let quota = cluster.spec.quota.claims;
    assert!(quota.is_none_or(|most| known.admitted_others < most as usize));
    assert!(cluster.spec.classes.contains(&granted.class_name));
    match &claim.spec.class_name {
        Some(name) => assert_eq!(granted.class_name, *name),
        None => assert!(known.classes.iter().any(|class| {
            class.name_any() == granted.class_name
                && class
                    .annotations()
                    .get(DEFAULT_CLASS_ANNOTATION)
                    .map(String::as_str)
                    == Some("true")
        })),
    }
}

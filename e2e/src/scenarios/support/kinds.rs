//! Other objects of scenarios: PhysicalFunctions, extra classes, forged nodes and VMs. All
//! that is made here carries the mark by which it is removed.

use std::time::Duration;

use anyhow::{Context, Result};
use common::api::{HostDriver, PhysicalFunction, VFClass};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::lab::{Lab, MARK};
use crate::deploy::apply::{self, MANAGER};
use crate::deploy::names::{CLASS, DEFAULT_CLASS, GUEST_CLUSTER, SYSTEM, TENANT_NAMESPACE};
use crate::wait::{self, Probe};

/// The name of the object for the PF at `address`; waits for the agent's first report.
pub async fn physical_function(host: &Client, address: &str) -> Result<String> {
    let api: Api<PhysicalFunction> = Api::all(host.clone());
    let limit = Duration::from_secs(60);
    let what = format!("a PhysicalFunction of {address}");
    wait::until(&what, limit, Duration::from_millis(500), || async {
        let all = api.list(&ListParams::default()).await?.items;
        let at = |p: &PhysicalFunction| p.status.as_ref().and_then(|s| s.pci_address.clone());
        let found = all.iter().find(|p| at(p).as_deref() == Some(address));
        Ok(match found.and_then(|p| p.metadata.name.clone()) {
            Some(name) => Probe::Ready(name),
            None => Probe::NotYet(format!("{:?}", all.iter().map(at).collect::<Vec<_>>())),
        })
    })
    .await
}

/// Namespace of a tenant that has nothing to do with the guest.
const OTHER: &str = "e2e-other-tenant";

/// The VMs of a namespace of the host.
pub fn vms(host: &Client, namespace: &str) -> Api<DynamicObject> {
    let (kind, plural) = ("VirtualMachineInstance", "virtualmachineinstances");
    apply::api(host, "kubevirt.io/v1", kind, plural, Some(namespace))
}

/// Claims without the types, so that what the types could not hold can be sent.
pub(super) fn claims_untyped(guest: &Client) -> Api<DynamicObject> {
    let version = "sriov.harvesterhci.io/v1alpha1";
    apply::api(
        guest,
        version,
        "VFClaim",
        "vfclaims",
        Some(TENANT_NAMESPACE),
    )
}

impl Lab<'_> {
    /// A class of the harness's own, allowed to the guest, with this PF selector.
    pub async fn class(&self, name: &str, selector: Value) -> Result<()> {
        self.class_for_others(name, selector).await?;
        self.allow(&[CLASS, DEFAULT_CLASS, name]).await
    }

    /// A class of the harness's own over all managed PFs with this reclaim policy.
    pub async fn class_reclaiming(&self, name: &str, policy: &str) -> Result<()> {
        self.class_with(name, json!({"reclaimPolicy": policy}))
            .await?;
        self.allow(&[CLASS, DEFAULT_CLASS, name]).await
    }

    /// A class of the harness's own over all managed PFs with this placement, made if there is
    /// none; the guest may use it.
    pub async fn class_placing(&self, name: &str, placement: &str) -> Result<()> {
        let api: Api<VFClass> = Api::all(self.host.clone());
        if api.get_opt(name).await?.is_none() {
            self.class_with(name, json!({"placement": placement}))
                .await?;
        }
        self.allow(&[CLASS, DEFAULT_CLASS, name]).await
    }

    /// A class of the harness's own that hands out these namespaces of NVMe PFs.
    pub async fn class_of_namespaces(&self, name: &str, namespaces: &[u32]) -> Result<()> {
        let spec = json!({
            "pfSelector": {"drivers": ["nvme"]},
            "storage": {"namespaces": namespaces},
        });
        self.class_with(name, spec).await?;
        self.allow(&[CLASS, DEFAULT_CLASS, name]).await
    }

    /// A class of the harness's own that the guest may not use.
    pub async fn class_for_others(&self, name: &str, selector: Value) -> Result<()> {
        self.class_with(name, json!({"pfSelector": selector})).await
    }

    async fn class_with(&self, name: &str, spec: Value) -> Result<()> {
        let api: Api<VFClass> = Api::all(self.host.clone());
        let class: VFClass = serde_json::from_value(json!({
            "apiVersion": "sriov.harvesterhci.io/v1alpha1",
            "kind": "VFClass",
            "metadata": {"name": name, "labels": {MARK: "yes"}},
            "spec": spec,
        }))?;
        api.create(&PostParams::default(), &class)
            .await
            .context("making a class")?;
        Ok(())
    }

    /// The classes that the guest may use.
    async fn allow(&self, classes: &[&str]) -> Result<()> {
        let api: Api<common::api::GuestCluster> = Api::all(self.host.clone());
        let patch = Patch::Merge(json!({"spec": {"classes": classes}}));
        let as_us = PatchParams {
            field_manager: Some(MANAGER.into()),
            ..PatchParams::default()
        };
        api.patch(GUEST_CLUSTER, &as_us, &patch)
            .await
            .context("allowing classes")?;
        Ok(())
    }

    /// A node of the guest cluster that no kubelet has registered: a guest's administrator can
    /// write whatever it likes into its own cluster.
    pub async fn node_without_kubelet(
        &self,
        name: &str,
        system_uuid: &str,
        ip: &str,
    ) -> Result<()> {
        let api: Api<Node> = Api::all(self.guest.clone());
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {MARK: "yes"}},
            "spec": {"unschedulable": true},
        }))?;
        api.create(&PostParams::default(), &node)
            .await
            .with_context(|| format!("making node {name}"))?;
        let empty = "";
        let status = json!({"status": {
            "addresses": [{"type": "InternalIP", "address": ip}],
            "nodeInfo": {
                "systemUUID": system_uuid,
                "machineID": empty, "bootID": empty, "kernelVersion": empty, "osImage": empty,
                "containerRuntimeVersion": empty, "kubeletVersion": empty,
                "kubeProxyVersion": empty, "operatingSystem": "linux", "architecture": "amd64",
            },
        }});
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
            .await
            .with_context(|| format!("making the status of node {name}"))?;
        Ok(())
    }

    /// A VM that belongs to somebody else: in a namespace that no GuestCluster names.
    pub async fn other_tenants_vm(&self, name: &str, uuid: &str) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.host.clone());
        let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": OTHER}}))?;
        match namespaces.create(&PostParams::default(), &namespace).await {
            Err(kube::Error::Api(s)) if s.code == 409 => {}
            other => drop(other.context("making another tenant's namespace")?),
        }
        let vm: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachineInstance",
            "metadata": {"name": name, "labels": {MARK: "yes"}},
            "spec": {"domain": {"firmware": {"uuid": uuid}, "devices": {}}},
        }))?;
        let api = vms(&self.host, OTHER);
        api.create(&PostParams::default(), &vm)
            .await
            .context("making another tenant's VM")?;
        Ok(())
    }

    /// The systemUUID and InternalIP that a node of the guest reports.
    pub async fn node_identity(&self, name: &str) -> Result<(String, String)> {
        let api: Api<Node> = Api::all(self.guest.clone());
        let status = api
            .get(name)
            .await?
            .status
            .context("the node has no status")?;
        let uuid = status
            .node_info
            .context("the node has no nodeInfo")?
            .system_uuid;
        let addresses = status.addresses.unwrap_or_default();
        let ip = addresses.into_iter().find(|a| a.type_ == "InternalIP");
        Ok((uuid, ip.context("the node has no InternalIP")?.address))
    }
}

/// Removes every marked object but claims.
pub(super) async fn remove_all(lab: &Lab<'_>) -> Result<()> {
    lab.allow(&[CLASS, DEFAULT_CLASS]).await?;
    let marked = ListParams::default().labels(MARK);
    let now = DeleteParams::default();
    Api::<VFClass>::all(lab.host.clone())
        .delete_collection(&now, &marked)
        .await?;
    vms(&lab.host, OTHER)
        .delete_collection(&now, &marked)
        .await?;
    Api::<HostDriver>::all(lab.host.clone())
        .delete_collection(&now, &marked)
        .await?;
    Api::<Node>::all(lab.guest.clone())
        .delete_collection(&now, &marked)
        .await?;
    Api::<Pod>::namespaced(lab.host.clone(), SYSTEM)
        .delete_collection(&DeleteParams::default().grace_period(0), &marked)
        .await?;
    Ok(())
}

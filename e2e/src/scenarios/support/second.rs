//! A second VM and a second PF, for the scenarios in which one of each is not enough. Tidying
//! up takes them away.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;

use super::far::sh;
use super::lab::Lab;
use super::{l1, site};
use crate::deploy::names::VM_NAMESPACE;
use crate::machine::{L2, Vm};

/// The second VM.
pub struct Second {
    pub l2: L2,
    pub qemu: l1::Qemu,
}

impl Lab<'_> {
    /// Starts the second VM and has the second PF managed. The VM runs no kubelet: its node is
    /// registered here, with the identity that its own kernel gives.
    pub async fn second(&self) -> Result<Second> {
        self.manage(&self.second, true).await?;
        let vm = Vm::second();
        let l2 = self.machine.start_vm(&vm).await?;
        let uuid = sh(&l2, "cat /sys/class/dmi/id/product_uuid").await?;
        let here = format!("ip -4 -o address show to {}", vm.address());
        let shown = sh(&l2, &here).await?;
        ensure!(shown.contains(&vm.address()), "{here}: {shown:?}");
        self.node_without_kubelet(&vm.name, &uuid, &vm.address())
            .await?;
        let qemu = l1::Qemu::of(&l2, site::SECOND_DOMAIN);
        Ok(Second { l2, qemu })
    }
}

/// Ends the second VM, if there is one. Its claims must be gone.
pub(super) async fn remove(lab: &Lab<'_>) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(lab.host.clone(), VM_NAMESPACE);
    let name = Vm::second().name;
    let of = ListParams::default().labels(&format!("vm.kubevirt.io/name={name}"));
    if pods.list(&of).await?.items.is_empty() {
        return Ok(());
    }
    lab.machine.stop_vm(&name).await
}

//! A second VM and a second PF, for the scenarios in which one of each is not enough. Tidying
//! up takes them away.

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;

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
    /// Starts the second VM, which joins the guest's cluster, and has the second PF managed.
    pub async fn second(&self) -> Result<Second> {
        self.manage(&self.second, true).await?;
        let l2 = self.machine.start_vm(&Vm::second()).await?;
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

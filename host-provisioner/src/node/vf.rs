//! What the agent does to a VF on its host: look, create, prepare, clean. Runs
//! the blocking kernel calls on threads made for it; decides nothing beyond
//! "is this VF proven free".

use std::sync::Arc;

use common::api::DeviceStatus;
use common::pci::PciAddress;
use thiserror::Error;

use super::hold::Drift;
use super::plan::{Vf, VfSeen};
use super::pool::GrantError;
use crate::driver::{DriverError, NamespaceUser, VfDriver, driver_for, settled};
use crate::kernel::{
    GroupHold, HoldError, Kernel, KernelError, PfFacts, VFIO_PCI, VfConfig, VfFacts,
};
use crate::points::{Point, reach};

/// What can go wrong with a VF on the host.
#[derive(Debug, Error)]
pub enum VfError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Hold(#[from] HoldError),
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("the grant cannot be read: {0}")]
    Grant(#[from] GrantError),
    #[error("{0} is not a physical function of this node; it may have been removed or renamed")]
    UnknownPf(String),
    #[error("the driver of {pf} ({driver}) is not supported yet; use a PF of another driver")]
    NoDriver { pf: PciAddress, driver: String },
    #[error("{pf} has no VF {index}")]
    NoVf { pf: PciAddress, index: u16 },
    #[error("VF {0} has no IOMMU group: is the IOMMU on (intel_iommu=on or amd_iommu=on)?")]
    NoGroup(PciAddress),
    #[error("VF {0} shares its IOMMU group with {1}, which is not a free VF of the same PF")]
    NotIsolated(PciAddress, PciAddress),
    #[error("the kernel thread ended unexpectedly: {0}")]
    Thread(String),
}

/// Runs a blocking piece of kernel work off the async threads.
pub async fn blocking<T, F>(kernel: &Arc<dyn Kernel>, work: F) -> Result<T, VfError>
where
    T: Send + 'static,
    F: FnOnce(&dyn Kernel) -> Result<T, VfError> + Send + 'static,
{
    let kernel = Arc::clone(kernel);
    tokio::task::spawn_blocking(move || work(kernel.as_ref()))
        .await
        .map_err(|e| VfError::Thread(e.to_string()))?
}

/// `None` for a write that has not come back: the next look says so, in the claim's terms.
pub fn unless_stuck<T>(done: Result<T, VfError>) -> Result<Option<T>, VfError> {
    match done {
        Err(
            VfError::Kernel(error @ KernelError::Stuck { .. })
            | VfError::Driver(DriverError::Kernel(error @ KernelError::Stuck { .. })),
        ) => {
            tracing::error!(%error, "left to the helper");
            Ok(None)
        }
        done => done.map(Some),
    }
}

/// The VF of that index, if the PF has it.
pub fn find(kernel: &dyn Kernel, pf: &PfFacts, index: u16) -> Result<Option<VfFacts>, VfError> {
    Ok(kernel
        .virtual_functions(pf.address)?
        .into_iter()
        .find(|vf| vf.index == index))
}

/// The VF's settings. One that there is and of which the kernel says nothing is being reset, by
/// its guest or for a change of ours; that is waited for.
pub fn settings(kernel: &dyn Kernel, pf: &PfFacts, index: u16) -> Result<VfConfig, VfError> {
    let read = || match driver_for(pf) {
        Some(driver) => driver.settings(kernel, pf, index),
        None => kernel.vf_config(pf, index),
    };
    match read() {
        Err(KernelError::NoSuchVf { .. }) if find(kernel, pf, index)?.is_some() => {
            Ok(settled(read)?)
        }
        said => Ok(said?),
    }
}

/// The VF's state, proven by opening its group when it is on vfio-pci.
pub fn look(
    kernel: &dyn Kernel,
    pf: &PfFacts,
    index: u16,
    want: &VfConfig,
) -> Result<VfSeen, VfError> {
    let unread = |vf: Vf| VfSeen {
        clean: vf == Vf::Absent,
        configured: false,
        vf,
    };
    let stuck = kernel.stuck()?;
    let words = |function: PciAddress| {
        let stuck = *stuck.get(&function)?;
        Some(KernelError::Stuck { function, stuck }.to_string())
    };
    if let Some(words) = words(pf.address) {
        return Ok(unread(Vf::Stuck(words)));
    }
    let Some(vf) = find(kernel, pf, index)? else {
        return Ok(unread(Vf::Absent));
    };
    if let Some(words) = words(vf.address) {
        return Ok(unread(Vf::Stuck(words)));
    }
    let state = match vf.driver.as_deref() {
        None if held_while_taken(kernel, &vf)?.is_some() => Vf::VfioHeld,
        None => Vf::Driverless,
        Some(VFIO_PCI) => {
            let group = vf.iommu_group.ok_or(VfError::NoGroup(vf.address))?;
            match kernel.probe_group(group) {
                Ok(()) => Vf::VfioFree,
                Err(HoldError::Busy { .. }) => Vf::VfioHeld,
                Err(other) => return Err(other.into()),
            }
        }
        Some(other) => Vf::OtherDriver(other.to_owned()),
    };
    let config = settings(kernel, pf, index)?;
    let unheld = driver(pf)?.capabilities(pf).clean(vf.address);
    let clean = state == Vf::Driverless && config == unheld;
    Ok(VfSeen {
        configured: config == *want,
        clean,
        vf: state,
    })
}

/// The group of a VF without a driver that is used all the same. The kernel shows it without one from
/// the moment in which it is taken from vfio-pci, and then waits for its user
/// (drivers/base/dd.c, `__device_release_driver`); its group keeps its node until then.
fn held_while_taken(kernel: &dyn Kernel, vf: &VfFacts) -> Result<Option<u32>, VfError> {
    let Some(group) = vf.iommu_group.filter(|_| vf.group_members.len() == 1) else {
        // With others in the group, it may be theirs that is open.
        return Ok(None);
    };
    match kernel.probe_group(group) {
        Ok(()) | Err(HoldError::NoDevice { .. }) => Ok(None),
        Err(HoldError::Busy { .. }) => Ok(Some(group)),
        Err(HoldError::Kernel(error)) => Err(error.into()),
    }
}

/// Opens the VF's group, which proves that nobody has it; `None` when the VF is
/// driverless, which is free as well.
fn prove_free(kernel: &dyn Kernel, vf: &VfFacts) -> Result<Option<GroupHold>, VfError> {
    match vf.driver.as_deref() {
        None => match held_while_taken(kernel, vf)? {
            Some(group) => Err(HoldError::Busy { group }.into()),
            None => Ok(None),
        },
        Some(VFIO_PCI) => {
            let group = vf.iommu_group.ok_or(VfError::NoGroup(vf.address))?;
            Ok(Some(kernel.hold_group(group)?))
        }
        Some(_) => Err(KernelError::WrongDriver {
            vf: vf.address,
            found: vf.driver.clone(),
            wanted: Some(VFIO_PCI.to_owned()),
        }
        .into()),
    }
}

/// Refuses a VF whose group has a member that is no VF of its PF: a VM that had
/// the group could reach that member.
fn isolated(kernel: &dyn Kernel, pf: &PfFacts, vf: &VfFacts) -> Result<(), VfError> {
    let ours = kernel.virtual_functions(pf.address)?;
    let stranger = vf
        .group_members
        .iter()
        .find(|member| !ours.iter().any(|vf| vf.address == **member));
    match stranger {
        None => Ok(()),
        Some(stranger) => Err(VfError::NotIsolated(vf.address, *stranger)),
    }
}

/// Configures the VF, binds it to vfio-pci and reads both back; the device's
/// addresses and ids are returned for the claim.
///
/// The group is held from the binding until the readback, and let go just
/// before QEMU opens it.
pub fn prepare(
    kernel: &dyn Kernel,
    pf: &PfFacts,
    device: &DeviceStatus,
    want: &VfConfig,
) -> Result<DeviceStatus, VfError> {
    let index = device.vf_index;
    let vf = find(kernel, pf, index)?.ok_or(VfError::NoVf {
        pf: pf.address,
        index,
    })?;
    isolated(kernel, pf, &vf)?;
    let held = prove_free(kernel, &vf)?;
    // Whose it was since it was cleaned is not known: somebody of the host may have used it, and
    // vfio-pci does not reset what is taken from it meanwhile. Before the settings, which tell a
    // successor that this was done.
    kernel.reset_function(vf.address)?;
    driver(pf)?.setup(kernel, pf, &vf, want)?;
    reach(Point::Configured);
    let held = match held {
        Some(held) => held,
        None => {
            kernel.bind_vfio(vf.address)?;
            kernel.hold_group(vf.iommu_group.ok_or(VfError::NoGroup(vf.address))?)?
        }
    };
    // vfio-pci's probe may reset the function; what counts is what is there now.
    let got = settings(kernel, pf, index)?;
    drop(held);
    reach(Point::Bound);
    if got != *want {
        return Err(KernelError::Readback {
            interface: named(pf),
            index,
            setting: "the VF's settings",
            wanted: want.to_string(),
            got: got.to_string(),
        }
        .into());
    }
    Ok(described(device, &vf))
}

/// The claim's device with what is known of the VF now that it exists.
#[must_use]
pub fn described(device: &DeviceStatus, vf: &VfFacts) -> DeviceStatus {
    DeviceStatus {
        pci_address: Some(vf.address.to_string()),
        vendor_id: Some(vf.vendor.to_string()),
        device_id: Some(vf.device.to_string()),
        iommu_group: vf.iommu_group,
        ..device.clone()
    }
}

/// Takes everything of the last holder off a free VF and leaves it driverless; its `namespace` is
/// erased, also where the VF has not got it or is not there any more.
pub fn clean(
    kernel: &dyn Kernel,
    pf: &PfFacts,
    index: u16,
    namespace: Option<u32>,
) -> Result<(), VfError> {
    let driver = driver(pf)?;
    let vf = match (find(kernel, pf, index)?, namespace) {
        (Some(vf), _) => vf,
        (None, Some(nsid)) => return Ok(driver.reclaim(kernel, pf, index, nsid)?),
        (None, None) => {
            return Err(VfError::NoVf {
                pf: pf.address,
                index,
            });
        }
    };
    let held = prove_free(kernel, &vf)?;
    let lost = match namespace {
        Some(nsid) => {
            let all = driver.namespaces(kernel, pf)?;
            let users = all.get(&nsid).map(Vec::as_slice).unwrap_or_default();
            Some(nsid).filter(|_| !users.contains(&NamespaceUser::Vf(index)))
        }
        None => None,
    };
    driver.teardown(kernel, pf, &vf)?;
    if let Some(nsid) = lost {
        driver.reclaim(kernel, pf, index, nsid)?;
    }
    reach(Point::Reset);
    drop(held);
    reach(Point::LetGo);
    if vf.driver.is_some() {
        kernel.unbind(vf.address)?;
    }
    reach(Point::Unbound);
    Ok(())
}

/// Gives a PF whose VFs nobody has another number of them: none first, then so many.
///
/// Each VF is taken off vfio-pci before, which waits for whoever uses it, and nobody can open a
/// function without a driver: so nobody can have come by a VF when the count is written, which
/// does not ask.
pub fn resize(kernel: &dyn Kernel, pf: &PfFacts, count: u16) -> Result<(), VfError> {
    for vf in kernel.virtual_functions(pf.address)? {
        drop(prove_free(kernel, &vf)?);
        if vf.driver.is_some() {
            kernel.unbind(vf.address)?;
        }
    }
    for vf in kernel.virtual_functions(pf.address)? {
        if prove_free(kernel, &vf)?.is_some() {
            return Err(KernelError::WrongDriver {
                vf: vf.address,
                found: vf.driver,
                wanted: None,
            }
            .into());
        }
    }
    driver(pf)?.remove_all(kernel, pf)?;
    match count {
        0 => Ok(()),
        _ => Ok(driver(pf)?.create(kernel, pf, count)?),
    }
}

/// How the VF that a guest has differs from what it was granted. Asks the PF alone: the
/// VF's group is the guest's.
pub fn drift(
    kernel: &dyn Kernel,
    pf: &PfFacts,
    index: u16,
    want: &VfConfig,
) -> Result<Option<Drift>, VfError> {
    let up = driver(pf)?.is_up(pf);
    Ok(Drift::of(up, want, settings(kernel, pf, index)?))
}

/// Gives the VF that a guest has what it was granted again, and reads it back.
pub fn repair(
    kernel: &dyn Kernel,
    pf: &PfFacts,
    index: u16,
    want: &VfConfig,
) -> Result<(), VfError> {
    let vf = find(kernel, pf, index)?.ok_or(VfError::NoVf {
        pf: pf.address,
        index,
    })?;
    let mut want = *want;
    if want.trust {
        // A trusted guest may have chosen another, and its driver goes by that.
        want.mac = settings(kernel, pf, index)?.mac;
    }
    Ok(driver(pf)?.setup(kernel, pf, &vf, &want)?)
}

/// Gives an idle PF its VFs.
pub fn create(kernel: &dyn Kernel, pf: &PfFacts, count: u16) -> Result<(), VfError> {
    driver(pf)?.create(kernel, pf, count)?;
    reach(Point::VfsCreated);
    Ok(())
}

/// The PF's interface, or its address where it has none.
fn named(pf: &PfFacts) -> String {
    let address = || pf.address.to_string();
    pf.interface.clone().unwrap_or_else(address)
}

fn driver(pf: &PfFacts) -> Result<&'static dyn VfDriver, VfError> {
    driver_for(pf).ok_or_else(|| VfError::NoDriver {
        pf: pf.address,
        driver: pf.driver.clone().unwrap_or_else(|| "none".to_owned()),
    })
}

#[cfg(test)]
mod tests;

//! The way that most Ethernet drivers share: a count in sysfs and per-VF
//! settings over netlink. Reaches the hardware through [`Kernel`] alone.

use std::time::Duration;

use crate::kernel::{Kernel, KernelError, PfFacts, VfConfig, VfFacts};

use super::{Capabilities, DriverError};

/// Goes from no VF to `count`; no-op when there are that many.
///
/// # Errors
/// The kernel's: EBUSY when there is another number of VFs already.
pub fn create_by_count(kernel: &dyn Kernel, pf: &PfFacts, count: u16) -> Result<(), KernelError> {
    kernel.set_num_vfs(pf.address, count)
}

/// So often and so far apart a VF that is being reset is asked again. i40e and ice wait for
/// it 300 ms themselves before they say that it is not ready.
const TRIES: u32 = 20;
const APART: Duration = Duration::from_millis(100);

/// Asks again while a VF is being reset: by us, by vfio-pci, or by its driver because its MAC,
/// VLAN or trust was changed.
///
/// i40e says EAGAIN then (`i40e_check_vf_init_timeout` in i40e_virtchnl_pf.c), ice EBUSY
/// (`ice_check_vf_ready_for_cfg` in ice_vf_lib.c), and a driver that does not answer for a VF
/// has it left out of the list (`rtnl_fill_vfinfo` in net/core/rtnetlink.c).
///
/// # Errors
/// The kernel's last, when that does not end or it is another one.
pub fn settled<T>(step: impl Fn() -> Result<T, KernelError>) -> Result<T, KernelError> {
    for _ in 1..TRIES {
        match step() {
            Err(error) if in_reset(&error) => std::thread::sleep(APART),
            done => return done,
        }
    }
    step()
}

fn in_reset(error: &KernelError) -> bool {
    match error {
        KernelError::NoSuchVf { .. } => true,
        KernelError::Setting { .. } => {
            matches!(error.errno(), Some(libc::EAGAIN | libc::EBUSY))
        }
        _ => false,
    }
}

/// Takes the PF's interface up; without it VFs have no MAC and no traffic.
///
/// # Errors
/// [`KernelError::NoInterface`], or the kernel's.
pub fn link_up(kernel: &dyn Kernel, pf: &PfFacts) -> Result<(), DriverError> {
    // Asked again: a change of the count closes and reopens the netdev.
    let now = kernel.physical_function(pf.address)?;
    let interface = now.interface.ok_or(KernelError::NoInterface(pf.address))?;
    Ok(kernel.set_link_up(&interface)?)
}

/// Checks `want` against the capabilities, takes the PF up, then sets what
/// differs and reads it back.
///
/// # Errors
/// A setting that the driver does not have, or the kernel's refusal.
pub fn configure(
    kernel: &dyn Kernel,
    pf: &PfFacts,
    vf: &VfFacts,
    want: &VfConfig,
    capabilities: &Capabilities,
) -> Result<(), DriverError> {
    capabilities.supports(want)?;
    link_up(kernel, pf)?;
    Ok(settled(|| kernel.set_vf_config(pf, vf.index, want))?)
}

/// Back to the clean settings, then a function reset so that no state of the
/// last holder's driver stays in the device. Both are tried.
///
/// # Errors
/// [`DriverError::NotClean`] with all that failed.
pub fn clean(
    kernel: &dyn Kernel,
    pf: &PfFacts,
    vf: &VfFacts,
    capabilities: &Capabilities,
) -> Result<(), DriverError> {
    let mut errors = Vec::new();
    let clean = capabilities.clean(vf.address);
    if let Err(error) = settled(|| kernel.set_vf_config(pf, vf.index, &clean)) {
        errors.push(error.into());
    }
    if let Err(error) = kernel.reset_function(vf.address) {
        errors.push(error.into());
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(DriverError::NotClean {
        vf: vf.address,
        errors,
    })
}

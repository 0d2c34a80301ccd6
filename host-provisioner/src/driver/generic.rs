//! The way that most Ethernet drivers share: a count in sysfs and per-VF
//! settings over netlink. Reaches the hardware through [`Kernel`] alone.

use crate::kernel::{Kernel, KernelError, PfFacts, VfConfig, VfFacts};

use super::{Capabilities, DriverError};

/// Goes from no VF to `count`; no-op when there are that many.
///
/// # Errors
/// The kernel's: EBUSY when there is another number of VFs already.
pub fn create_by_count(kernel: &dyn Kernel, pf: &PfFacts, count: u16) -> Result<(), DriverError> {
    Ok(kernel.set_num_vfs(pf.address, count)?)
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
    Ok(kernel.set_vf_config(pf, vf.index, want)?)
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
    if let Err(error) = kernel.set_vf_config(pf, vf.index, &capabilities.clean(vf.address)) {
        errors.push(error);
    }
    if let Err(error) = kernel.reset_function(vf.address) {
        errors.push(error);
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(DriverError::NotClean {
        vf: vf.address,
        errors,
    })
}

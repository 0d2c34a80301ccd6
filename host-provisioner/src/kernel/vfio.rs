//! Binding to vfio-pci and holding vfio groups. Touches sysfs and `/dev/vfio`.

use std::any::Any;
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use common::pci::PciAddress;

use super::{HoldError, KernelError, VFIO_PCI, sysfs};

/// An open vfio group: nobody else can open it until this is dropped.
pub struct GroupHold {
    group: u32,
    /// The open file; the fake kernel keeps a mark of its own here.
    _held: Box<dyn Any + Send + Sync>,
}

impl GroupHold {
    pub(super) fn new(group: u32, held: impl Any + Send + Sync) -> Self {
        Self {
            group,
            _held: Box::new(held),
        }
    }

    /// Number of the group.
    #[must_use]
    pub const fn group(&self) -> u32 {
        self.group
    }
}

impl fmt::Debug for GroupHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GroupHold({})", self.group)
    }
}

/// Opens the group (drivers/vfio/group.c, `vfio_group_fops_open`): EBUSY while
/// it is open anywhere, ENODEV when its last device has left vfio.
pub(super) fn hold(dev: &Path, group: u32) -> Result<GroupHold, HoldError> {
    let path = dev.join("vfio").join(group.to_string());
    // The standard library adds O_CLOEXEC.
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    match opened {
        Ok(file) => Ok(GroupHold::new(group, file)),
        Err(error) => Err(refusal(group, &path, error)),
    }
}

fn refusal(group: u32, path: &Path, error: io::Error) -> HoldError {
    match error.raw_os_error() {
        Some(libc::EBUSY) => HoldError::Busy { group },
        Some(libc::ENODEV | libc::ENOENT) => HoldError::NoDevice { group },
        _ => HoldError::Kernel(KernelError::file("open", path, error)),
    }
}

/// The driver bound to a function.
pub(super) fn driver(sys: &Path, address: PciAddress) -> Result<Option<String>, KernelError> {
    sysfs::link_name(&sysfs::device(sys, address).join("driver"))
}

/// Refuses what is no VF: a PF or a card of the host is never bound, unbound
/// or reset by a slip.
pub(super) fn must_be_vf(sys: &Path, address: PciAddress) -> Result<(), KernelError> {
    let device = sysfs::device(sys, address);
    if !sysfs::exists(&device)? {
        return Err(KernelError::NoSuchFunction(address));
    }
    if sysfs::exists(&device.join("physfn"))? {
        return Ok(());
    }
    Err(KernelError::NotAVirtualFunction(address))
}

/// `driver_override`, `drivers_probe`, and the override cleared again whatever
/// came of it: it would outlive this use of the VF. Never `new_id`, which
/// would claim every device of that id.
pub(super) fn bind(sys: &Path, vf: PciAddress) -> Result<(), KernelError> {
    must_be_vf(sys, vf)?;
    match driver(sys, vf)? {
        Some(name) if name == VFIO_PCI => return Ok(()),
        Some(name) => {
            return Err(KernelError::WrongDriver {
                vf,
                found: Some(name),
                wanted: Some(VFIO_PCI.to_owned()),
            });
        }
        None => {}
    }
    let over = sysfs::device(sys, vf).join("driver_override");
    sysfs::write(&over, VFIO_PCI)?;
    let probed = sysfs::write(&sys.join("bus/pci/drivers_probe"), &vf.to_string());
    let cleared = clear_override(&over);
    probed?;
    cleared?;
    match driver(sys, vf)? {
        Some(name) if name == VFIO_PCI => Ok(()),
        found => Err(KernelError::WrongDriver {
            vf,
            found,
            wanted: Some(VFIO_PCI.to_owned()),
        }),
    }
}

/// A lone newline takes the override away (drivers/base/driver.c,
/// `driver_set_override`).
fn clear_override(over: &Path) -> Result<(), KernelError> {
    sysfs::write(over, "\n")
}

/// Takes the driver off; no-op without one.
pub(super) fn unbind(sys: &Path, vf: PciAddress) -> Result<(), KernelError> {
    must_be_vf(sys, vf)?;
    if driver(sys, vf)?.is_none() {
        return Ok(());
    }
    let device = sysfs::device(sys, vf);
    sysfs::write(&device.join("driver/unbind"), &vf.to_string())?;
    clear_override(&device.join("driver_override"))?;
    match driver(sys, vf)? {
        None => Ok(()),
        found => Err(KernelError::WrongDriver {
            vf,
            found,
            wanted: None,
        }),
    }
}

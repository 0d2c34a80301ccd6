//! Binding to vfio-pci and holding vfio groups. Touches sysfs and `/dev/vfio`.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::pci::PciAddress;

use super::{HoldError, KernelError, VFIO_PCI, sysfs, sysfs::Sysfs};

/// An unbind that nobody keeps takes a function reset at most (drivers/vfio/pci,
/// `vfio_pci_core_unregister_device`).
const UNBIND: Duration = Duration::from_secs(10);

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
fn hold(dev: &Path, group: u32) -> Result<GroupHold, HoldError> {
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

/// One opening at a time for each group, of this process's own: a probe has the
/// group open for a moment, in which whoever means to keep it would be told that
/// it is somebody's. Waits only for such moments, never for a [`GroupHold`].
#[derive(Clone, Debug, Default)]
pub(super) struct Openings(Arc<Mutex<BTreeMap<u32, Arc<Mutex<()>>>>>);

impl Openings {
    fn of(&self, group: u32) -> Arc<Mutex<()>> {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(groups.entry(group).or_default())
    }

    pub(super) fn hold(&self, dev: &Path, group: u32) -> Result<GroupHold, HoldError> {
        let opening = self.of(group);
        let _alone = opening.lock().unwrap_or_else(PoisonError::into_inner);
        hold(dev, group)
    }

    pub(super) fn probe(&self, dev: &Path, group: u32) -> Result<(), HoldError> {
        let opening = self.of(group);
        let _alone = opening.lock().unwrap_or_else(PoisonError::into_inner);
        hold(dev, group).map(drop)
    }
}

/// The driver bound to a function.
pub(super) fn driver(sys: Sysfs<'_>, address: PciAddress) -> Result<Option<String>, KernelError> {
    sysfs::link_name(&sys.device(address).join("driver"))
}

/// Refuses what is no VF: a PF or a card of the host is never bound, unbound
/// or reset by a slip.
pub(super) fn must_be_vf(sys: Sysfs<'_>, address: PciAddress) -> Result<(), KernelError> {
    let device = sys.device(address);
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
pub(super) fn bind(sys: Sysfs<'_>, vf: PciAddress) -> Result<(), KernelError> {
    must_be_vf(sys, vf)?;
    sys.not_stuck(vf)?;
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
    let over = sys.device(vf).join("driver_override");
    sys.write(&over, VFIO_PCI)?;
    let probed = sys.write(&sys.root.join("bus/pci/drivers_probe"), &vf.to_string());
    let cleared = clear_override(sys, &over);
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
fn clear_override(sys: Sysfs<'_>, over: &Path) -> Result<(), KernelError> {
    sys.write(over, "\n")
}

/// Takes the driver off; no-op without one.
pub(super) fn unbind(sys: Sysfs<'_>, vf: PciAddress) -> Result<(), KernelError> {
    must_be_vf(sys, vf)?;
    sys.not_stuck(vf)?;
    if driver(sys, vf)?.is_none() {
        return Ok(());
    }
    let device = sys.device(vf);
    sys.write_apart(vf, &device.join("driver/unbind"), &vf.to_string(), UNBIND)?;
    clear_override(sys, &device.join("driver_override"))?;
    match driver(sys, vf)? {
        None => Ok(()),
        found => Err(KernelError::WrongDriver {
            vf,
            found,
            wanted: None,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_probe_of_a_group_is_waited_for_and_of_another_is_not() {
        let dev = tempfile::tempdir().unwrap();
        std::fs::create_dir(dev.path().join("vfio")).unwrap();
        for group in ["7", "8"] {
            std::fs::write(dev.path().join("vfio").join(group), "").unwrap();
        }
        let openings = Openings::default();
        let probed = openings.of(7);
        let probing = probed.lock().unwrap();
        assert_eq!(openings.hold(dev.path(), 8).unwrap().group(), 8);
        let (opened, got) = mpsc::channel();
        let thread = {
            let (openings, dev) = (openings.clone(), dev.path().to_owned());
            std::thread::spawn(move || opened.send(openings.hold(&dev, 7).map(|h| h.group())))
        };
        assert!(got.recv_timeout(Duration::from_millis(200)).is_err());
        drop(probing);
        assert_eq!(got.recv().unwrap().unwrap(), 7);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_hold_is_not_waited_for() {
        let dev = tempfile::tempdir().unwrap();
        std::fs::create_dir(dev.path().join("vfio")).unwrap();
        std::fs::write(dev.path().join("vfio/7"), "").unwrap();
        let openings = Openings::default();
        let _held = openings.hold(dev.path(), 7).unwrap();
        // A plain file can be opened twice; what counts is that this returns.
        openings.probe(dev.path(), 7).unwrap();
    }
}

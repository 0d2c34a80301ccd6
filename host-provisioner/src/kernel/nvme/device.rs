//! NVMe controllers and namespaces of this host: the ioctl of `/dev/nvmeN`, sysfs, and reads of
//! `/dev/nvmeNnM`. The only part of this room with unsafe code; no decisions.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::pci::PciAddress;

use super::{Blocks, Command, Data, Lent, PAGE};
use crate::kernel::KernelError;
use crate::kernel::sysfs::{self, Sysfs};

/// A controller is waited for so long after a reset: Linux itself gives one up to 127 s
/// (CAP.TO), and emulated ones take a moment.
const LIVE: Duration = Duration::from_secs(130);
/// The kernel looks for namespaces before Namespace Attachment returns
/// (`nvme_passthru_end` in drivers/nvme/host/core.c); udev then makes the node.
const NODE: Duration = Duration::from_secs(20);
/// A reset of a function that nobody uses.
const RESET: Duration = Duration::from_secs(60);

/// `struct nvme_passthru_cmd` (include/uapi/linux/nvme_ioctl.h).
#[repr(C)]
#[derive(Default)]
pub struct Passthru {
    opcode: u8,
    flags: u8,
    rsvd1: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

// NVME_IOCTL_ADMIN_CMD.
nix::ioctl_readwrite!(admin_cmd, b'N', 0x41, Passthru);
// BLKGETSIZE64; its number is that of a size_t, what it writes is a u64
// (include/uapi/linux/fs.h).
nix::ioctl_read!(block_size, 0x12, 114, usize);

/// Name of the PF's controller, as in `/dev/<name>`.
pub fn controller(sys: Sysfs<'_>, pf: PciAddress) -> Result<Option<String>, KernelError> {
    let names = sysfs::names(&sys.device(pf).join("nvme"))?;
    Ok(names.into_iter().next())
}

fn must_have(sys: Sysfs<'_>, pf: PciAddress) -> Result<String, KernelError> {
    controller(sys, pf)?.ok_or(KernelError::NoNvmeController(pf))
}

/// The serial number that the controller says; `None` without a controller.
pub fn serial(sys: Sysfs<'_>, pf: PciAddress) -> Result<Option<String>, KernelError> {
    let Some(name) = controller(sys, pf)? else {
        return Ok(None);
    };
    let path = sys.device(pf).join("nvme").join(name).join("serial");
    let serial = sysfs::read_if_there(&path)?;
    Ok(serial.filter(|text| !text.is_empty()))
}

/// Sends one admin command, and returns the page that it reads.
pub fn admin(
    sys: Sysfs<'_>,
    dev: &Path,
    pf: PciAddress,
    command: &Command,
) -> Result<Vec<u8>, KernelError> {
    let path = dev.join(must_have(sys, pf)?);
    let file = File::open(&path).map_err(|e| KernelError::file("open", &path, e))?;
    let mut page = match &command.data {
        Data::None => Vec::new(),
        Data::In => vec![0; PAGE],
        Data::Out(page) => page.to_vec(),
    };
    let millis = u32::try_from(command.limit.as_millis()).unwrap_or(u32::MAX);
    let mut sent = Passthru {
        opcode: command.opcode,
        nsid: command.nsid,
        addr: page.as_mut_ptr() as u64,
        data_len: u32::try_from(page.len()).unwrap_or(0),
        cdw10: command.cdw10,
        cdw11: command.cdw11,
        timeout_ms: millis,
        ..Passthru::default()
    };
    // SAFETY: `sent` is the struct of this ioctl; `addr` and `data_len` are those of `page`, which
    // lives until it returns, and no other buffer is named.
    let answer = unsafe { admin_cmd(file.as_raw_fd(), &raw mut sent) };
    match answer {
        // Below 0 is an errno, above it the controller's status.
        Ok(0) if command.data == Data::In => Ok(page),
        Ok(0) => Ok(Vec::new()),
        Ok(status) => Err(KernelError::Nvme {
            pf,
            command: command.name.clone(),
            status: u16::try_from(status).unwrap_or(u16::MAX),
        }),
        Err(errno) => Err(KernelError::file(
            format!("have {pf} do \"{}\" by", command.name),
            &path,
            errno.into(),
        )),
    }
}

/// Resets the PF and waits until its controller works. Another way than a function level
/// reset may reach other functions of the card.
pub fn reset(sys: Sysfs<'_>, pf: PciAddress) -> Result<(), KernelError> {
    let device = sys.device(pf);
    sys.not_stuck(pf)?;
    must_have(sys, pf)?;
    let count = device.join("sriov_numvfs");
    if sysfs::parse::<u16>(&count, "a number of VFs")? != 0 {
        return Err(KernelError::HasVfs(pf));
    }
    let methods = device.join("reset_method");
    let first = sysfs::read(&methods)?;
    // What the kernel tries first (drivers/pci/pci.c, pci_reset_fn_methods); the device-specific
    // way of NVMe functions is to disable the controller and then the same
    // (drivers/pci/quirks.c, nvme_disable_and_flr).
    match first.split_ascii_whitespace().next() {
        Some("flr" | "device_specific") => {}
        _ => {
            return Err(KernelError::Content {
                path: methods,
                text: first,
                expected: "a function level reset",
            });
        }
    }
    sys.write_apart(pf, &device.join("reset"), "1", RESET)?;
    let what = || format!("the controller of {pf} after its reset");
    sysfs::wait_for(what, LIVE, || {
        // It may have another number by now.
        let Some(name) = controller(sys, pf)? else {
            return Ok(None);
        };
        let state = sysfs::read_if_there(&device.join("nvme").join(name).join("state"))?;
        Ok((state.as_deref() == Some("live")).then_some(()))
    })
}

/// The namespaces of which the PF's own controller has block devices: their numbers, and the
/// names by which the host has them.
pub fn namespaces(sys: Sysfs<'_>, pf: PciAddress) -> Result<Vec<(u32, String)>, KernelError> {
    let Some(name) = controller(sys, pf)? else {
        return Ok(Vec::new());
    };
    let folder = sys.device(pf).join("nvme").join(&name);
    let mut found = Vec::new();
    for entry in sysfs::names(&folder)? {
        let Some(disk) = disk(&entry) else {
            continue;
        };
        let nsid = sysfs::read_if_there(&folder.join(&entry).join("nsid"))?;
        // Gone between the list and the look.
        let Some(nsid) = nsid else { continue };
        let nsid = nsid.parse().map_err(|_| KernelError::Content {
            path: folder.join(&entry).join("nsid"),
            text: nsid,
            expected: "the number of a namespace",
        })?;
        found.push((nsid, disk));
    }
    Ok(found)
}

/// The disk of a namespace's name below its controller: `nvme0n1` itself, or, where other
/// controllers could have it too, `nvme0n1` of the path `nvme0c3n1`
/// (drivers/nvme/host/multipath.c, `nvme_mpath_set_disk_name`).
fn disk(entry: &str) -> Option<String> {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (before, namespace) = entry.strip_prefix("nvme")?.rsplit_once('n')?;
    let (subsystem, path) = match before.split_once('c') {
        Some((subsystem, path)) => (subsystem, Some(path)),
        None => (before, None),
    };
    (number(namespace) && number(subsystem) && path.is_none_or(number))
        .then(|| format!("nvme{subsystem}n{namespace}"))
}

/// Why the PF is the host's own: its controller has namespaces that were not lent to it.
pub fn in_use(
    sys: Sysfs<'_>,
    pf: PciAddress,
    lending: &Lending,
) -> Result<Option<String>, KernelError> {
    let names: Vec<String> = namespaces(sys, pf)?
        .into_iter()
        .filter(|(nsid, _)| !lending.has(pf, *nsid))
        .map(|(nsid, disk)| format!("/dev/{disk} (namespace {nsid})"))
        .collect();
    Ok((!names.is_empty()).then(|| {
        format!(
            "the host has {} of it, to be detached first: nvme detach-ns",
            names.join(" and ")
        )
    }))
}

/// Namespaces that PFs' own controllers have by our doing.
#[derive(Clone, Debug, Default)]
pub struct Lending(Arc<Mutex<BTreeSet<(PciAddress, u32)>>>);

impl Lending {
    fn has(&self, pf: PciAddress, nsid: u32) -> bool {
        let lent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lent.contains(&(pf, nsid))
    }

    /// Until the result is dropped.
    pub fn lend(&self, pf: PciAddress, nsid: u32) -> Lent {
        let mut lent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lent.insert((pf, nsid));
        Box::new(Loan {
            of: self.clone(),
            what: (pf, nsid),
        })
    }
}

struct Loan {
    of: Lending,
    what: (PciAddress, u32),
}

impl Drop for Loan {
    fn drop(&mut self) {
        let mut lent = self.of.0.lock().unwrap_or_else(PoisonError::into_inner);
        lent.remove(&self.what);
    }
}

/// Opens a namespace's disk exclusively, and past the page cache.
pub fn open(
    sys: Sysfs<'_>,
    dev: &Path,
    pf: PciAddress,
    nsid: u32,
) -> Result<Box<dyn Blocks>, KernelError> {
    let what = || format!("the disk of namespace {nsid} of {pf}");
    let path = sysfs::wait_for(what, NODE, || {
        let all = namespaces(sys, pf)?;
        let disk = all.into_iter().find(|(found, _)| *found == nsid);
        let path = disk.map(|(_, disk)| dev.join(disk));
        match path {
            Some(path) if sysfs::exists(&path)? => Ok(Some(path)),
            _ => Ok(None),
        }
    })?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_EXCL)
        .open(&path)
        .map_err(|e| KernelError::file("open for nobody else", &path, e))?;
    let mut size = 0_usize;
    // SAFETY: `size` is where this ioctl writes 64 bits; a usize has as many here, see the
    // assertion below.
    unsafe { block_size(file.as_raw_fd(), &raw mut size) }
        .map_err(|errno| KernelError::file("ask for the size of", &path, errno.into()))?;
    Ok(Box::new(Disk {
        size: size as u64,
        file,
        path,
    }))
}

const _: () = assert!(usize::BITS == 64);

struct Disk {
    file: File,
    path: PathBuf,
    size: u64,
}

/// What O_DIRECT wants of a buffer's place, for every block size that is met.
const ALIGNMENT: usize = 4096;

impl Blocks for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, KernelError> {
        let mut buffer = vec![0; length.saturating_add(ALIGNMENT)];
        let skip = buffer.as_ptr().align_offset(ALIGNMENT);
        let place = buffer.get_mut(skip..skip.saturating_add(length));
        let place = place.ok_or_else(|| {
            KernelError::file("make room to read", &self.path, io::Error::other("no room"))
        })?;
        self.file
            .read_exact_at(place, offset)
            .map_err(|e| KernelError::file("read", &self.path, e))?;
        Ok(place.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_struct_is_the_kernels() {
        assert_eq!(size_of::<Passthru>(), 72);
        assert_eq!(std::mem::offset_of!(Passthru, addr), 24);
        assert_eq!(std::mem::offset_of!(Passthru, cdw10), 40);
        assert_eq!(std::mem::offset_of!(Passthru, timeout_ms), 64);
    }

    #[test]
    fn a_namespaces_disk_is_told_from_its_path() {
        assert_eq!(disk("nvme0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(disk("nvme1c12n3").as_deref(), Some("nvme1n3"));
        for other in [
            "nvme0",
            "nvme0n1p1",
            "ng0n1",
            "hwmon1",
            "nvmen1",
            "nvme0cn1",
            "nvme0n",
        ] {
            assert_eq!(disk(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_lent_is_not_the_hosts_until_it_is_back() {
        let pf = "0000:01:00.0".parse().unwrap();
        let lending = Lending::default();
        let lent = lending.lend(pf, 3);
        assert!(lending.has(pf, 3) && !lending.has(pf, 2));
        drop(lent);
        assert!(!lending.has(pf, 3));
    }
}

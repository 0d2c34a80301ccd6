//! What can go wrong with the kernel. The errno and the path or request stay.

use std::io;
use std::path::{Path, PathBuf};

use common::pci::PciAddress;
use thiserror::Error;

use super::netlink::VfSetting;
use super::{Stuck, nvme};

/// A failed question or order to the kernel.
#[derive(Debug, Error)]
pub enum KernelError {
    /// A file of sysfs, procfs or `/dev`.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// `read`, `write "7" to`, `open`, ...
        action: String,
        path: PathBuf,
        source: io::Error,
    },
    /// A file whose content is not what the kernel's ABI says.
    #[error("{} holds {text:?}, which is not {expected}", path.display())]
    Content {
        path: PathBuf,
        text: String,
        expected: &'static str,
    },
    #[error("there is no PCI function {0} on this host")]
    NoSuchFunction(PciAddress),
    #[error("{0} cannot have virtual functions (no sriov_totalvfs)")]
    NotAPhysicalFunction(PciAddress),
    #[error("{0} is not a virtual function (no physfn), so it is left alone")]
    NotAVirtualFunction(PciAddress),
    #[error(
        "physical function {0} has no network interface, so its VFs' settings cannot be reached"
    )]
    NoInterface(PciAddress),
    #[error("the kernel reports no VF {index} on {interface}")]
    NoSuchVf { interface: String, index: u16 },
    /// The write to `sriov_numvfs` succeeded but the count is another.
    #[error("{pf} was asked for {wanted} VFs, the write succeeded, and it has {got}")]
    VfCount {
        pf: PciAddress,
        wanted: u16,
        got: u16,
    },
    #[error("{vf} has driver {} where {} was due", name(found.as_deref()), name(wanted.as_deref()))]
    WrongDriver {
        vf: PciAddress,
        found: Option<String>,
        wanted: Option<String>,
    },
    /// A netlink request, with its errno.
    #[error("netlink, {request}: {source}")]
    Netlink { request: String, source: io::Error },
    /// A setting of a VF that the driver refused, with its errno.
    #[error("netlink, set {setting} of VF {index} of {interface} to {value}: {source}{hint}")]
    Setting {
        interface: String,
        index: u16,
        setting: &'static str,
        value: String,
        source: io::Error,
        /// What a person can do about it; may be empty.
        hint: &'static str,
    },
    /// An answer that is not rtnetlink.
    #[error("netlink, {request}: {detail}")]
    NetlinkAnswer { request: String, detail: String },
    /// The kernel took a setting and reports another.
    #[error("VF {index} of {interface}: {setting} was set to {wanted} and reads back as {got}")]
    Readback {
        interface: String,
        index: u16,
        setting: &'static str,
        wanted: String,
        got: String,
    },
    /// A write that waits in the kernel for whoever uses the device.
    #[error(
        "the kernel has not come back from a write about {function}, for which process {} of the host waits: somebody still uses that device, or the card is slow",
        .stuck.pid
    )]
    Stuck { function: PciAddress, stuck: Stuck },
    /// The process that was to make a write did not come to it.
    #[error("the helper that writes to {function}: {detail}")]
    Helper {
        function: PciAddress,
        detail: String,
    },
    #[error("{what} did not come within {millis} ms")]
    Timeout { what: String, millis: u128 },
    #[error(
        "{0} has no NVMe controller: is it bound to the driver nvme, and did the controller start?"
    )]
    NoNvmeController(PciAddress),
    /// An NVMe admin command that the controller refused; its status as Linux gives it.
    #[error("the NVMe controller of {pf} refused to {command}: {}", status_text(*status))]
    Nvme {
        pf: PciAddress,
        command: String,
        status: u16,
    },
    /// An answer that is not as the NVMe specification says.
    #[error("the NVMe controller of {pf} answered {what} with what is none")]
    NvmeAnswer { pf: PciAddress, what: String },
    #[error("{0} has VFs, which a reset would take offline, so it is not reset")]
    HasVfs(PciAddress),
}

fn name(driver: Option<&str>) -> &str {
    driver.unwrap_or("none")
}

fn status_text(status: u16) -> String {
    match nvme::status_words(status) {
        Some(words) => format!("{words} (status {status:#x})"),
        None => format!("status {status:#x}"),
    }
}

impl KernelError {
    /// A refused setting of a VF.
    pub(super) fn setting(
        interface: &str,
        index: u16,
        setting: VfSetting,
        source: io::Error,
    ) -> Self {
        let hint = source
            .raw_os_error()
            .map_or("", |errno| setting.hint(errno));
        Self::Setting {
            interface: interface.to_owned(),
            index,
            setting: setting.name(),
            value: setting.value(),
            source,
            hint,
        }
    }

    pub(crate) fn file(action: impl Into<String>, path: &Path, source: io::Error) -> Self {
        Self::File {
            action: action.into(),
            path: path.to_owned(),
            source,
        }
    }

    /// The kernel's error number, where it gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::File { source, .. }
            | Self::Netlink { source, .. }
            | Self::Setting { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Why a vfio group could not be opened.
#[derive(Debug, Error)]
pub enum HoldError {
    /// EBUSY: QEMU, a dead QEMU's vhost thread, or somebody else has it.
    #[error("IOMMU group {group} is in use: somebody has /dev/vfio/{group} open")]
    Busy { group: u32 },
    /// ENODEV or ENOENT: no member is bound to a vfio driver.
    #[error("IOMMU group {group} has no device on a vfio driver")]
    NoDevice { group: u32 },
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

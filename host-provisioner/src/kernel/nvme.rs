//! NVMe admin commands to the controller of a PF: what is sent, and what the answers say.
//!
//! A PF of an NVMe subsystem is its *primary* controller, each VF a *secondary* one. Commands
//! go to the primary alone; a secondary is its guest's. Numbers and layouts are those of the
//! NVM Express Base Specification, as Linux (include/linux/nvme.h) and, for what Linux does not
//! use itself, QEMU (include/block/nvme.h) have them.

pub(super) mod device;
pub(super) mod parse;

use std::fmt;
use std::time::Duration;

use common::pci::PciAddress;

use super::KernelError;
pub use parse::{Controller, Format, Pool, Primary, Secondary};

/// What most commands may take; the kernel's own limit is 60 s (`nvme_core.admin_timeout`). Not
/// less: a command that exceeds it has the kernel reset the controller (`nvme_timeout` in
/// drivers/nvme/host/pci.c), and with it every guest's.
const USUAL: Duration = Duration::from_secs(60);
/// A Format NVM writes or erases the whole namespace. Long, for the same reason.
const FORMAT: Duration = Duration::from_secs(3600);

/// Operation codes (`nvme_admin_opcode` in Linux).
pub(super) mod opcode {
    pub const IDENTIFY: u8 = 0x06;
    pub const NAMESPACE_ATTACHMENT: u8 = 0x15;
    pub const VIRTUALIZATION_MANAGEMENT: u8 = 0x1c;
    pub const FORMAT_NVM: u8 = 0x80;
}

/// Data structures that Identify returns (`NVME_ID_CNS_*` in both).
pub(super) mod cns {
    pub const CONTROLLER: u8 = 0x01;
    pub const ALLOCATED_NAMESPACES: u8 = 0x10;
    pub const ALLOCATED_NAMESPACE: u8 = 0x11;
    pub const ATTACHED_CONTROLLERS: u8 = 0x12;
    pub const PRIMARY: u8 = 0x14;
    pub const SECONDARIES: u8 = 0x15;
}

/// Actions of Virtualization Management (`NVME_VIRT_MNGMT_ACTION_*` in QEMU).
pub(super) mod action {
    pub const PRIMARY_ALLOCATION: u8 = 0x1;
    pub const OFFLINE: u8 = 0x7;
    pub const ASSIGN: u8 = 0x8;
    pub const ONLINE: u8 = 0x9;
}

/// Length of what Identify returns and Namespace Attachment takes, in bytes.
pub(super) const PAGE: usize = 4096;

/// The flexible resources of a primary controller (`NVME_VIRT_RES_*` in QEMU).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A submission queue and its completion queue; the admin queues are one.
    Queues,
    /// An interrupt vector.
    Interrupts,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queues => "queues",
            Self::Interrupts => "interrupts",
        })
    }
}

/// What goes with a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    None,
    /// A page is read.
    In,
    /// This page is sent.
    Out(Box<[u8; PAGE]>),
}

/// One admin command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// For messages.
    pub name: String,
    pub opcode: u8,
    /// 0: it is about no namespace.
    pub nsid: u32,
    pub cdw10: u32,
    pub cdw11: u32,
    pub data: Data,
    /// After this the kernel gives it up.
    pub limit: Duration,
}

/// An open namespace that nobody else on the host can mount or build upon.
pub trait Blocks {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Reads so many bytes from the medium, past every cache of the host; both numbers are
    /// multiples of its logical block's size, and inside of the namespace.
    ///
    /// # Errors
    /// The kernel's, with errno.
    fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, KernelError>;
}

/// While it lives, that the PF's own controller has a namespace is our doing, not the host's use.
pub type Lent = Box<dyn std::any::Any + Send>;

/// What the node agent asks of NVMe controllers. Decides nothing, as [`super::Kernel`].
pub trait Nvme: Send + Sync {
    /// Sends one admin command to the PF's controller and returns the page that was read;
    /// empty where none is.
    ///
    /// # Errors
    /// [`KernelError::Nvme`] with the status of the controller; else the kernel's with errno.
    fn admin(&self, pf: PciAddress, command: &Command) -> Result<Vec<u8>, KernelError>;

    /// Function level reset of the PF, and waits until its controller works again. It takes
    /// every secondary controller offline and their resources away, so it is refused while
    /// there are VFs. The caller has proven that the host does not use the PF.
    ///
    /// # Errors
    /// [`KernelError::HasVfs`]; else the kernel's.
    fn reset(&self, pf: PciAddress) -> Result<(), KernelError>;

    /// From now on it is not the host's use of the PF that its own controller has this namespace.
    fn lend(&self, pf: PciAddress, nsid: u32) -> Lent;

    /// Opens a namespace that is attached to the PF's own controller, for us alone.
    ///
    /// # Errors
    /// EBUSY when the host has mounted it or built upon it.
    fn open(&self, pf: PciAddress, nsid: u32) -> Result<Box<dyn Blocks>, KernelError>;
}

/// The primary controller of a PF, to be asked and told.
#[derive(Clone, Copy)]
pub struct Subsystem<'a> {
    pub nvme: &'a dyn Nvme,
    pub pf: PciAddress,
}

impl Subsystem<'_> {
    fn send(&self, command: &Command) -> Result<Vec<u8>, KernelError> {
        self.nvme.admin(self.pf, command)
    }

    fn identify(&self, name: &str, cns: u8, id: u16, nsid: u32) -> Result<Vec<u8>, KernelError> {
        self.send(&Command {
            name: name.to_owned(),
            opcode: opcode::IDENTIFY,
            nsid,
            cdw10: u32::from(cns) | (u32::from(id) << 16),
            cdw11: 0,
            data: Data::In,
            limit: USUAL,
        })
    }

    /// An answer that is not what the specification says.
    fn short<T>(&self, what: &str, parsed: Option<T>) -> Result<T, KernelError> {
        parsed.ok_or_else(|| KernelError::NvmeAnswer {
            pf: self.pf,
            what: what.to_owned(),
        })
    }

    /// What the primary controller says of itself.
    ///
    /// # Errors
    /// The kernel's or the controller's; so are those of all that follow.
    pub fn controller(&self) -> Result<Controller, KernelError> {
        let page = self.identify("Identify Controller", cns::CONTROLLER, 0, 0)?;
        self.short("Identify Controller", parse::controller(&page))
    }

    /// The resources that it can give to secondary controllers, and has given.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn primary(&self) -> Result<Primary, KernelError> {
        let what = "Primary Controller Capabilities";
        let page = self.identify(what, cns::PRIMARY, 0, 0)?;
        self.short(what, parse::primary(&page))
    }

    /// Every secondary controller, whether or not its VF exists.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn secondaries(&self) -> Result<Vec<Secondary>, KernelError> {
        let what = "Secondary Controller List";
        let mut all: Vec<Secondary> = Vec::new();
        loop {
            let from = match all.last() {
                None => 0,
                Some(last) => match last.id.checked_add(1) {
                    Some(next) => next,
                    None => return Ok(all),
                },
            };
            let page = self.identify(what, cns::SECONDARIES, from, 0)?;
            let part = self.short(what, parse::secondaries(&page))?;
            // Also what does not go on ends here.
            let fresh: Vec<_> = part.into_iter().filter(|entry| entry.id >= from).collect();
            if fresh.is_empty() {
                return Ok(all);
            }
            all.extend(fresh);
            all.sort_by_key(|entry| entry.id);
        }
    }

    /// The namespaces of the subsystem, attached or not, by number.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn namespaces(&self) -> Result<Vec<u32>, KernelError> {
        let mut all: Vec<u32> = Vec::new();
        loop {
            let after = all.last().copied().unwrap_or(0);
            let page = self.identify(
                "Allocated Namespace List",
                cns::ALLOCATED_NAMESPACES,
                0,
                after,
            )?;
            let part = parse::namespaces(&page);
            let fresh: Vec<u32> = part.into_iter().filter(|nsid| *nsid > after).collect();
            let full = fresh.len() == PAGE / 4;
            all.extend(fresh);
            all.sort_unstable();
            if !full {
                return Ok(all);
            }
        }
    }

    /// The controllers to which a namespace is attached, by number.
    ///
    /// # Errors
    /// See [`Self::controller`]; also for a namespace that there is not.
    pub fn attached(&self, nsid: u32) -> Result<Vec<u16>, KernelError> {
        let what = format!("Controller List of namespace {nsid}");
        let page = self.identify(&what, cns::ATTACHED_CONTROLLERS, 0, nsid)?;
        self.short(&what, parse::controllers(&page))
    }

    /// How a namespace is formatted, attached or not.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn format_of(&self, nsid: u32) -> Result<Format, KernelError> {
        let what = format!("Identify Namespace {nsid}");
        let page = self.identify(&what, cns::ALLOCATED_NAMESPACE, 0, nsid)?;
        self.short(&what, parse::format(&page))
    }

    fn virtualization(
        &self,
        name: String,
        action: u8,
        resource: Option<Resource>,
        id: u16,
        count: u16,
    ) -> Result<(), KernelError> {
        let kind = match resource {
            Some(Resource::Interrupts) => 1_u32,
            Some(Resource::Queues) | None => 0,
        };
        self.send(&Command {
            name,
            opcode: opcode::VIRTUALIZATION_MANAGEMENT,
            nsid: 0,
            cdw10: u32::from(action) | (kind << 8) | (u32::from(id) << 16),
            cdw11: u32::from(count),
            data: Data::None,
            limit: USUAL,
        })
        .map(drop)
    }

    /// How many flexible resources the primary controller is to have for itself from its next
    /// reset on.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn allocate(&self, primary: u16, kind: Resource, count: u16) -> Result<(), KernelError> {
        let name = format!("allocate {count} {kind} to the primary controller {primary}");
        self.virtualization(name, action::PRIMARY_ALLOCATION, Some(kind), primary, count)
    }

    /// Gives a secondary controller that is offline so many resources.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn assign(&self, secondary: u16, kind: Resource, count: u16) -> Result<(), KernelError> {
        let name = format!("assign {count} {kind} to the secondary controller {secondary}");
        self.virtualization(name, action::ASSIGN, Some(kind), secondary, count)
    }

    /// Takes a secondary controller offline; its resources go with that. The caller has proven
    /// that nobody uses its VF.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn offline(&self, secondary: u16) -> Result<(), KernelError> {
        let name = format!("take the secondary controller {secondary} offline");
        self.virtualization(name, action::OFFLINE, None, secondary, 0)
    }

    /// Takes a secondary controller online.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn online(&self, secondary: u16) -> Result<(), KernelError> {
        let name = format!("take the secondary controller {secondary} online");
        self.virtualization(name, action::ONLINE, None, secondary, 0)
    }

    fn attachment(&self, name: String, sel: u32, nsid: u32, id: u16) -> Result<(), KernelError> {
        self.send(&Command {
            name,
            opcode: opcode::NAMESPACE_ATTACHMENT,
            nsid,
            cdw10: sel,
            cdw11: 0,
            data: Data::Out(parse::controller_list(id)),
            limit: USUAL,
        })
        .map(drop)
    }

    /// Attaches a namespace to a controller, for which it then exists; of real hardware the
    /// specification wants that to outlast every reset, QEMU forgets it with the VFs.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn attach(&self, nsid: u32, controller: u16) -> Result<(), KernelError> {
        let name = format!("attach namespace {nsid} to controller {controller}");
        self.attachment(name, 0, nsid, controller)
    }

    /// Detaches a namespace from a controller.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn detach(&self, nsid: u32, controller: u16) -> Result<(), KernelError> {
        let name = format!("detach namespace {nsid} from controller {controller}");
        self.attachment(name, 1, nsid, controller)
    }

    /// Formats a namespace as it is formatted and has its user data erased. It has to be attached
    /// to the PF's own controller: of one that is not the field is invalid (`nvme_format` in
    /// QEMU's hw/nvme/ctrl.c). Where the controller says so ([`Controller::erases_all`]) every
    /// other namespace is erased with it.
    ///
    /// # Errors
    /// See [`Self::controller`].
    pub fn format(&self, nsid: u32, as_it_is: Format) -> Result<(), KernelError> {
        self.send(&Command {
            name: format!("Format NVM of namespace {nsid}"),
            opcode: opcode::FORMAT_NVM,
            nsid,
            cdw10: as_it_is.erasing(),
            cdw11: 0,
            data: Data::None,
            limit: FORMAT,
        })
        .map(drop)
    }
}

/// What a controller's status means, for a sentence (`NVME_SC_*` in Linux); `None`: not one that
/// is met here.
#[must_use]
pub(super) fn status_words(status: u16) -> Option<&'static str> {
    Some(match status & 0x7ff {
        0x001 => "it does not have this command",
        0x002 => "a field of the command is invalid, or the namespace is not attached to it",
        0x00b => "there is no such namespace",
        0x084 => "a format is under way",
        0x10a => "it cannot be formatted so",
        0x118 => "it is attached already",
        0x119 => "it is private to another controller",
        0x11a => "it is not attached",
        0x11c => "there is no such controller now",
        0x11f => "there is no such controller",
        0x120 => "the secondary controller is not in the state for it, or has too few resources",
        0x121 => "so many it cannot give to one controller",
        0x122 => "it has not so many left",
        _ => return None,
    })
}

//! An NVMe subsystem in memory, with the manners of QEMU's (hw/nvme/ctrl.c; the functions are
//! named at each) where they are not those of every controller.

mod card;

use std::io;
use std::path::PathBuf;

use common::pci::{PciAddress, PciId};

use super::{FakeKernel, Write, igb_pf};
use crate::kernel::nvme::{Blocks, Command, Data, Lent, Nvme, action, opcode};
use crate::kernel::{KernelError, PfFacts, VFIO_PCI};
pub(super) use card::Card;
pub use card::Formats;
use card::INVALID_OPCODE;

/// Number of the primary controller; that of VF `index` is `index + 1`.
pub const PRIMARY: u16 = 0;
/// Size of every namespace in bytes, in blocks of 512.
pub const SIZE: usize = 64 * 1024;

/// An NVMe PF at `address` with four VFs to have, eight flexible queues and eight interrupts,
/// all of which the primary controller has.
#[must_use]
pub fn nvme_pf(address: PciAddress) -> PfFacts {
    let mut facts = PfFacts {
        vendor: PciId(0x1b36),
        device: PciId(0x0010),
        driver: Some("nvme".to_owned()),
        interface: None,
        mac: None,
        permanent_mac: None,
        serial: Some("dead".to_owned()),
        total_vfs: 4,
        ..igb_pf(address)
    };
    facts.identity = facts.identify();
    facts
}

impl FakeKernel {
    /// The PF's subsystem has these namespaces, attached to no controller and full of zeros.
    pub fn give_namespaces(&self, pf: PciAddress, nsids: impl IntoIterator<Item = u32>) {
        if let Some(card) = self.lock().nvme.get_mut(&pf) {
            let empty = nsids.into_iter().map(|nsid| (nsid, vec![0; SIZE]));
            card.namespaces.extend(empty);
        }
    }

    /// Attaches a namespace to a controller behind everybody's back.
    pub fn attach_namespace(&self, pf: PciAddress, nsid: u32, controller: u16) {
        if let Some(card) = self.lock().nvme.get_mut(&pf) {
            card.attached.insert((nsid, controller));
        }
    }

    /// Detaches a namespace from a controller behind everybody's back.
    pub fn detach_namespace(&self, pf: PciAddress, nsid: u32, controller: u16) {
        if let Some(card) = self.lock().nvme.get_mut(&pf) {
            card.attached.remove(&(nsid, controller));
        }
    }

    /// The controllers that have a namespace.
    #[must_use]
    pub fn controllers_of(&self, pf: PciAddress, nsid: u32) -> Vec<u16> {
        let state = self.lock();
        let all = state.nvme.get(&pf).map(|card| &card.attached);
        let all = all.into_iter().flatten();
        let of = all.filter(|(found, _)| *found == nsid);
        of.map(|(_, id)| *id).collect()
    }

    /// A guest writes these bytes to a namespace, at `offset`.
    pub fn write_namespace(&self, pf: PciAddress, nsid: u32, offset: usize, bytes: &[u8]) {
        let mut state = self.lock();
        let card = state.nvme.get_mut(&pf);
        if let Some(content) = card.and_then(|card| card.namespaces.get_mut(&nsid)) {
            let place = content.iter_mut().skip(offset);
            place.zip(bytes).for_each(|(to, from)| *to = *from);
        }
    }

    /// What is in a namespace.
    #[must_use]
    pub fn namespace(&self, pf: PciAddress, nsid: u32) -> Vec<u8> {
        let state = self.lock();
        let card = state.nvme.get(&pf);
        let content = card.and_then(|card| card.namespaces.get(&nsid));
        content.cloned().unwrap_or_default()
    }

    /// From now on a Format NVM does this.
    pub fn formats(&self, pf: PciAddress, formats: Formats) {
        if let Some(card) = self.lock().nvme.get_mut(&pf) {
            card.formats = formats;
        }
    }

    /// The host mounts a namespace as soon as it has it.
    pub fn mount(&self, pf: PciAddress, nsid: u32) {
        if let Some(card) = self.lock().nvme.get_mut(&pf) {
            card.mounted.insert(nsid);
        }
    }

    /// Somebody resets the PF's controller behind everybody's back.
    pub fn reset_controller(&self, pf: PciAddress) {
        if let Some(card) = self.lock().nvme.get_mut(&pf) {
            card.reset();
        }
    }
}

fn device_file(pf: PciAddress) -> PathBuf {
    PathBuf::from(format!("/dev/nvme{}", pf.bus()))
}

impl Nvme for FakeKernel {
    fn admin(&self, pf: PciAddress, command: &Command) -> Result<Vec<u8>, KernelError> {
        let mut state = self.lock();
        state.due_failure("admin", &device_file(pf).display().to_string())?;
        let call = match command.opcode {
            opcode::FORMAT_NVM => "format",
            opcode::NAMESPACE_ATTACHMENT if command.cdw10 == 1 => "detach",
            opcode::NAMESPACE_ATTACHMENT => "attach",
            opcode::VIRTUALIZATION_MANAGEMENT => "virtualize",
            _ => "identify",
        };
        state.due_failure(call, &device_file(pf).display().to_string())?;
        state.pf(pf)?;
        let card = state.nvme.get_mut(&pf);
        let card = card.ok_or(KernelError::NoNvmeController(pf))?;
        let mut page = Vec::new();
        let mut touched = Vec::new();
        let mut written = true;
        let done = match (command.opcode, &command.data) {
            (opcode::IDENTIFY, Data::In) => {
                let [kind, _, low, high] = command.cdw10.to_le_bytes();
                let id = u16::from_le_bytes([low, high]);
                written = false;
                card.identify(kind, id, command.nsid)
                    .map(|answer| page = answer)
            }
            (opcode::VIRTUALIZATION_MANAGEMENT, Data::None) => {
                let [act, _, low, high] = command.cdw10.to_le_bytes();
                if act == action::OFFLINE {
                    touched.push(u16::from_le_bytes([low, high]));
                }
                let count = u16::try_from(command.cdw11).unwrap_or(u16::MAX);
                card.virtualization(command.cdw10, count)
            }
            (opcode::NAMESPACE_ATTACHMENT, Data::Out(list)) => {
                let [_, _, low, high, ..] = **list;
                if command.cdw10 == 1 {
                    touched.push(u16::from_le_bytes([low, high]));
                }
                card.attachment(command.cdw10, command.nsid, list)
            }
            (opcode::FORMAT_NVM, Data::None) => {
                touched = card.touched(command.nsid);
                card.format(command.nsid, command.cdw10)
            }
            _ => Err(INVALID_OPCODE),
        };
        done.map_err(|status| KernelError::Nvme {
            pf,
            command: command.name.clone(),
            status,
        })?;
        for id in touched.into_iter().filter(|id| *id != PRIMARY) {
            let vfs = state.pfs.get(&pf).into_iter().flat_map(|pf| &pf.vfs);
            let vf = vfs.map(|vf| &vf.facts).find(|vf| vf.index + 1 == id);
            let used = vf.filter(|vf| vf.driver.as_deref() == Some(VFIO_PCI));
            if let Some(vf) = used.map(|vf| vf.address) {
                state.note_guest(vf, &command.name);
            }
        }
        if written {
            state.writes.push(Write::Nvme {
                pf,
                command: command.name.clone(),
            });
        }
        Ok(page)
    }

    fn reset(&self, pf: PciAddress) -> Result<(), KernelError> {
        let mut state = self.lock();
        state.due_failure("reset", &device_file(pf).display().to_string())?;
        if state.pf(pf)?.facts.num_vfs != 0 {
            return Err(KernelError::HasVfs(pf));
        }
        let card = state.nvme.get_mut(&pf);
        card.ok_or(KernelError::NoNvmeController(pf))?.reset();
        state.writes.push(Write::Reset(pf));
        Ok(())
    }

    fn lend(&self, pf: PciAddress, nsid: u32) -> Lent {
        if let Some(card) = self.lock().nvme.get_mut(&pf) {
            card.lent.insert(nsid);
        }
        Box::new(Loan {
            kernel: self.clone(),
            pf,
            nsid,
        })
    }

    fn open(&self, pf: PciAddress, nsid: u32) -> Result<Box<dyn Blocks>, KernelError> {
        let mut state = self.lock();
        let path = PathBuf::from(format!("/dev/nvme{}n{nsid}", pf.bus()));
        state.due_failure("open", &path.display().to_string())?;
        let card = state.nvme.get(&pf);
        let card = card.ok_or(KernelError::NoNvmeController(pf))?;
        if !card.attached.contains(&(nsid, PRIMARY)) {
            return Err(KernelError::Timeout {
                what: format!("the disk of namespace {nsid} of {pf}"),
                millis: 0,
            });
        }
        if card.mounted.contains(&nsid) {
            let source = io::Error::from_raw_os_error(libc::EBUSY);
            return Err(KernelError::file("open for nobody else", &path, source));
        }
        Ok(Box::new(Disk {
            kernel: self.clone(),
            pf,
            nsid,
        }))
    }
}

struct Loan {
    kernel: FakeKernel,
    pf: PciAddress,
    nsid: u32,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(card) = self.kernel.lock().nvme.get_mut(&self.pf) {
            card.lent.remove(&self.nsid);
        }
    }
}

struct Disk {
    kernel: FakeKernel,
    pf: PciAddress,
    nsid: u32,
}

impl Blocks for Disk {
    fn size(&self) -> u64 {
        self.kernel.namespace(self.pf, self.nsid).len() as u64
    }

    fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, KernelError> {
        let content = self.kernel.namespace(self.pf, self.nsid);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = content.get(from..from.saturating_add(length));
        part.map(<[u8]>::to_vec).ok_or_else(|| {
            let path = PathBuf::from(format!("/dev/nvme{}n{}", self.pf.bus(), self.nsid));
            KernelError::file("read", &path, io::Error::from(io::ErrorKind::UnexpectedEof))
        })
    }
}

//! The subsystem itself: what it has, and how it answers an admin command.

use std::collections::{BTreeMap, BTreeSet};

use crate::kernel::PfFacts;
use crate::kernel::nvme::{PAGE, action, cns};

use super::PRIMARY;

const BLOCK: u64 = 512;

pub(super) const INVALID_OPCODE: u16 = 0x4001;
const INVALID_FIELD: u16 = 0x4002;
const INVALID_NAMESPACE: u16 = 0x400b;
const ALREADY_ATTACHED: u16 = 0x4118;
const NOT_ATTACHED: u16 = 0x411a;
const NO_SUCH_CONTROLLER_NOW: u16 = 0x411c;
const NO_SUCH_CONTROLLER: u16 = 0x411f;
const WRONG_STATE: u16 = 0x4120;
const TOO_MANY: u16 = 0x4121;
const NOT_LEFT: u16 = 0x4122;

/// Flexible resources of one kind.
#[derive(Debug)]
struct Pool {
    total: u16,
    primary: u16,
    /// What the primary controller has from its next reset on.
    next: u16,
    most: u16,
    given: BTreeMap<u16, u16>,
}

impl Pool {
    fn of(total: u16, vfs: u16) -> Self {
        Self {
            total,
            primary: total,
            next: total,
            most: total / vfs.max(1),
            given: BTreeMap::new(),
        }
    }

    fn secondaries(&self) -> u16 {
        self.given.values().sum()
    }

    fn has(&self, id: u16) -> u16 {
        self.given.get(&id).copied().unwrap_or(0)
    }

    /// `nvme_assign_virt_res_to_sec`
    fn assign(&mut self, id: u16, count: u16) -> Result<(), u16> {
        if count > self.most {
            return Err(TOO_MANY);
        }
        let others = self.secondaries() - self.has(id) + self.primary;
        if count > self.total.saturating_sub(others) {
            return Err(NOT_LEFT);
        }
        self.given.insert(id, count);
        Ok(())
    }
}

/// What a Format NVM does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Formats {
    /// It erases.
    #[default]
    Truly,
    /// It succeeds and leaves the last block as it was.
    Not,
    /// It erases all namespaces, and the controller says so.
    All,
}

#[derive(Debug)]
pub(in super::super) struct Card {
    queues: Pool,
    interrupts: Pool,
    vfs: u16,
    total: u16,
    online: BTreeSet<u16>,
    pub(super) namespaces: BTreeMap<u32, Vec<u8>>,
    /// Namespace and controller.
    pub(super) attached: BTreeSet<(u32, u16)>,
    pub(super) lent: BTreeSet<u32>,
    pub(super) mounted: BTreeSet<u32>,
    pub(super) formats: Formats,
}

impl Card {
    pub(in super::super) fn of(facts: &PfFacts) -> Option<Self> {
        (facts.driver.as_deref() == Some("nvme")).then(|| Self {
            queues: Pool::of(2 * facts.total_vfs, facts.total_vfs),
            interrupts: Pool::of(2 * facts.total_vfs, facts.total_vfs),
            vfs: 0,
            total: facts.total_vfs,
            online: BTreeSet::new(),
            namespaces: BTreeMap::new(),
            attached: BTreeSet::new(),
            lent: BTreeSet::new(),
            mounted: BTreeSet::new(),
            formats: Formats::Truly,
        })
    }

    /// VFs are made or gone. With a VF its controller forgets its namespaces
    /// (`nvme_exit`), and all are offline.
    pub(in super::super) fn resized(&mut self, count: u16) {
        self.vfs = count;
        self.all_offline();
        self.attached.retain(|(_, id)| *id <= count);
    }

    fn all_offline(&mut self) {
        self.online.clear();
        self.queues.given.clear();
        self.interrupts.given.clear();
    }

    /// `nvme_ctrl_reset`
    pub(super) fn reset(&mut self) {
        self.all_offline();
        self.queues.primary = self.queues.next;
        self.interrupts.primary = self.interrupts.next;
    }

    pub(in super::super) fn in_use(&self) -> Option<String> {
        let own = |(nsid, id): &&(u32, u16)| *id == PRIMARY && !self.lent.contains(nsid);
        let (nsid, _) = self.attached.iter().find(own)?;
        Some(format!("the host has namespace {nsid}"))
    }

    pub(super) fn identify(&self, kind: u8, id: u16, nsid: u32) -> Result<Vec<u8>, u16> {
        let mut page = vec![0; PAGE];
        let mut put = |at: usize, bytes: &[u8]| {
            let place = page.iter_mut().skip(at);
            place.zip(bytes).for_each(|(to, from)| *to = *from);
        };
        match kind {
            cns::CONTROLLER => {
                put(78, &PRIMARY.to_le_bytes());
                put(256, &0x8a_u16.to_le_bytes());
                put(524, &[u8::from(self.formats == Formats::All)]);
            }
            cns::PRIMARY => {
                put(0, &PRIMARY.to_le_bytes());
                put(4, &[3]);
                for (at, pool) in [(32, &self.queues), (64, &self.interrupts)] {
                    put(at, &u32::from(pool.total).to_le_bytes());
                    put(at + 4, &u32::from(pool.secondaries()).to_le_bytes());
                    put(at + 8, &pool.primary.to_le_bytes());
                    put(at + 12, &pool.most.to_le_bytes());
                    put(at + 14, &[1, 0]);
                }
            }
            cns::SECONDARIES => {
                let listed = (1..=self.total).filter(|listed| *listed >= id);
                let mut count = 0;
                for (index, id) in listed.take(127).enumerate() {
                    let at = 32 * (index + 1);
                    put(at, &id.to_le_bytes());
                    put(at + 4, &[u8::from(self.online.contains(&id))]);
                    put(at + 8, &id.to_le_bytes());
                    put(at + 10, &self.queues.has(id).to_le_bytes());
                    put(at + 12, &self.interrupts.has(id).to_le_bytes());
                    count += 1;
                }
                put(0, &[count]);
            }
            cns::ALLOCATED_NAMESPACES => {
                let listed = self.namespaces.keys().filter(|listed| **listed > nsid);
                for (index, nsid) in listed.take(PAGE / 4).enumerate() {
                    put(4 * index, &nsid.to_le_bytes());
                }
            }
            cns::ALLOCATED_NAMESPACE => {
                if let Some(content) = self.namespaces.get(&nsid) {
                    put(0, &(content.len() as u64 / BLOCK).to_le_bytes());
                    put(130, &[9]);
                }
            }
            cns::ATTACHED_CONTROLLERS => {
                if !self.namespaces.contains_key(&nsid) {
                    return Err(INVALID_FIELD);
                }
                let of = |(found, _): &&(u32, u16)| *found == nsid;
                let ids: Vec<u16> = self.attached.iter().filter(of).map(|(_, id)| *id).collect();
                put(0, &u16::try_from(ids.len()).unwrap_or(0).to_le_bytes());
                for (index, id) in ids.into_iter().enumerate() {
                    put(2 * (index + 1), &id.to_le_bytes());
                }
            }
            _ => return Err(INVALID_FIELD),
        }
        Ok(page)
    }

    /// `nvme_virt_mngmt`
    pub(super) fn virtualization(&mut self, dword10: u32, count: u16) -> Result<(), u16> {
        let [act, kind, low, high] = dword10.to_le_bytes();
        let id = u16::from_le_bytes([low, high]);
        let pool = match kind {
            0 => &mut self.queues,
            1 => &mut self.interrupts,
            _ => return Err(NOT_LEFT),
        };
        if act == action::PRIMARY_ALLOCATION {
            if id != PRIMARY {
                return Err(NO_SUCH_CONTROLLER);
            }
            if count > pool.total.saturating_sub(pool.secondaries()) {
                return Err(NOT_LEFT);
            }
            pool.next = count;
            return Ok(());
        }
        if !(1..=self.total).contains(&id) {
            return Err(NO_SUCH_CONTROLLER);
        }
        match act {
            action::ASSIGN if self.online.contains(&id) => Err(WRONG_STATE),
            action::ASSIGN => pool.assign(id, count),
            action::OFFLINE => {
                self.online.remove(&id);
                self.queues.given.remove(&id);
                self.interrupts.given.remove(&id);
                Ok(())
            }
            // `nvme_virt_set_state`
            action::ONLINE if self.queues.has(id) < 2 || self.interrupts.has(id) == 0 => {
                Err(WRONG_STATE)
            }
            action::ONLINE if id > self.vfs => Err(WRONG_STATE),
            action::ONLINE => {
                self.online.insert(id);
                Ok(())
            }
            _ => Err(INVALID_FIELD),
        }
    }

    /// `nvme_ns_attachment`, of a list of one.
    pub(super) fn attachment(
        &mut self,
        select: u32,
        nsid: u32,
        page: &[u8; PAGE],
    ) -> Result<(), u16> {
        if !self.namespaces.contains_key(&nsid) {
            return Err(INVALID_FIELD);
        }
        let [1, 0, low, high, ..] = *page else {
            return Err(NO_SUCH_CONTROLLER_NOW);
        };
        let id = u16::from_le_bytes([low, high]);
        if id > self.vfs {
            return Err(NO_SUCH_CONTROLLER_NOW);
        }
        match select {
            0 if !self.attached.insert((nsid, id)) => Err(ALREADY_ATTACHED),
            1 if !self.attached.remove(&(nsid, id)) => Err(NOT_ATTACHED),
            0 | 1 => Ok(()),
            _ => Err(INVALID_FIELD),
        }
    }

    /// `nvme_format`, that of a host that wants the user data erased.
    pub(super) fn format(&mut self, nsid: u32, dword10: u32) -> Result<(), u16> {
        if !self.namespaces.contains_key(&nsid) {
            return Err(INVALID_NAMESPACE);
        }
        if !self.attached.contains(&(nsid, PRIMARY)) || dword10 != 0x200 {
            return Err(INVALID_FIELD);
        }
        for (found, content) in &mut self.namespaces {
            let all = self.formats == Formats::All;
            let keeps = if self.formats == Formats::Not { 512 } else { 0 };
            if all || *found == nsid {
                let end = content.len() - keeps;
                content.iter_mut().take(end).for_each(|byte| *byte = 0);
            }
        }
        Ok(())
    }

    /// The controllers of VFs that have this namespace, or any one if a format erases all.
    pub(super) fn touched(&self, nsid: u32) -> Vec<u16> {
        let of = |(found, id): &&(u32, u16)| {
            *id != PRIMARY && (*found == nsid || self.formats == Formats::All)
        };
        self.attached.iter().filter(of).map(|(_, id)| *id).collect()
    }
}

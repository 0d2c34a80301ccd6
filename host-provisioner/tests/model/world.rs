//! The modelled world: what the two API servers, the host's kernel, the QEMUs and the programs
//! know at one moment. Plain small values, so that millions of worlds fit into memory.
//!
//! A resourceVersion is not a number here: whoever has read an object also has the flag `fresh`,
//! which the next write by somebody else takes away. A compare-and-swap succeeds while it is
//! there. This keeps worlds equal that differ in history alone.

use common::api::ReclaimPolicy;

use crate::reclaim::Reclaim;

/// Claims in the guest cluster, by name.
pub const SLOTS: usize = 2;
/// VFs that the one PF can have.
pub const VFS: usize = 2;
/// VMs on the host.
pub const VMS: usize = 2;
/// Entries that the ledger may have: one for each claim, and one of a claim that went.
pub const HELD: usize = 3;

/// Index of a claim's name.
pub type Slot = usize;

/// One guest claim by its UID: whoever a VF's settings and traces belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Party {
    pub slot: u8,
    pub guest: u8,
}

/// A claim in the guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Guest {
    /// Its UID; a claim that is made again has the next one.
    pub uid: u8,
    pub deleting: bool,
    pub finalizer: bool,
}

/// A claim's copy on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostCopy {
    /// UID of the guest's claim that it stands for; its name is a function of it.
    pub guest: u8,
    /// Its own UID.
    pub uid: u8,
    pub deleting: bool,
    pub finalizer: bool,
    /// `status.admitted`.
    pub granted: bool,
    /// `status.hostNode` and `launcher`, which are written together: the pod.
    pub pod: Option<u8>,
    /// `status.device`: the VF's index.
    pub device: Option<u8>,
    /// `status.attachment`: the pod whose QEMU it is about.
    pub attachment: Option<u8>,
    /// Condition Ready.
    pub ready: bool,
}

/// A VF as the kernel has it; its index is its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Vf {
    /// On vfio-pci; else it has no driver.
    pub vfio: bool,
    /// Whose settings (MAC and so on) it has.
    pub settings: Option<Party>,
    /// Whose guest had it since the agent last reset it.
    pub soiled: Option<Party>,
    /// Its claim let go of it while its group was somebody else's: whoever has it keeps it, and
    /// it is cleaned when it is given again.
    pub left: bool,
    /// A QEMU that had it is gone or let it go, and the kernel has its group still open.
    pub lingers: bool,
}

/// A claim's VF that nobody gets: whose it was, by the UID of its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Withheld {
    pub slot: u8,
    pub uid: u8,
}

/// A device inside a QEMU; its id is a function of the claim's slot and guest UID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    pub guest: u8,
    pub vf: u8,
    /// The guest gave it addresses.
    pub configured: bool,
    /// The guest was asked to let it go.
    pub unplug: bool,
}

/// A VM: its present pod with one QEMU process, and what is open in that container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Vm {
    /// UID of the pod; a VM that starts again has the next one.
    pub pod: u8,
    pub dead: bool,
    pub devices: [Option<Device>; SLOTS],
    /// Bit by IOMMU group: its node and device rule are open.
    pub groups: u8,
    /// `/dev/vfio/vfio` and its rule are open, memlock is raised.
    pub container: bool,
}

/// What the agent has written, or is about to, onto a claim's copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Write {
    Device(u8),
    Attachment(u8),
    ForgetAttachment,
    ClearDevice,
    /// Device and attachment at once, of what QEMU has.
    TakeOver {
        vf: u8,
        pod: u8,
    },
}

/// A claim's VF as the agent saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VfSeen {
    pub state: VfState,
    pub configured: bool,
    pub clean: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VfState {
    Absent,
    Driverless,
    Free,
    Held,
}

/// A claim's QEMU as the agent saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QemuSeen {
    Gone,
    Absent,
    Plugged,
    Configured,
}

/// Where an agent's reconcile of one claim is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// The planner is asked next.
    Plan,
    /// A decision is sent next.
    Send(Write),
    /// The gates are open, `device_add` comes next. QEMU had `others` before.
    Opened { others: u8 },
    /// `device_add` was answered, or not; the gates are closed next.
    Added { others: u8, outcome: Outcome },
    /// `device_del` was sent.
    Unplugging,
    /// The gates are closed, the VF is cleaned next.
    Cleaning,
}

/// How the agent takes a `device_add` to have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Done,
    Refused,
    /// No answer, and none to the question what became of it.
    Unknown,
}

/// An agent's reconcile of one claim, with the claim as it was read and the facts so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Walk {
    pub claim: HostCopy,
    pub fresh: bool,
    /// The ledger says that another claim has its VF.
    pub doubled: bool,
    pub vf: Option<VfSeen>,
    pub qemu: Option<QemuSeen>,
    /// Whether QEMU has its device though it records none, and on which VF.
    pub left: Option<Option<u8>>,
    pub at: At,
    /// It has the VM's turn.
    pub turn: bool,
    pub reclaim: Reclaim,
}

/// An entry of the agent's ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Held {
    pub slot: u8,
    /// UID of the host's copy, and of the guest's claim.
    pub uid: u8,
    pub guest: u8,
    pub vf: u8,
    pub pod: Option<u8>,
    /// An attachment is recorded.
    pub port: bool,
    /// `unanswered` is the copy's present resourceVersion: the write may land yet.
    pub may_land: bool,
}

/// How far the agent's process is. There is one at most: the lock keeps a second one out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Process {
    #[default]
    Down,
    /// It has the lock and the ledger, filled from a consistent LIST.
    Filled,
    /// Gates that a predecessor left are closed.
    Serving,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Agent {
    pub process: Process,
    /// Sorted, so that equal ledgers are equal.
    pub ledger: [Option<Held>; HELD],
    pub walks: [Option<Walk>; SLOTS],
}

/// Where the controller is with a claim. It keeps nothing between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Controller {
    #[default]
    Idle,
    /// What its caches showed: they may be behind by now.
    Read {
        copy: HostCopy,
        fresh: bool,
        /// The VM's running pod.
        pod: Option<u8>,
    },
    /// The finalizer is on, the decision of the same plan comes next.
    Finalized {
        copy: HostCopy,
        fresh: bool,
        pod: Option<u8>,
    },
}

/// Where the guest-syncer is with a claim. It keeps nothing between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Syncer {
    #[default]
    Idle,
    /// A living claim, and its copy as the cache had it.
    Lift {
        guest: Guest,
        fresh: bool,
        copy: Option<HostCopy>,
    },
    /// A claim that is being deleted; the host is asked next.
    Ask { guest: Guest, fresh: bool },
    /// The host had this copy; it is deleted next, if it still is this one.
    Delete { guest: Guest, fresh: bool, uid: u8 },
    /// The host has none; the finalizer goes next.
    LetGo { guest: Guest, fresh: bool },
}

/// How often things may still go wrong, or a person do something, in this history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Kills of the agent.
    pub kills: u8,
    /// Answers to the agent that get lost: of the API server, of QEMU.
    pub lost: u8,
    /// Deaths of a QEMU.
    pub deaths: u8,
    /// Times that a foreign process takes a group.
    pub foreign: u8,
    /// Deletions of a guest's claim, by slot.
    pub deletes: [u8; SLOTS],
    /// Claims made again under a name, by slot.
    pub remakes: [u8; SLOTS],
    /// Deletions of a host's copy by its administrator.
    pub copies: u8,
    /// Copies that are taken away with all their finalizers.
    pub torn: u8,
}

/// A rule that was broken by a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Breach {
    InUseStays,
    IntentFirst,
    OneToOne,
    UnplugWaits,
    CleanHandover,
    NoDeathByAbsence,
    ReclaimKeeps,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub guests: [Option<Guest>; SLOTS],
    pub copies: [Option<HostCopy>; SLOTS],
    /// UIDs that were given to guests' claims and to copies.
    pub guest_uids: [u8; SLOTS],
    pub copy_uids: [u8; SLOTS],
    /// Writes of an agent that were sent and may land yet.
    pub wire: [Option<Write>; SLOTS],
    /// The PF has its VFs.
    pub vfs_made: bool,
    pub vfs: [Vf; VFS],
    /// `spec.withheld`, by VF.
    pub withheld: [Option<Withheld>; VFS],
    /// `status.resize`: of each slot's copies, the last one whose destroyed VF has gone.
    pub settled: [Option<u8>; SLOTS],
    /// Bit by IOMMU group: a process that is none of ours has it open.
    pub foreign: u8,
    pub vms: [Vm; VMS],
    pub agent: Agent,
    pub controllers: [Controller; SLOTS],
    pub syncers: [Syncer; SLOTS],
    pub budget: Budget,
    pub breach: Option<Breach>,
}

/// What is the same in all histories of one world.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Claims in use: 1 or 2.
    pub claims: usize,
    /// VFs that the PF can have: 1 or 2.
    pub total_vfs: u8,
    /// IOMMU group of each VF.
    pub group_of: [u8; VFS],
    /// VM of each claim.
    pub vm_of: [usize; SLOTS],
    /// Controller and guest-syncer read and write in steps of their own; else each look and
    /// what follows from it are one step.
    pub stepwise: bool,
    /// What becomes of the VFs of all claims.
    pub reclaim: ReclaimPolicy,
    pub budget: Budget,
}

impl Setting {
    /// The slots in use.
    pub fn slots(&self) -> std::ops::Range<Slot> {
        0..self.claims
    }

    pub fn group(&self, vf: u8) -> u8 {
        self.group_of[usize::from(vf)]
    }

    /// Whether two VFs are in one IOMMU group.
    pub fn shares_a_group(&self) -> bool {
        self.total_vfs > 1 && self.group_of[0] == self.group_of[1]
    }

    /// How many claims can be counted on to be attached at once. Two VFs of one group can be
    /// one VM's, when both are ready before the first is plugged in.
    pub fn attachable(&self) -> usize {
        if self.shares_a_group() {
            1
        } else {
            usize::from(self.total_vfs)
        }
    }

    pub fn start(&self) -> World {
        let guest = |slot: Slot| {
            (slot < self.claims).then_some(Guest {
                uid: 0,
                deleting: false,
                finalizer: false,
            })
        };
        World {
            guests: [guest(0), guest(1)],
            copies: [None; SLOTS],
            guest_uids: [1; SLOTS],
            copy_uids: [0; SLOTS],
            wire: [None; SLOTS],
            vfs_made: false,
            vfs: [Vf::default(); VFS],
            withheld: [None; VFS],
            settled: [None; SLOTS],
            foreign: 0,
            vms: [Vm::default(); VMS],
            agent: Agent::default(),
            controllers: [Controller::Idle; SLOTS],
            syncers: [Syncer::Idle; SLOTS],
            budget: self.budget,
            breach: None,
        }
    }
}

impl World {
    /// Keeps the first breach: what follows from it is no news.
    pub fn broke(&mut self, breach: Breach) {
        self.breach.get_or_insert(breach);
    }

    pub fn party(slot: Slot, guest: u8) -> Party {
        Party {
            slot: u8::try_from(slot).unwrap(),
            guest,
        }
    }

    pub fn vf(&self, vf: u8) -> &Vf {
        &self.vfs[usize::from(vf)]
    }

    pub fn vf_mut(&mut self, vf: u8) -> &mut Vf {
        &mut self.vfs[usize::from(vf)]
    }

    /// The devices in running QEMUs: VM, slot, device.
    pub fn devices(&self) -> impl Iterator<Item = (usize, Slot, Device)> + '_ {
        self.vms.iter().enumerate().flat_map(|(vm, of)| {
            let devices = of.devices.iter().enumerate();
            devices.filter_map(move |(slot, device)| device.map(|device| (vm, slot, device)))
        })
    }

    /// Whether a QEMU, or what a QEMU left in the kernel, has this very VF.
    pub fn in_use(&self, vf: u8) -> bool {
        self.vf(vf).lingers || self.devices().any(|(_, _, device)| device.vf == vf)
    }

    pub fn foreign_has(&self, group: u8) -> bool {
        self.foreign & (1 << group) != 0
    }

    /// Whether opening the group answers EBUSY.
    pub fn held(&self, setting: &Setting, group: u8) -> bool {
        self.foreign_has(group)
            || (0..setting.total_vfs).any(|vf| setting.group(vf) == group && self.in_use(vf))
    }

    /// A copy was written by somebody: what others read of it is no longer the newest.
    pub fn written(&mut self, slot: Slot) {
        if let Some(walk) = &mut self.agent.walks[slot] {
            walk.fresh = false;
        }
        match &mut self.controllers[slot] {
            Controller::Read { fresh, .. } | Controller::Finalized { fresh, .. } => *fresh = false,
            Controller::Idle => {}
        }
        for held in self.agent.ledger.iter_mut().flatten() {
            if usize::from(held.slot) == slot {
                held.may_land = false;
            }
        }
        // It was sent with an older resourceVersion: it will be refused.
        self.wire[slot] = None;
    }

    /// A copy that is being deleted and has no finalizer is gone.
    pub fn reap(&mut self, slot: Slot) {
        if self.copies[slot].is_some_and(|copy| copy.deleting && !copy.finalizer) {
            self.copies[slot] = None;
        }
    }

    /// The present pod of a VM with a QEMU that runs.
    pub fn running(&self, vm: usize) -> Option<u8> {
        let vm = &self.vms[vm];
        (!vm.dead).then_some(vm.pod)
    }
}

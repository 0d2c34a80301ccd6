//! What becomes of a VF whose claim goes and that does not go back to the pool: the controller's
//! entry, the agent's change of the count, and the administrator who gives a retained VF back.
//! What is decided is asked of the project's own planners.

use common::api::{ReclaimPolicy, WithheldReason, WithheldVf};
use host_provisioner::node::pool::{Resize, resize};

use crate::facts;
use crate::world::{Breach, HostCopy, Process, Setting, Slot, Vf, Withheld, World};

/// What an agent knows of the reclaim of a claim's VF as it begins with the claim.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reclaim {
    pub policy: ReclaimPolicy,
    pub withheld: bool,
    pub withheld_from_it: bool,
}

pub fn seen(setting: &Setting, world: &World, slot: Slot, copy: &HostCopy) -> Reclaim {
    let entry = copy.device.and_then(|vf| world.withheld[usize::from(vf)]);
    Reclaim {
        policy: setting.reclaim,
        // One world has one policy, so each entry is for the reason that is asked for.
        withheld: setting.reclaim != ReclaimPolicy::Return
            && (entry.is_some() || world.settled[slot] == Some(copy.uid)),
        withheld_from_it: entry.is_some_and(|entry| entry != of(slot, copy)),
    }
}

fn of(slot: Slot, copy: &HostCopy) -> Withheld {
    Withheld {
        slot: u8::try_from(slot).unwrap(),
        uid: copy.uid,
    }
}

/// `spec.withheld`.
pub fn entries(setting: &Setting, world: &World) -> Vec<WithheldVf> {
    let reason = setting
        .reclaim
        .withholds()
        .unwrap_or(WithheldReason::Retained);
    let entries = world.withheld.iter().zip(0_u16..);
    entries
        .filter_map(|(entry, vf_index)| {
            let entry = (*entry)?;
            Some(WithheldVf {
                vf_index,
                reason,
                claim: facts::reference(usize::from(entry.slot), entry.uid),
            })
        })
        .collect()
}

/// The controller enters the VF of a copy that it saw on its way out. It reads the copy again,
/// after the PhysicalFunction, and the write is refused when that changed meanwhile.
pub fn withhold(world: &mut World, slot: Slot, seen: &HostCopy) {
    let (Some(vf), Some(now)) = (seen.device, world.copies[slot]) else {
        return;
    };
    if world.settled[slot] == Some(seen.uid) {
        return;
    }
    let entry = &mut world.withheld[usize::from(vf)];
    if now.uid == seen.uid && now.deleting && now.device == seen.device && entry.is_none() {
        *entry = Some(of(slot, &now));
    }
}

/// A claim's record goes for good: unless another claim has its VF, nobody may get it.
pub fn let_go(setting: &Setting, world: &mut World, slot: Slot, copy: &HostCopy) {
    let Some(vf) = copy.device.filter(|_| copy.deleting) else {
        return;
    };
    let others = setting.slots().filter(|other| *other != slot);
    let another = others
        .filter_map(|other| world.copies[other])
        .any(|other| other.device == Some(vf));
    let gone = world.settled[slot] == Some(copy.uid);
    let kept = another || gone || world.withheld[usize::from(vf)].is_some();
    if setting.reclaim != ReclaimPolicy::Return && !kept {
        world.broke(Breach::ReclaimKeeps);
    }
}

/// Something is written to a VF for a claim: it is not one that is withheld from it, nor its
/// own that is to stay as it is.
pub fn touched(setting: &Setting, world: &mut World, slot: Slot, copy: &HostCopy, vf: u8) {
    let entry = world.withheld[usize::from(vf)];
    let from_it = entry.is_some_and(|entry| entry != of(slot, copy));
    if from_it || (copy.deleting && setting.reclaim == ReclaimPolicy::Retain) {
        world.broke(Breach::ReclaimKeeps);
    }
}

/// The agent takes the destroyed VF away when nobody has any, and the controller takes its entry
/// out. The VFs are made again when a claim needs them.
pub fn resize_idle(setting: &Setting, world: &mut World) -> bool {
    if world.agent.process != Process::Serving {
        return false;
    }
    let mut ledger = facts::ledger(setting, &world.agent.ledger);
    let change = match resize(&facts::view(setting, world, &ledger)) {
        Resize::Keep | Resize::Pending { .. } => return false,
        Resize::Settle(change) => {
            let gone = change.status(true).destroyed;
            settle(world, |entry| gone.contains(&entry));
            return true;
        }
        Resize::Apply(change) => change,
    };
    if !ledger.begin_resize(facts::PF) {
        return false;
    }
    assert_eq!(change.to, 0, "the worlds with Destroy have one VF");
    // A copy may name one all the same: a dead agent's choice, for which nothing was done.
    if (0..setting.total_vfs).any(|vf| world.held(setting, setting.group(vf))) {
        world.broke(Breach::InUseStays);
    }
    world.vfs_made = false;
    world.vfs.fill(Vf::default());
    settle(world, |_| true);
    true
}

/// The entries of these claims are taken out, and it is recorded that their VFs have gone.
fn settle(world: &mut World, gone: impl Fn(String) -> bool) {
    for entry in &mut world.withheld {
        let claim = |entry: &Withheld| facts::reference(usize::from(entry.slot), entry.uid);
        if let Some(entry) = entry.take_if(|entry| gone(claim(entry).uid)) {
            world.settled[usize::from(entry.slot)] = Some(entry.uid);
        }
    }
}

/// An administrator takes the entry of a retained VF out, once its claim is gone.
pub fn give_back(setting: &Setting, world: &mut World, vf: u8) -> bool {
    let at = usize::from(vf);
    let named = world.copies.iter().flatten().any(|c| c.device == Some(vf));
    if setting.reclaim != ReclaimPolicy::Retain || named || world.withheld[at].take().is_none() {
        return false;
    }
    // It is as its last holder left it, and reset before anybody gets it.
    world.vf_mut(vf).left = true;
    true
}

//! The controller and the guest-syncer: both plan from what their caches showed, which may be
//! behind, and write with the resourceVersion or UID that they saw. Neither remembers anything
//! between two looks, so a kill of one, or an answer that it loses, is a look that is not
//! followed by anything: it is covered by the interleavings.

use guest_syncer::mirror::up::Release;

use crate::cluster_facts::{self as facts, Due};
use crate::reclaim;
use crate::world::{Breach, Controller, Guest, HostCopy, Setting, Slot, Syncer, World};

/// One step of the controller on a copy. False: there is none.
pub fn controller(setting: &Setting, world: &mut World, slot: Slot) -> bool {
    match world.controllers[slot] {
        Controller::Idle => {
            let Some(copy) = world.copies[slot] else {
                return false;
            };
            let pod = world.running(setting.vm_of[slot]);
            let settled = world.settled[slot] == Some(copy.uid);
            let withheld = |vf: u8| settled || world.withheld[usize::from(vf)].is_some();
            match facts::controller_due(setting, slot, &copy, pod) {
                Due::Nothing => return false,
                Due::Withhold if copy.device.is_some_and(withheld) => return false,
                _ => {}
            }
            let fresh = true;
            world.controllers[slot] = Controller::Read { copy, fresh, pod };
        }
        Controller::Read { copy, fresh, pod } => {
            world.controllers[slot] = Controller::Idle;
            match facts::controller_due(setting, slot, &copy, pod) {
                Due::Nothing => {}
                Due::Release => release(world, slot, fresh),
                Due::Withhold => reclaim::withhold(world, slot, &copy),
                Due::Write {
                    finalizer: true, ..
                } => finalize(world, slot, copy, fresh, pod),
                Due::Write { decision, .. } => decide(world, slot, fresh, decision),
            }
        }
        Controller::Finalized { copy, fresh, pod } => {
            world.controllers[slot] = Controller::Idle;
            if let Due::Write { decision, .. } = facts::controller_due(setting, slot, &copy, pod) {
                decide(world, slot, fresh, decision);
            }
        }
    }
    true
}

/// The finalizer goes: the VF must be back.
fn release(world: &mut World, slot: Slot, fresh: bool) {
    if !fresh {
        return;
    }
    let Some(copy) = &mut world.copies[slot] else {
        return;
    };
    let back = copy.device.is_none() && copy.attachment.is_none();
    copy.finalizer = false;
    if !back {
        world.broke(Breach::UnplugWaits);
    }
    world.written(slot);
    world.reap(slot);
}

/// The finalizer comes, then the rest of the same plan.
fn finalize(world: &mut World, slot: Slot, mut seen: HostCopy, fresh: bool, pod: Option<u8>) {
    // The API server takes no new finalizer onto what is being deleted.
    let now = world.copies[slot].filter(|now| fresh && !now.deleting);
    if let Some(mut now) = now {
        now.finalizer = true;
        seen.finalizer = true;
        world.written(slot);
        world.copies[slot] = Some(now);
        world.controllers[slot] = Controller::Finalized {
            copy: seen,
            fresh: true,
            pod,
        };
    }
}

fn decide(world: &mut World, slot: Slot, fresh: bool, decision: Option<HostCopy>) {
    if let (true, Some(decided), Some(mut now)) = (fresh, decision, world.copies[slot]) {
        (now.granted, now.pod) = (decided.granted, decided.pod);
        world.written(slot);
        world.copies[slot] = Some(now);
    }
}

/// One step of the guest-syncer on a guest's claim. False: there is none.
pub fn syncer(setting: &Setting, world: &mut World, slot: Slot) -> bool {
    match world.syncers[slot] {
        Syncer::Idle => return look(setting, world, slot),
        Syncer::Lift { guest, fresh, copy } => lift(setting, world, slot, guest, fresh, copy),
        Syncer::Ask { guest, fresh } => ask(setting, world, slot, guest, fresh),
        Syncer::Delete { guest, fresh, uid } => {
            delete(world, slot, guest.uid, uid);
            world.syncers[slot] = Syncer::Ask { guest, fresh };
        }
        Syncer::LetGo { guest, fresh } => {
            world.syncers[slot] = Syncer::Idle;
            if fresh {
                let gone = world.copies[slot].is_none_or(|copy| copy.guest != guest.uid);
                if !gone {
                    world.broke(Breach::NoDeathByAbsence);
                }
                world.guests[slot] = None;
            }
        }
    }
    true
}

/// What the caches show of a claim and its copy.
fn look(setting: &Setting, world: &mut World, slot: Slot) -> bool {
    let Some(guest) = world.guests[slot] else {
        return false;
    };
    let fresh = true;
    let copy = world.copies[slot].filter(|copy| copy.guest == guest.uid);
    let next = match guest {
        Guest {
            deleting: true,
            finalizer: false,
            ..
        } => return false,
        Guest { deleting: true, .. } => Syncer::Ask { guest, fresh },
        _ => Syncer::Lift { guest, fresh, copy },
    };
    let idle = |copy: &HostCopy| {
        guest.finalizer && !facts::syncer_creates(setting, slot, &guest, Some(copy))
    };
    if matches!(next, Syncer::Lift { .. }) && copy.as_ref().is_some_and(idle) {
        return false;
    }
    world.syncers[slot] = next;
    true
}

/// The way up: the finalizer first, then the copy.
fn lift(
    setting: &Setting,
    world: &mut World,
    slot: Slot,
    mut guest: Guest,
    fresh: bool,
    copy: Option<HostCopy>,
) {
    world.syncers[slot] = Syncer::Idle;
    if !guest.finalizer {
        let now = world.guests[slot]
            .as_mut()
            .filter(|now| fresh && !now.deleting);
        if let Some(now) = now {
            now.finalizer = true;
            guest.finalizer = true;
            world.syncers[slot] = Syncer::Lift { guest, fresh, copy };
        }
        return;
    }
    // The name is taken by an earlier copy: the API server says so, and it is looked at again.
    if facts::syncer_creates(setting, slot, &guest, copy.as_ref()) && world.copies[slot].is_none() {
        let uid = world.copy_uids[slot];
        world.copy_uids[slot] += 1;
        world.copies[slot] = Some(HostCopy {
            guest: guest.uid,
            uid,
            deleting: false,
            finalizer: false,
            granted: false,
            pod: None,
            device: None,
            attachment: None,
            ready: false,
        });
    }
}

/// The host itself is asked about the copy of a claim that is being deleted.
fn ask(setting: &Setting, world: &mut World, slot: Slot, guest: Guest, fresh: bool) {
    let found = world.copies[slot].filter(|copy| copy.guest == guest.uid);
    world.syncers[slot] = match facts::syncer_release(setting, slot, &guest, found.as_ref()) {
        Release::LetGo | Release::LeaveForeign(_) => Syncer::LetGo { guest, fresh },
        Release::AwaitGone => Syncer::Idle,
        Release::Delete => match found {
            Some(HostCopy { uid, .. }) => Syncer::Delete { guest, fresh, uid },
            None => Syncer::Idle,
        },
    };
}

/// A DELETE with the UID that was seen.
fn delete(world: &mut World, slot: Slot, guest: u8, uid: u8) {
    let Some(copy) = &mut world.copies[slot] else {
        return;
    };
    if (copy.guest, copy.uid) != (guest, uid) || copy.deleting {
        return;
    }
    copy.deleting = true;
    let lives = world.guests[slot].is_some_and(|now| now.uid == guest && !now.deleting);
    if lives {
        world.broke(Breach::NoDeathByAbsence);
    }
    world.written(slot);
    world.reap(slot);
}

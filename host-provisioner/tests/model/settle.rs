//! That all ends well: from every world that is reached, with nothing going wrong any more,
//! claims come to be attached and deleted ones to be gone, and nothing is left over.
//!
//! A plain "eventually" would also ask it of histories in which a program is never given a
//! turn. Here everybody gets one, in a fixed order, until nobody has anything left to do.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use crate::agent::{self, Luck};
use crate::checker::{Action, Checked, happen};
use crate::world::{Controller, Process, Setting, Slot, Syncer, World};

/// More than any world needs; a world that needs more goes round in circles.
const TURNS: usize = 200;
const STEPS: usize = 60;

fn key(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

/// Whether the world ends well.
pub fn ends_well(checked: &Checked, world: &World) -> bool {
    let setting = &checked.setting;
    let mut world = *world;
    let mut path = Vec::new();
    for _ in 0..TURNS {
        let key = key(&world);
        if checked.well.lock().unwrap().contains(&key) {
            checked.well.lock().unwrap().extend(path);
            return true;
        }
        path.push(key);
        let Some(next) = turn(setting, &world) else {
            let well = complaint(setting, &world).is_none();
            if well {
                checked.well.lock().unwrap().extend(path);
            }
            return well;
        };
        world = next;
    }
    false
}

/// How a world ends, in words, and what is wrong with it.
pub fn explain(setting: &Setting, world: &World) -> String {
    let mut world = *world;
    for _ in 0..TURNS {
        match turn(setting, &world) {
            Some(next) => world = next,
            None => {
                let complaint = complaint(setting, &world);
                let wrong = complaint.unwrap_or_else(|| "nothing is wrong".into());
                return format!("{wrong}: {world:?}");
            }
        }
    }
    format!("it goes round in circles: {world:?}")
}

/// The next thing that somebody does, when nothing goes wrong; `None`: all is done.
fn turn(setting: &Setting, world: &World) -> Option<World> {
    let done = |action: Action| {
        let mut next = *world;
        (happen(setting, &mut next, action) && next != *world).then_some(next)
    };
    let slots = || setting.slots();
    let vms = 0..world.vms.len();
    let by_itself = (slots().map(Action::RequestLands))
        .chain((0..setting.total_vfs).map(Action::KernelLetsGo))
        .chain((0..setting.total_vfs).map(Action::StrangerCloses))
        .chain([Action::AgentStarts, Action::AgentRecovers])
        .chain([Action::AgentResizes])
        .chain((0..setting.total_vfs).map(Action::AdministratorGivesBack))
        .chain(vms.map(Action::VmRunsAgain))
        .chain(slots().flat_map(|slot| guests(setting, slot)))
        .chain(slots().map(|slot| Action::AgentSteps(slot, Luck::Answered)));
    let under_way = |slot: &Slot| {
        let controller = world.controllers[*slot] != Controller::Idle;
        let syncer = world.syncers[*slot] != Syncer::Idle;
        let controller = controller.then_some(Action::ControllerSteps(*slot));
        controller.or(syncer.then_some(Action::SyncerSteps(*slot)))
    };
    let by_itself = by_itself.chain(slots().filter_map(|slot| under_way(&slot)));
    if let Some(next) = by_itself.into_iter().find_map(done) {
        return Some(next);
    }
    // Everybody rests. Who begins anew must come to a change, else it has nothing to do.
    let begin = slots().flat_map(|slot| {
        [
            Action::SyncerSteps(slot),
            Action::ControllerSteps(slot),
            Action::AgentFollowsUp(slot),
            Action::AgentFetches(slot),
        ]
    });
    begin.into_iter().find_map(|action| {
        let mut next = done(action)?;
        finish(setting, &mut next, action);
        (next != *world).then_some(next)
    })
}

fn guests(setting: &Setting, slot: Slot) -> [Action; 2] {
    let vm = setting.vm_of[slot];
    [
        Action::GuestUnplugs {
            vm,
            slot,
            lingers: false,
        },
        Action::GuestConfigures(vm, slot),
    ]
}

/// Brings what `action` began to its end, without anything in between.
pub fn finish(setting: &Setting, world: &mut World, action: Action) {
    for _ in 0..STEPS {
        let goes_on = match action {
            Action::SyncerSteps(slot) => {
                world.syncers[slot] != Syncer::Idle
                    && happen(setting, world, Action::SyncerSteps(slot))
            }
            Action::ControllerSteps(slot) => {
                world.controllers[slot] != Controller::Idle
                    && happen(setting, world, Action::ControllerSteps(slot))
            }
            Action::AgentFetches(slot) => {
                world.agent.walks[slot].is_some()
                    && !agent::waits_for_turn(setting, world, slot)
                    && {
                        guests(setting, slot).into_iter().for_each(|action| {
                            happen(setting, world, action);
                        });
                        happen(setting, world, Action::AgentSteps(slot, Luck::Answered))
                    }
            }
            _ => false,
        };
        if !goes_on {
            return;
        }
    }
}

/// What is wrong with a world in which nobody has anything left to do.
fn complaint(setting: &Setting, world: &World) -> Option<String> {
    let mut ready = 0;
    let mut living = 0;
    for slot in setting.slots() {
        let (guest, copy) = (world.guests[slot], world.copies[slot]);
        let Some(guest) = guest else {
            if copy.is_some() {
                return Some(format!("claim {slot} is gone and its copy is not"));
            }
            continue;
        };
        let waits = waits_for_group(setting, world, slot);
        if guest.deleting && waits {
            continue;
        }
        if guest.deleting {
            return Some(format!("claim {slot} is deleted and does not go"));
        }
        living += 1;
        let Some(copy) = copy.filter(|copy| copy.guest == guest.uid && !copy.deleting) else {
            return Some(format!("claim {slot} has no copy"));
        };
        if copy.ready {
            let device = world.vms[setting.vm_of[slot]].devices[slot];
            let attached = device.is_some_and(|device| {
                device.configured && device.guest == guest.uid && Some(device.vf) == copy.device
            });
            if !attached {
                return Some(format!("claim {slot} is ready and not attached"));
            }
            ready += 1;
        } else if copy.device.is_some() && !waits {
            return Some(format!("claim {slot} has a VF and is not ready"));
        }
    }
    if ready < living.min(setting.attachable()) {
        return Some(format!("{ready} of {living} claims are ready"));
    }
    left_over(setting, world)
}

/// Whether the claim's VF is in a group that a QEMU has through another VF of it: until that
/// one goes the group does not open, and nothing is done to the VF.
fn waits_for_group(setting: &Setting, world: &World, slot: Slot) -> bool {
    let device = world.copies[slot].and_then(|copy| copy.device);
    let mut others = world.devices().filter(|(_, other, _)| *other != slot);
    device.is_some_and(|vf| {
        let same_group = |other: u8| other != vf && setting.group(other) == setting.group(vf);
        others.any(|(_, _, device)| same_group(device.vf))
    })
}

/// What a world at rest has that nobody needs.
fn left_over(setting: &Setting, world: &World) -> Option<String> {
    for vf in 0..setting.total_vfs {
        let of = world.vf(vf);
        let claimed = world
            .copies
            .iter()
            .flatten()
            .any(|copy| copy.device == Some(vf));
        let dirty = of.vfio || of.settings.is_some() || of.soiled.is_some();
        if !claimed && dirty && !of.left {
            return Some(format!("VF {vf} is nobody's and not clean"));
        }
    }
    for (vm, of) in world.vms.iter().enumerate() {
        if of.groups != 0 {
            return Some(format!("VM {vm} has a group's gates open"));
        }
        if of.container != of.devices.iter().any(Option::is_some) {
            return Some(format!(
                "VM {vm}: the container's gates are not as its devices need"
            ));
        }
    }
    let right = |held: &crate::world::Held| {
        world.copies[usize::from(held.slot)]
            .is_some_and(|copy| copy.uid == held.uid && copy.device == Some(held.vf))
    };
    if !world.agent.ledger.iter().flatten().all(right) {
        return Some("the ledger holds a VF for nobody".into());
    }
    debug_assert_eq!(world.agent.process, Process::Serving);
    None
}

//! The node agent: the project's planner says what comes next, this walks a claim through it as
//! `reconcile` does. Decisions are compare-and-swap, and turns are taken.

use host_provisioner::node::ledger::Answer;
use host_provisioner::node::plan::{
    Added, ClaimFacts, Close, InQemu, Left, Qemu, Seen, Service, Step, Vf, VfSeen, close_after_add,
    next_step,
};

use crate::decisions::land;
use crate::facts::{self, NODE, pod_uid};
use crate::host::{
    close_gates, device_add, free_to_touch, in_qemu, left_in_qemu, look_at_qemu, look_at_vf,
    open_gates, ordered, prepare, reserved, vm_pod,
};
use crate::reclaim;
use crate::world::{
    At, HostCopy, Outcome, Process, QemuSeen, Setting, Slot, VfSeen as Looked, VfState, Walk,
    World, Write,
};

/// How a step that asks somebody else ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Luck {
    Answered,
    /// It was done, and the answer is lost.
    Done,
    /// The answer is lost, and it was not done: not yet, where it may still land.
    NotDone,
}

fn claim_facts(walk: &Walk) -> ClaimFacts {
    let copy = &walk.claim;
    ClaimFacts {
        doubled: walk.doubled,
        deleting: copy.deleting,
        bound: copy.granted && copy.pod.is_some(),
        device: copy.device.is_some(),
        attachment: copy.attachment.is_some(),
        reported: copy.ready,
        reclaim: walk.reclaim.policy,
        withheld: walk.reclaim.withheld,
        withheld_from_it: walk.reclaim.withheld_from_it,
        storage: false,
    }
}

fn seen(walk: &Walk) -> Seen {
    Seen {
        vf: walk.vf.map(|seen| VfSeen {
            vf: match seen.state {
                VfState::Absent => Vf::Absent,
                VfState::Driverless => Vf::Driverless,
                VfState::Free => Vf::VfioFree,
                VfState::Held => Vf::VfioHeld,
            },
            configured: seen.configured,
            clean: seen.clean,
        }),
        qemu: walk.qemu.map(|seen| match seen {
            QemuSeen::Gone => Qemu::Gone,
            QemuSeen::Absent => Qemu::Running(InQemu::Absent),
            QemuSeen::Plugged => Qemu::Running(InQemu::Plugged),
            QemuSeen::Configured => Qemu::Running(InQemu::Configured("0000:05:00.0".into())),
        }),
        // Nobody changes a VF in use here.
        service: Some(Service::AsGranted),
        left: walk.left.map(|found| match found {
            Some(_) => Left::Device,
            None => Left::Nothing,
        }),
    }
}

/// The planner's next step for a walk.
pub fn planned(walk: &Walk) -> Step {
    next_step(claim_facts(walk), &seen(walk))
}

/// What the agent is about with a claim, for a trace.
pub fn about(world: &World, slot: Slot) -> String {
    match world.agent.walks[slot] {
        None => "nothing".into(),
        Some(walk) if walk.at == At::Plan => format!("{:?}", planned(&walk)),
        Some(walk) => format!("{:?}", walk.at),
    }
}

/// The lock is taken and the ledger filled from a consistent LIST of this node's claims.
pub fn start(setting: &Setting, world: &mut World) {
    world.agent.process = Process::Filled;
    facts::fill(setting, world);
}

/// Gates that a dead predecessor left open are closed, all but what attached VFs need.
pub fn recover(setting: &Setting, world: &mut World) {
    world.agent.process = Process::Serving;
    let ledger = facts::ledger(setting, &world.agent.ledger);
    for (vm, of) in world.vms.iter_mut().enumerate() {
        of.groups = 0;
        let attached = ledger.attached_in(&pod_uid(vm, of.pod)) > 0;
        // `qemu::may_have_ours`: a claim may have been torn off a device that is in use.
        let has = of.devices.iter().any(Option::is_some);
        of.container &= (attached || has) && !of.dead;
    }
}

/// The process ends: what it knew and what it was about to do is lost.
pub fn kill(world: &mut World) {
    world.agent = crate::world::Agent::default();
}

/// Killed in the middle of a step: a decision is on its way, a VF is half done.
pub fn kill_within(setting: &Setting, world: &mut World, slot: Slot) -> bool {
    let Some(walk) = world.agent.walks[slot] else {
        return false;
    };
    match walk.at {
        At::Send(write) if walk.fresh => world.wire[slot] = Some(write),
        At::Cleaning => {
            let Some(vf) = free_to_touch(setting, world, slot, &walk.claim) else {
                return false;
            };
            world.vf_mut(vf).settings = None;
        }
        At::Plan if planned(&walk) == Step::Prepare => {
            let Some(vf) = free_to_touch(setting, world, slot, &walk.claim) else {
                return false;
            };
            // Settings come after the reset, and before the binding.
            let vfio = world.vf(vf).vfio;
            prepare(world, slot, &walk.claim, vf);
            world.vf_mut(vf).vfio = vfio;
        }
        _ => return false,
    }
    kill(world);
    true
}

/// Whether a reconcile of the claim can begin: the watch has it, and nobody is at it.
pub fn may_fetch(world: &World, slot: Slot) -> bool {
    world.agent.process == Process::Serving
        && world.agent.walks[slot].is_none()
        && world.copies[slot].is_some_and(|copy| copy.pod.is_some())
}

/// Begins a reconcile: the claim is read and told to the ledger.
pub fn fetch(setting: &Setting, world: &mut World, slot: Slot) {
    let Some(copy) = world.copies[slot] else {
        return;
    };
    if asked(setting, world, slot, copy) != Answer::Mine {
        return;
    }
    let doubled = facts::observe(setting, world, slot, &copy, true).is_err();
    world.agent.walks[slot] = Some(Walk {
        claim: copy,
        fresh: true,
        doubled,
        vf: None,
        qemu: None,
        left: None,
        at: At::Plan,
        turn: false,
        reclaim: reclaim::seen(setting, world, slot, &copy),
    });
    end_if_idle(world, slot);
}

/// Whether the ledger has a claim that the watch no longer shows.
pub fn may_follow_up(world: &World, slot: Slot) -> bool {
    world.agent.process == Process::Serving
        && world.agent.walks[slot].is_none()
        && lost_sight(world, slot).is_some()
}

fn lost_sight(world: &World, slot: Slot) -> Option<crate::world::Held> {
    let shown = world.copies[slot].filter(|copy| copy.pod.is_some());
    let held = world.agent.ledger.into_iter().flatten();
    held.into_iter()
        .filter(|held| usize::from(held.slot) == slot)
        .find(|held| shown.is_none_or(|copy| copy.uid != held.uid))
}

/// The API server is asked about a claim that the watch no longer shows.
pub fn follow_up(setting: &Setting, world: &mut World, slot: Slot) {
    if let Some(held) = lost_sight(world, slot) {
        let about = HostCopy {
            guest: held.guest,
            uid: held.uid,
            deleting: false,
            finalizer: false,
            granted: false,
            pod: None,
            device: None,
            attachment: None,
            ready: false,
        };
        asked(setting, world, slot, about);
    }
}

/// What the API server's answer about `about` is to the ledger.
fn asked(setting: &Setting, world: &mut World, slot: Slot, about: HostCopy) -> Answer {
    let found = world.copies[slot].filter(|copy| copy.guest == about.guest);
    let found = found.map(|copy| facts::host_claim(setting, slot, &copy, true));
    let uid = facts::host_claim(setting, slot, &about, true).metadata.uid;
    facts::with_ledger(setting, world, (slot, about), |ledger| {
        ledger.answered(found.as_ref(), uid.as_deref().unwrap(), NODE)
    })
}

/// Whether the walk of that claim waits for the VM's turn.
pub fn waits_for_turn(setting: &Setting, world: &World, slot: Slot) -> bool {
    let Some(walk) = world.agent.walks[slot] else {
        return false;
    };
    let takes = walk.at == At::Plan
        && matches!(
            planned(&walk),
            Step::RecordAttachment
                | Step::Plug
                | Step::ForgetAttachment
                | Step::Lose(_)
                | Step::Clean
        );
    let others = setting.slots().filter(|other| *other != slot);
    takes
        && !walk.turn
        && others
            .filter(|other| setting.vm_of[*other] == setting.vm_of[slot])
            .any(|other| world.agent.walks[other].is_some_and(|walk| walk.turn))
}

/// Brings a walk one step on. False: the step cannot end so.
pub fn step(setting: &Setting, world: &mut World, slot: Slot, luck: Luck) -> bool {
    let Some(mut walk) = world.agent.walks[slot] else {
        return false;
    };
    let done = match walk.at {
        At::Send(write) => send(setting, world, slot, walk, write, luck),
        At::Opened { others } => {
            let outcome = device_add(setting, world, slot, &walk, luck);
            walk.at = At::Added { others, outcome };
            world.agent.walks[slot] = Some(walk);
            true
        }
        _ if luck != Luck::Answered => false,
        At::Plan => {
            let due = planned(&walk);
            obey(setting, world, slot, walk, &due);
            true
        }
        At::Added { others, outcome } => {
            added(setting, world, slot, walk, others, outcome);
            true
        }
        At::Unplugging => {
            unplugged(setting, world, slot, walk);
            true
        }
        At::Cleaning => {
            clean(setting, world, slot, walk);
            true
        }
    };
    end_if_idle(world, slot);
    done
}

/// A walk whose next step is to wait or to rest is over: nothing is done in between.
fn end_if_idle(world: &mut World, slot: Slot) {
    if let Some(walk) = &world.agent.walks[slot]
        && walk.at == At::Plan
        && matches!(planned(walk), Step::Wait(_) | Step::Rest)
    {
        world.agent.walks[slot] = None;
    }
}

/// Does a step that the planner asked for.
fn obey(setting: &Setting, world: &mut World, slot: Slot, mut walk: Walk, due: &Step) {
    let copy = walk.claim;
    match due {
        Step::Rest | Step::Wait(_) => return world.agent.walks[slot] = None,
        Step::AwaitWithheld => {
            close_gates(setting, world, slot, &copy);
            return world.agent.walks[slot] = None;
        }
        Step::LookAtVf => walk.vf = Some(look_at_vf(setting, world, slot, &copy)),
        Step::LookAtQemu => walk.qemu = Some(look_at_qemu(setting, world, slot, &copy)),
        Step::LookForLeft => walk.left = Some(left_in_qemu(setting, world, slot, &copy)),
        Step::TakeOver => {
            let Some((vf, pod)) = walk.left.flatten().zip(copy.pod) else {
                return world.agent.walks[slot] = None;
            };
            if facts::enter(setting, world, slot, &copy, (vf, pod)).is_err() {
                return world.agent.walks[slot] = None;
            }
            walk.at = At::Send(Write::TakeOver { vf, pod });
        }
        Step::Allocate => match facts::allocate(setting, world, slot, &copy, walk.fresh) {
            Some(choice) => {
                let vf = u8::try_from(choice.vf_index).unwrap();
                walk.at = At::Send(Write::Device(vf));
            }
            None => return world.agent.walks[slot] = None,
        },
        Step::CreateVfs => {
            ordered(world, &walk, false);
            if !world.vfs_made {
                let Some(count) = facts::creation(setting, world, slot, &copy) else {
                    return world.agent.walks[slot] = None;
                };
                assert_eq!(count, u16::from(setting.total_vfs));
                reserved(world, slot, &copy);
                world.vfs_made = true;
            }
            walk.vf = None;
        }
        Step::Prepare => {
            ordered(world, &walk, true);
            let Some(vf) = free_to_touch(setting, world, slot, &copy) else {
                return world.agent.walks[slot] = None;
            };
            prepare(world, slot, &copy, vf);
            if world.held(setting, setting.group(vf)) {
                // Bound, and the group is somebody's through another VF of it.
                return world.agent.walks[slot] = None;
            }
            walk.vf = Some(Looked {
                state: VfState::Free,
                configured: true,
                clean: false,
            });
        }
        Step::RecordAttachment => {
            walk.turn = true;
            let Some(pod) = vm_pod(setting, world, slot, &copy) else {
                return world.agent.walks[slot] = None;
            };
            walk.at = At::Send(Write::Attachment(pod));
        }
        Step::Plug => {
            walk.turn = true;
            match open_gates(setting, world, slot, &copy) {
                Some(others) => walk.at = At::Opened { others },
                None => return world.agent.walks[slot] = None,
            }
        }
        Step::AwaitGuest => match look_at_qemu(setting, world, slot, &copy) {
            QemuSeen::Configured => walk.qemu = Some(QemuSeen::Configured),
            _ => return world.agent.walks[slot] = None,
        },
        Step::ReportAttached { .. } => {
            report_ready(world, slot, &copy);
            return world.agent.walks[slot] = None;
        }
        Step::LookAtService | Step::Repair(_) => unreachable!("nothing drifts here"),
        Step::ForgetAttachment | Step::Lose(_) => {
            walk.turn = true;
            close_gates(setting, world, slot, &copy);
            walk.at = At::Send(Write::ForgetAttachment);
        }
        Step::Unplug => {
            let Some(device) = in_qemu(setting, world, slot, &copy) else {
                return world.agent.walks[slot] = None;
            };
            device.unplug = true;
            walk.at = At::Unplugging;
        }
        Step::Clean => {
            ordered(world, &walk, true);
            // The turn is for the gates, and it is taken and given back within this step.
            close_gates(setting, world, slot, &copy);
            walk.turn = false;
            walk.at = At::Cleaning;
        }
        Step::ClearDevice => {
            close_gates(setting, world, slot, &copy);
            if let (Some(vf), Some(VfState::Held)) = (copy.device, walk.vf.map(|seen| seen.state)) {
                world.vf_mut(vf).left = true;
            }
            walk.at = At::Send(Write::ClearDevice);
        }
    }
    world.agent.walks[slot] = Some(walk);
}

/// The end of `attach::plug`: the group's gates are closed, however it went.
fn added(
    setting: &Setting,
    world: &mut World,
    slot: Slot,
    mut walk: Walk,
    others: u8,
    outcome: Outcome,
) {
    if let Some(pod) = walk.claim.attachment {
        let vm = &mut world.vms[setting.vm_of[slot]];
        if vm.pod == pod && !vm.dead {
            vm.groups &= !(1 << setting.group(walk.claim.device.unwrap()));
            let end = match outcome {
                Outcome::Done => Added::Yes,
                Outcome::Refused => Added::No,
                Outcome::Unknown => Added::Unknown,
            };
            vm.container &= close_after_add(end, others.into()) == Close::Group;
        }
    }
    (walk.turn, walk.vf, walk.qemu, walk.left) = (false, None, None, None);
    walk.at = At::Plan;
    world.agent.walks[slot] = (outcome == Outcome::Done).then_some(walk);
}

/// `release::unplug`: the device is gone, or the guest has not answered in time.
fn unplugged(setting: &Setting, world: &mut World, slot: Slot, mut walk: Walk) {
    let stays = vm_pod(setting, world, slot, &walk.claim).is_none()
        || in_qemu(setting, world, slot, &walk.claim).is_some();
    (walk.vf, walk.qemu, walk.left, walk.at) = (None, None, None, At::Plan);
    world.agent.walks[slot] = (!stays).then_some(walk);
}

/// `vf::clean`.
fn clean(setting: &Setting, world: &mut World, slot: Slot, mut walk: Walk) {
    let Some(vf) = free_to_touch(setting, world, slot, &walk.claim) else {
        return world.agent.walks[slot] = None;
    };
    *world.vf_mut(vf) = crate::world::Vf::default();
    (walk.vf, walk.at) = (None, At::Plan);
    world.agent.walks[slot] = Some(walk);
}

/// Condition Ready, which is applied whatever else was written meanwhile.
fn report_ready(world: &mut World, slot: Slot, claim: &HostCopy) {
    if let Some(copy) = &mut world.copies[slot]
        && copy.uid == claim.uid
        && !copy.ready
    {
        copy.ready = true;
        world.written(slot);
    }
}

/// Sends a decision; 409 ends the walk, and so does an answer that does not come.
fn send(
    setting: &Setting,
    world: &mut World,
    slot: Slot,
    mut walk: Walk,
    write: Write,
    luck: Luck,
) -> bool {
    let (fresh, claim) = (walk.fresh, walk.claim);
    world.agent.walks[slot] = None;
    match luck {
        Luck::Answered if !fresh => {}
        // A 409 that is lost, or a request that will be refused, changes nothing.
        Luck::Done | Luck::NotDone if !fresh => return false,
        Luck::NotDone => world.wire[slot] = Some(write),
        Luck::Done => land(setting, world, slot, write),
        Luck::Answered => {
            land(setting, world, slot, write);
            let Some(copy) = world.copies[slot] else {
                return true;
            };
            walk.claim = copy;
            if facts::observe(setting, world, slot, &copy, true).is_err() {
                return true;
            }
            (walk.at, walk.doubled) = (At::Plan, false);
            match write {
                Write::ForgetAttachment => {
                    (walk.turn, walk.vf, walk.qemu, walk.left) = (false, None, None, None);
                }
                Write::TakeOver { .. } => walk.left = None,
                Write::ClearDevice => {
                    walk.left = walk.left.or(claim.attachment.map(|_| None));
                    (walk.vf, walk.qemu) = (None, None);
                }
                _ => {}
            }
            debug_assert_eq!(claim.uid, copy.uid);
            world.agent.walks[slot] = Some(walk);
        }
    }
    true
}

//! The world as a `stateright` model: what can happen next, and what must always hold.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;

use common::api::ReclaimPolicy;
use stateright::{Model, Property};

use crate::agent::{self, Luck};
use crate::world::{At, Breach, Process, Setting, Slot, World};
use crate::{clusters, decisions, moments, nature, reclaim, settle};

/// Something that happens. Its name and its place are what a trace shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The agent reads a claim and begins with it.
    AgentFetches(Slot),
    /// The agent's next step with a claim, and how it is answered.
    AgentSteps(Slot, Luck),
    /// The agent asks about a claim that its watch does not show any more.
    AgentFollowsUp(Slot),
    /// It takes the lock and fills its ledger.
    AgentStarts,
    /// It closes gates that a predecessor left open.
    AgentRecovers,
    AgentIsKilled,
    /// In the middle of this claim's step: a request is under way, a VF is half done.
    AgentIsKilledWithin(Slot),
    /// A request whose answer nobody awaits any more reaches the API server.
    RequestLands(Slot),
    RequestIsLost(Slot),
    ControllerSteps(Slot),
    SyncerSteps(Slot),
    /// Controller or guest-syncer end, or give up, between a look and a write.
    ControllerForgets(Slot),
    SyncerForgets(Slot),
    TenantDeletes(Slot),
    TenantMakesAgain(Slot),
    AdministratorDeletesCopy(Slot),
    CopyIsTornOff(Slot),
    GuestConfigures(usize, Slot),
    GuestUnplugs {
        vm: usize,
        slot: Slot,
        lingers: bool,
    },
    KernelLetsGo(u8),
    QemuDies(usize),
    VmRunsAgain(usize),
    StrangerOpens(u8),
    StrangerCloses(u8),
    /// Nobody has a VF, and the count is brought to what it is to be.
    AgentResizes,
    AdministratorGivesBack(u8),
}

/// A bounded world, checked over all its histories.
pub struct Checked {
    pub setting: Setting,
    /// Worlds from which all is known to end well.
    pub well: Mutex<HashSet<u64>>,
    /// By property the first world that breaks it, and so has the shortest trace: the checker
    /// would go on and tell of the last one.
    first: Mutex<HashMap<&'static str, World>>,
}

impl Checked {
    pub fn new(setting: Setting) -> Self {
        Self {
            setting,
            well: Mutex::default(),
            first: Mutex::default(),
        }
    }
}

/// Does `action` in `world`; false: it does nothing there.
pub fn happen(setting: &Setting, world: &mut World, action: Action) -> bool {
    match action {
        Action::AgentFetches(slot) => {
            agent::may_fetch(world, slot) && {
                agent::fetch(setting, world, slot);
                true
            }
        }
        Action::AgentSteps(slot, luck) => {
            if agent::waits_for_turn(setting, world, slot) {
                return false;
            }
            if luck != Luck::Answered {
                if world.budget.lost == 0 {
                    return false;
                }
                world.budget.lost -= 1;
            }
            agent::step(setting, world, slot, luck)
        }
        Action::AgentFollowsUp(slot) => {
            agent::may_follow_up(world, slot) && {
                agent::follow_up(setting, world, slot);
                true
            }
        }
        Action::AgentStarts => {
            world.agent.process == Process::Down && {
                agent::start(setting, world);
                true
            }
        }
        Action::AgentRecovers => {
            world.agent.process == Process::Filled && {
                agent::recover(setting, world);
                true
            }
        }
        Action::AgentIsKilled => {
            if world.budget.kills == 0 || world.agent.process == Process::Down {
                return false;
            }
            world.budget.kills -= 1;
            agent::kill(world);
            true
        }
        Action::AgentIsKilledWithin(slot) => {
            if world.budget.kills == 0 {
                return false;
            }
            world.budget.kills -= 1;
            agent::kill_within(setting, world, slot)
        }
        Action::RequestLands(slot) => match world.wire[slot].take() {
            None => false,
            Some(write) => {
                decisions::land(setting, world, slot, write);
                true
            }
        },
        Action::RequestIsLost(slot) => {
            // With the request its chance to land is gone; who waits for it is not told.
            world.wire[slot].take().is_some()
        }
        Action::ControllerSteps(slot) => clusters::controller(setting, world, slot),
        Action::SyncerSteps(slot) => clusters::syncer(setting, world, slot),
        Action::ControllerForgets(slot) => forget(&mut world.controllers[slot]),
        Action::SyncerForgets(slot) => forget(&mut world.syncers[slot]),
        Action::TenantDeletes(slot) => nature::delete_guest(world, slot),
        Action::TenantMakesAgain(slot) => nature::remake_guest(world, slot),
        Action::AdministratorDeletesCopy(slot) => nature::delete_copy(world, slot),
        Action::CopyIsTornOff(slot) => nature::tear_off(setting, world, slot),
        Action::GuestConfigures(vm, slot) => nature::configure(world, vm, slot),
        Action::GuestUnplugs { vm, slot, lingers } => nature::unplug(world, vm, slot, lingers),
        Action::KernelLetsGo(vf) => nature::let_go(world, vf),
        Action::QemuDies(vm) => nature::die(world, vm),
        Action::VmRunsAgain(vm) => nature::run_again(world, vm),
        Action::StrangerOpens(group) => nature::intrude(setting, world, group),
        Action::StrangerCloses(group) => nature::leave(world, group),
        Action::AgentResizes => reclaim::resize_idle(setting, world),
        Action::AdministratorGivesBack(vf) => reclaim::give_back(setting, world, vf),
    }
}

fn forget<T: Default + PartialEq>(place: &mut T) -> bool {
    std::mem::take(place) != T::default()
}

/// Everything that is tried in a world; much of it does nothing in most.
pub fn candidates(setting: &Setting, into: &mut Vec<Action>) {
    use Action as A;
    into.extend([A::AgentStarts, A::AgentRecovers, A::AgentIsKilled]);
    if setting.reclaim != ReclaimPolicy::Return {
        into.push(A::AgentResizes);
        into.extend((0..setting.total_vfs).map(A::AdministratorGivesBack));
    }
    for slot in setting.slots() {
        into.extend([
            A::AgentFetches(slot),
            A::AgentFollowsUp(slot),
            A::AgentSteps(slot, Luck::Answered),
            A::AgentSteps(slot, Luck::Done),
            A::AgentSteps(slot, Luck::NotDone),
            A::AgentIsKilledWithin(slot),
            A::RequestLands(slot),
            A::RequestIsLost(slot),
            A::ControllerSteps(slot),
            A::SyncerSteps(slot),
            A::TenantDeletes(slot),
            A::TenantMakesAgain(slot),
            A::AdministratorDeletesCopy(slot),
            A::CopyIsTornOff(slot),
        ]);
        if setting.stepwise {
            into.extend([A::ControllerForgets(slot), A::SyncerForgets(slot)]);
        }
        let vm = setting.vm_of[slot];
        into.push(A::GuestConfigures(vm, slot));
        into.extend([true, false].map(|lingers| A::GuestUnplugs { vm, slot, lingers }));
    }
    for vf in 0..setting.total_vfs {
        into.extend([
            A::KernelLetsGo(vf),
            A::StrangerOpens(vf),
            A::StrangerCloses(vf),
        ]);
    }
    let vms: HashSet<usize> = setting.slots().map(|slot| setting.vm_of[slot]).collect();
    for vm in 0..vms.len() {
        into.extend([A::QemuDies(vm), A::VmRunsAgain(vm)]);
    }
}

impl Model for Checked {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.setting.start()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        // What follows from a broken rule is no news.
        if world.breach.is_none() {
            candidates(&self.setting, actions);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = *world;
        if !happen(&self.setting, &mut next, action) {
            return None;
        }
        let cluster = matches!(action, Action::ControllerSteps(_) | Action::SyncerSteps(_));
        if cluster && !self.setting.stepwise {
            settle::finish(&self.setting, &mut next, action);
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = always();
        all.extend(moments::due(&self.setting));
        all
    }
}

impl Checked {
    /// False for the first world in which the property does not hold.
    fn holds(&self, property: &'static str, world: &World, holds: bool) -> bool {
        holds || *self.first.lock().unwrap().entry(property).or_insert(*world) != *world
    }
}

fn kept(world: &World, breach: Breach) -> bool {
    world.breach != Some(breach)
}

fn always() -> Vec<Property<Checked>> {
    // The checker takes plain functions, so each says its name twice.
    macro_rules! always {
        ($name:literal, $holds:expr) => {
            Property::always($name, |checked: &Checked, world: &World| {
                let holds: fn(&Checked, &World) -> bool = $holds;
                checked.holds($name, world, holds(checked, world))
            })
        };
    }
    vec![
        always!("in-use-stays", |_, w| kept(w, Breach::InUseStays)),
        always!("intent-first", |_, w| kept(w, Breach::IntentFirst)),
        always!("unplug-waits", |_, w| kept(w, Breach::UnplugWaits)),
        always!("no-death-by-absence", |_, w| kept(
            w,
            Breach::NoDeathByAbsence
        )),
        always!("reclaim-keeps", |_, w| kept(w, Breach::ReclaimKeeps)),
        always!("one-to-one", |_, w| kept(w, Breach::OneToOne)
            && one_to_one(w)),
        always!("clean-handover", |_, w| {
            kept(w, Breach::CleanHandover)
                && w.devices().all(|(_, slot, device)| {
                    w.vf(device.vf).settings == Some(World::party(slot, device.guest))
                })
        }),
        always!("gates-closed", |m, w| gates(&m.setting, w)),
        always!("gates-kept", |_, w| {
            let has = |vm: &crate::world::Vm| vm.devices.iter().any(Option::is_some);
            w.vms.iter().all(|vm| vm.container || !has(vm))
        }),
        always!("ends-well", |m, w| w.breach.is_some()
            || settle::ends_well(m, w)),
    ]
}

/// No VF with an attachment in two claims, none in two QEMUs or twice in one. That two claims
/// name a VF is only ever a dead agent's request that came late; nothing is done for the second.
fn one_to_one(world: &World) -> bool {
    let attached = world
        .copies
        .iter()
        .flatten()
        .filter(|copy| copy.attachment.is_some());
    let attached: Vec<u8> = attached.filter_map(|copy| copy.device).collect();
    let plugged: Vec<u8> = world.devices().map(|(_, _, device)| device.vf).collect();
    let distinct = |all: &[u8]| all.iter().collect::<HashSet<_>>().len() == all.len();
    distinct(&attached) && distinct(&plugged)
}

/// A group is open in a container only while its claim's `device_add` is under way, or until
/// the next agent has closed what a dead one left.
fn gates(setting: &Setting, world: &World) -> bool {
    if world.agent.process != Process::Serving {
        return true;
    }
    world.vms.iter().enumerate().all(|(vm, of)| {
        let under_way = |slot: &Slot| {
            let walk = world.agent.walks[*slot]?;
            let opened = matches!(walk.at, At::Opened { .. } | At::Added { .. });
            let vf = walk.claim.device.filter(|_| opened)?;
            Some(1_u8 << setting.group(vf))
        };
        let due = setting
            .slots()
            .filter(|slot| setting.vm_of[*slot] == vm)
            .filter_map(|slot| under_way(&slot))
            .fold(0, |all, one| all | one);
        of.groups & !due == 0
    })
}

//! What must be reached for the rest to mean something: a rule that is never in danger is not
//! shown to hold. Each world has those moments that its bounds allow.

use common::api::ReclaimPolicy;
use stateright::Property;

use crate::checker::Checked;
use crate::world::{At, Device, Held, Outcome, Process, Setting, Vm, Walk, Withheld, World, Write};

type Needs = fn(&Setting) -> bool;
type Seen = fn(&Checked, &World) -> bool;

/// The moments that a world must have.
pub fn due(setting: &Setting) -> Vec<Property<Checked>> {
    let due = MOMENTS.iter().filter(|(_, needs, _)| needs(setting));
    due.map(|(name, _, seen)| Property::sometimes(name, *seen))
        .collect()
}

const MOMENTS: [(&str, Needs, Seen); 15] = [
    (
        "a claim is ready",
        |_| true,
        |_, w| w.copies.iter().flatten().any(|copy| copy.ready),
    ),
    (
        "a claim made again is ready",
        |s| s.budget.remakes[0] > 0,
        |_, w| {
            let again = |copy: &crate::world::HostCopy| copy.ready && copy.guest > 0;
            w.copies.iter().flatten().any(again)
        },
    ),
    (
        "a copy takes over what an earlier one left in QEMU",
        |s| s.budget.torn > 0,
        |_, w| {
            let writes = |walk: &Walk| matches!(walk.at, At::Send(Write::TakeOver { .. }));
            w.agent.walks.iter().flatten().any(writes)
        },
    ),
    (
        "a killed agent left a device in and its gates open",
        |s| s.budget.kills > 0,
        |_, w| {
            let open = |vm: &Vm| vm.groups != 0 && vm.devices.iter().any(Option::is_some);
            w.agent.process == Process::Down && w.vms.iter().any(open)
        },
    ),
    (
        "a request outlives its agent",
        |s| s.budget.kills > 0,
        |_, w| {
            w.agent.process == Process::Serving
                && w.wire.iter().any(Option::is_some)
                && w.agent.ledger.iter().all(Option::is_none)
        },
    ),
    (
        "two claims name one VF",
        |s| s.budget.kills > 0 && s.claims > 1,
        |_, w| {
            let [one, other] = w.copies.map(|copy| copy.and_then(|copy| copy.device));
            one.is_some() && one == other
        },
    ),
    (
        "an answer is lost and the ledger remembers",
        |s| s.budget.lost > 0,
        |_, w| {
            let remembers = |slot: usize| {
                let of = |held: &Held| usize::from(held.slot) == slot && held.may_land;
                w.agent.ledger.iter().flatten().any(of)
            };
            (0..w.wire.len()).any(|slot| w.wire[slot].is_some() && remembers(slot))
        },
    ),
    (
        "device_add is not answered and the device is in",
        |s| s.budget.lost > 0,
        |_, w| {
            let unknown = |walk: &Walk| {
                let outcome = Outcome::Unknown;
                matches!(walk.at, At::Added { outcome: o, .. } if o == outcome)
            };
            w.agent.walks.iter().flatten().any(unknown) && w.devices().next().is_some()
        },
    ),
    (
        "the guest keeps what it is to let go",
        |s| s.budget.deletes != [0, 0],
        |_, w| {
            let keeps = |(_, slot, device): (usize, usize, Device)| {
                device.unplug && w.agent.walks[slot].is_none()
            };
            w.devices().any(keeps)
        },
    ),
    (
        "a dead QEMU's group is still open",
        |s| s.budget.deaths > 0,
        |_, w| w.vms.iter().any(|vm| vm.dead) && w.vfs.iter().any(|vf| vf.lingers),
    ),
    (
        "a decision meets a newer object",
        |_| true,
        |_, w| {
            let late = |walk: &Walk| matches!(walk.at, At::Send(_)) && !walk.fresh;
            w.agent.walks.iter().flatten().any(late)
        },
    ),
    (
        "a claim goes while its VF is being chosen",
        |_| true,
        |_, w| {
            let gone = |held: &Held| {
                let copy = w.copies[usize::from(held.slot)];
                copy.is_none_or(|copy| copy.uid != held.uid)
            };
            w.agent.ledger.iter().flatten().any(gone)
        },
    ),
    (
        "a stranger has a claim's VF",
        |s| s.budget.foreign > 0,
        |checked, w| {
            let taken = |vf: u8| w.foreign_has(checked.setting.group(vf));
            let claimed = w.copies.iter().flatten().filter_map(|copy| copy.device);
            claimed.into_iter().any(taken)
        },
    ),
    (
        "a claim is gone and its VF is withheld",
        |s| s.reclaim != ReclaimPolicy::Return,
        |_, w| {
            let mut withheld = w.withheld.iter().flatten();
            let copy = |entry: &Withheld| w.copies[usize::from(entry.slot)];
            withheld.any(|entry| copy(entry).is_none_or(|copy| copy.uid != entry.uid))
        },
    ),
    (
        "one VM has two VFs",
        |s| s.claims > 1 && s.total_vfs > 1 && s.vm_of == [0, 0],
        |_, w| {
            let both = |vm: &Vm| vm.devices.iter().all(Option::is_some);
            w.vms.iter().any(both)
        },
    ),
];

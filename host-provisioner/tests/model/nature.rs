//! What happens by itself or by people: guests, QEMUs, the kernel's late letting go, strangers,
//! tenants and administrators.

use crate::world::{Guest, Setting, Slot, Syncer, World};

/// The tenant deletes its claim.
pub fn delete_guest(world: &mut World, slot: Slot) -> bool {
    let Some(guest) = &mut world.guests[slot] else {
        return false;
    };
    if guest.deleting || world.budget.deletes[slot] == 0 {
        return false;
    }
    world.budget.deletes[slot] -= 1;
    guest.deleting = true;
    if !guest.finalizer {
        world.guests[slot] = None;
    }
    stale(world, slot);
    true
}

/// A claim of that name is made again; it has another UID.
pub fn remake_guest(world: &mut World, slot: Slot) -> bool {
    if world.guests[slot].is_some() || world.budget.remakes[slot] == 0 {
        return false;
    }
    world.budget.remakes[slot] -= 1;
    let uid = world.guest_uids[slot];
    world.guest_uids[slot] += 1;
    world.guests[slot] = Some(Guest {
        uid,
        deleting: false,
        finalizer: false,
    });
    stale(world, slot);
    true
}

fn stale(world: &mut World, slot: Slot) {
    match &mut world.syncers[slot] {
        Syncer::Idle => {}
        Syncer::Lift { fresh, .. }
        | Syncer::Ask { fresh, .. }
        | Syncer::Delete { fresh, .. }
        | Syncer::LetGo { fresh, .. } => *fresh = false,
    }
}

/// The host's administrator deletes a copy while its claim lives.
pub fn delete_copy(world: &mut World, slot: Slot) -> bool {
    let Some(copy) = &mut world.copies[slot] else {
        return false;
    };
    if copy.deleting || world.budget.copies == 0 {
        return false;
    }
    world.budget.copies -= 1;
    copy.deleting = true;
    world.written(slot);
    world.reap(slot);
    true
}

/// A copy is taken away with all its finalizers, whatever its claim has: torn off by somebody,
/// or not in the backup that the host was restored from. Not where the tenant deletes its claim
/// as well: with both records gone nobody is left to undo what was done.
pub fn tear_off(setting: &Setting, world: &mut World, slot: Slot) -> bool {
    let may = setting.budget.deletes[slot] == 0 && world.budget.torn > 0;
    if !may || world.copies[slot].is_none() {
        return false;
    }
    world.budget.torn -= 1;
    world.written(slot);
    let copy = world.copies[slot].take();
    if let Some(vf) = copy.and_then(|copy| copy.device) {
        world.vf_mut(vf).left = true;
    }
    true
}

/// The guest gives its device addresses.
pub fn configure(world: &mut World, vm: usize, slot: Slot) -> bool {
    match &mut world.vms[vm].devices[slot] {
        Some(device) if !device.configured => {
            device.configured = true;
            true
        }
        _ => false,
    }
}

/// The guest lets a device go (DEVICE_DELETED); the kernel may close its group a moment later.
pub fn unplug(world: &mut World, vm: usize, slot: Slot, lingers: bool) -> bool {
    match world.vms[vm].devices[slot] {
        Some(device) if device.unplug => {
            world.vms[vm].devices[slot] = None;
            world.vf_mut(device.vf).lingers = lingers;
            true
        }
        _ => false,
    }
}

/// The kernel lets go of a group that a QEMU had.
pub fn let_go(world: &mut World, vf: u8) -> bool {
    std::mem::take(&mut world.vf_mut(vf).lingers)
}

/// A QEMU ends, and its container with it; vhost threads may keep its groups open.
pub fn die(world: &mut World, vm: usize) -> bool {
    if world.vms[vm].dead || world.budget.deaths == 0 {
        return false;
    }
    world.budget.deaths -= 1;
    let pod = world.vms[vm].pod;
    let devices = world.vms[vm].devices;
    world.vms[vm] = crate::world::Vm {
        pod,
        dead: true,
        ..crate::world::Vm::default()
    };
    for device in devices.into_iter().flatten() {
        world.vf_mut(device.vf).lingers = true;
    }
    true
}

/// The VM runs again, in another pod.
pub fn run_again(world: &mut World, vm: usize) -> bool {
    if !world.vms[vm].dead {
        return false;
    }
    world.vms[vm].dead = false;
    world.vms[vm].pod += 1;
    true
}

/// A process that is none of ours opens a group with a VF on vfio-pci.
pub fn intrude(setting: &Setting, world: &mut World, group: u8) -> bool {
    let there = (0..setting.total_vfs)
        .any(|vf| setting.group(vf) == group && world.vfs_made && world.vf(vf).vfio);
    if !there || world.budget.foreign == 0 || world.held(setting, group) {
        return false;
    }
    world.budget.foreign -= 1;
    world.foreign |= 1 << group;
    true
}

/// It closes the group again.
pub fn leave(world: &mut World, group: u8) -> bool {
    let there = world.foreign_has(group);
    world.foreign &= !(1 << group);
    there
}

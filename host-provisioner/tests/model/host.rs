//! What the agent's executors (`vf`, `qemu`, `attach`, `release`) find and do on the modelled
//! host: kernel, QEMU and the launcher's gates, with the second looks that they take.

use host_provisioner::node::plan::{Close, close_after_release};

use crate::agent::Luck;
use crate::reclaim;
use crate::world::{
    Breach, Device, HostCopy, Outcome, QemuSeen, Setting, Slot, VfSeen as Looked, VfState, Walk,
    World,
};

/// The pod that a claim's QEMU is in: the attachment's, else the launcher's.
fn pod_of(copy: &HostCopy) -> Option<u8> {
    copy.attachment.or(copy.pod)
}

/// What `vf::look` finds.
pub fn look_at_vf(setting: &Setting, world: &World, slot: Slot, copy: &HostCopy) -> Looked {
    let Some(vf) = copy.device.filter(|_| world.vfs_made) else {
        return Looked {
            state: VfState::Absent,
            configured: false,
            clean: true,
        };
    };
    let of = world.vf(vf);
    let state = match of.vfio {
        false => VfState::Driverless,
        true if world.held(setting, setting.group(vf)) => VfState::Held,
        true => VfState::Free,
    };
    Looked {
        state,
        configured: of.settings == Some(World::party(slot, copy.guest)),
        clean: state == VfState::Driverless && of.settings.is_none(),
    }
}

/// What `qemu::look` finds.
pub fn look_at_qemu(setting: &Setting, world: &World, slot: Slot, copy: &HostCopy) -> QemuSeen {
    let vm = setting.vm_of[slot];
    if pod_of(copy).is_none() || pod_of(copy) != world.running(vm) {
        return QemuSeen::Gone;
    }
    match world.vms[vm].devices[slot].filter(|_| copy.attachment.is_some()) {
        Some(device) if device.guest == copy.guest && device.configured => QemuSeen::Configured,
        Some(device) if device.guest == copy.guest => QemuSeen::Plugged,
        _ => QemuSeen::Absent,
    }
}

/// What `left::look` finds: the VF of the device that QEMU has of a claim that records none.
pub fn left_in_qemu(setting: &Setting, world: &World, slot: Slot, copy: &HostCopy) -> Option<u8> {
    vm_pod(setting, world, slot, copy)?;
    let device = world.vms[setting.vm_of[slot]].devices[slot]?;
    let own = |held: &crate::world::Held| usize::from(held.slot) == slot && held.uid == copy.uid;
    let named = |held: &crate::world::Held| held.vf == device.vf && !own(held);
    let free = !world.agent.ledger.iter().flatten().any(named);
    (device.guest == copy.guest && free).then_some(device.vf)
}

/// The pod of the claim's QEMU, if it runs.
pub fn vm_pod(setting: &Setting, world: &World, slot: Slot, copy: &HostCopy) -> Option<u8> {
    let running = world.running(setting.vm_of[slot]);
    pod_of(copy).filter(|pod| Some(*pod) == running)
}

/// The claim's device in its running QEMU.
pub fn in_qemu<'a>(
    setting: &Setting,
    world: &'a mut World,
    slot: Slot,
    copy: &HostCopy,
) -> Option<&'a mut Device> {
    vm_pod(setting, world, slot, copy)?;
    let vm = &mut world.vms[setting.vm_of[slot]];
    vm.devices[slot]
        .as_mut()
        .filter(|device| device.guest == copy.guest)
}

/// A step that changes the host is only ever asked for when the claim, as the API server had
/// it, records the device, and a VF only when it was seen to be nobody's: that the executors
/// look again is a second wall.
pub fn ordered(world: &mut World, walk: &Walk, vf: bool) {
    if walk.claim.device.is_none() {
        world.broke(Breach::IntentFirst);
    }
    let free = |seen: Looked| matches!(seen.state, VfState::Driverless | VfState::Free);
    if vf && !walk.vf.is_some_and(free) {
        world.broke(Breach::InUseStays);
    }
}

/// The host is changed for this claim: the ledger must keep its VF from everybody else. (A
/// clearing of our own may have been carried out since the claim was read; until that is
/// answered the ledger has the VF.)
pub fn reserved(world: &mut World, slot: Slot, copy: &HostCopy) {
    let mut held = world.agent.ledger.iter().flatten().filter(|held| {
        usize::from(held.slot) == slot && held.uid == copy.uid && Some(held.vf) == copy.device
    });
    if held.next().is_none() {
        world.broke(Breach::OneToOne);
    }
}

/// `vf::prove_free`: the claim's VF, held by us for the moment; `None`: EBUSY, or no VF.
pub fn free_to_touch(
    setting: &Setting,
    world: &mut World,
    slot: Slot,
    copy: &HostCopy,
) -> Option<u8> {
    let vf = copy.device.filter(|_| world.vfs_made)?;
    if world.vf(vf).vfio && world.held(setting, setting.group(vf)) {
        return None;
    }
    reserved(world, slot, copy);
    reclaim::touched(setting, world, slot, copy, vf);
    if world.in_use(vf) {
        world.broke(Breach::InUseStays);
    }
    Some(vf)
}

/// `vf::prepare`.
pub fn prepare(world: &mut World, slot: Slot, copy: &HostCopy, vf: u8) {
    let of = world.vf_mut(vf);
    if of.vfio {
        // Out of no pool of ours: it is reset first.
        of.soiled = None;
    }
    (of.settings, of.vfio) = (Some(World::party(slot, copy.guest)), true);
}

/// `attach::plug` up to `device_add`; how many VFs QEMU has already. `None`: it ended.
pub fn open_gates(setting: &Setting, world: &mut World, slot: Slot, copy: &HostCopy) -> Option<u8> {
    // One that somebody tore off had it recorded.
    let recorded =
        world.copies[slot].is_none_or(|now| now.uid != copy.uid || now.attachment.is_some());
    if copy.attachment.is_none() || !recorded {
        world.broke(Breach::IntentFirst);
        return None;
    }
    vm_pod(setting, world, slot, copy)?;
    let group = setting.group(copy.device?);
    let vm = &mut world.vms[setting.vm_of[slot]];
    vm.groups |= 1 << group;
    vm.container = true;
    u8::try_from(vm.devices.iter().flatten().count()).ok()
}

/// `device_add` and the look at what became of it (`attach::settle`).
pub fn device_add(
    setting: &Setting,
    world: &mut World,
    slot: Slot,
    walk: &Walk,
    luck: Luck,
) -> Outcome {
    if luck == Luck::NotDone {
        return Outcome::Unknown;
    }
    let plugged = plug(setting, world, slot, &walk.claim);
    match luck {
        Luck::Answered if plugged => Outcome::Done,
        Luck::Answered => Outcome::Refused,
        Luck::Done | Luck::NotDone => Outcome::Unknown,
    }
}

/// QEMU adds the device, if the gates and the kernel let it.
pub fn plug(setting: &Setting, world: &mut World, slot: Slot, copy: &HostCopy) -> bool {
    let (Some(vf), Some(_)) = (copy.device, vm_pod(setting, world, slot, copy)) else {
        return false;
    };
    let (vm, group) = (setting.vm_of[slot], setting.group(vf));
    let gates = world.vms[vm].groups & (1 << group) != 0 && world.vms[vm].container;
    let others = world.devices().any(|(other, _, device)| {
        device.vf == vf || (other != vm && setting.group(device.vf) == group)
    });
    let lingers = (0..setting.total_vfs)
        .any(|other| setting.group(other) == group && world.vf(other).lingers);
    let busy = others || lingers || world.foreign_has(group);
    let here = &world.vms[vm].devices[slot];
    if !gates || busy || !world.vf(vf).vfio || here.is_some() {
        return false;
    }
    let party = World::party(slot, copy.guest);
    let before = *world.vf(vf);
    if before.settings != Some(party) || before.soiled.is_some_and(|last| last != party) {
        world.broke(Breach::CleanHandover);
    }
    world.vf_mut(vf).soiled = Some(party);
    world.vms[vm].devices[slot] = Some(Device {
        guest: copy.guest,
        vf,
        configured: false,
        unplug: false,
    });
    true
}

/// `release::close_gates`: the group's always, the shared ones with the last attachment.
pub fn close_gates(setting: &Setting, world: &mut World, slot: Slot, copy: &HostCopy) {
    let (Some(pod), Some(vf)) = (copy.attachment, copy.device) else {
        return;
    };
    let vm = &mut world.vms[setting.vm_of[slot]];
    if vm.pod == pod && !vm.dead {
        vm.groups &= !(1 << setting.group(vf));
        let left = vm.devices.iter().flatten().count();
        vm.container &= close_after_release(left) == Close::Group;
    }
}

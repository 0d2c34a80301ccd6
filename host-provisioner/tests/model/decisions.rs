//! The agent's decisions as the API server takes them in, and what must be so when one lands.

use crate::reclaim;
use crate::world::{Breach, HostCopy, Setting, Slot, World, Write};

/// The API server takes a decision in.
pub fn land(setting: &Setting, world: &mut World, slot: Slot, write: Write) {
    let Some(mut copy) = world.copies[slot] else {
        return;
    };
    match write {
        Write::Device(vf) => copy.device = Some(vf),
        Write::Attachment(pod) => copy.attachment = Some(pod),
        Write::TakeOver { vf, pod } => (copy.device, copy.attachment) = (Some(vf), Some(pod)),
        Write::ForgetAttachment => {
            unplugged_for_sure(setting, world, slot, &copy);
            (copy.attachment, copy.ready) = (None, false);
        }
        Write::ClearDevice => {
            unplugged_for_sure(setting, world, slot, &copy);
            reclaim::let_go(setting, world, slot, &copy);
            if let (Some(vf), false) = (copy.device, copy.deleting) {
                // It gave way to another claim. Should this be carried out so late that it has
                // begun with the VF after all, what it did is undone when the VF is given again.
                world.vf_mut(vf).left = true;
            }
            (copy.attachment, copy.device, copy.ready) = (None, None, false);
        }
    }
    world.written(slot);
    world.copies[slot] = Some(copy);
}

/// An attachment is given up: no QEMU may have the VF, and none may have left its group open.
fn unplugged_for_sure(setting: &Setting, world: &mut World, slot: Slot, copy: &HostCopy) {
    let vm = &world.vms[setting.vm_of[slot]];
    let has = vm.devices[slot].is_some_and(|device| device.guest == copy.guest);
    let lingers = copy.attachment.is_some() && copy.device.is_some_and(|vf| world.vf(vf).lingers);
    if has || lingers {
        world.broke(Breach::UnplugWaits);
    }
}

//! `nvme`: an NVMe subsystem whose primary controller is the PF. Each VF is a secondary
//! controller, and what its guest gets through it is one namespace.
//!
//! Manners (the NVMe specification, as QEMU's hw/nvme/ctrl.c has it; functions are named):
//! - a secondary controller works only when it is *online*, and for that it needs two queues (one
//!   is the admin queue's) and an interrupt (`nvme_virt_set_state`). The primary controller
//!   has all of them at first and lets go of them at its own function reset (`nvme_activate_virt_res`);
//! - any reset of the primary controller takes every secondary one offline and its resources
//!   away (`nvme_ctrl_reset`): it is reset once, while there is no VF;
//! - a namespace that may be shared can be attached to several controllers at once, and nobody
//!   but us sees to it that it is not (`nvme_ns_attachment`);
//! - a namespace is erased by a Format NVM, which the primary controller does only for one that is attached to
//!   itself (`nvme_format`). So the host has its disk meanwhile: it is opened for nobody else,
//!   but the kernel reads its partition table, and udev its first blocks, before it is erased. A
//!   Sanitize would reach the namespaces of all guests, and QEMU has none;
//! - where a controller says that formatting or erasing one namespace does so to all (FNA), it is
//!   not used.
//!
//! A namespace that is attached to no controller is one that was never handed out, or was erased
//! since: it is detached from its VF's controller after the proof, and only then. QEMU forgets
//! attachments with the VFs, so the VFs are not taken away while one of them has a namespace.

mod erase;
mod resources;
#[cfg(test)]
mod tests;

use common::api::VfCapabilities;

use super::{Capabilities, DriverError, Growth, NamespaceUser, Namespaces, VfDriver};
use crate::kernel::nvme::{Controller, Secondary, Subsystem};
use crate::kernel::{Kernel, KernelError, PfFacts, Storage, VfConfig, VfFacts};
use resources::Share;

#[derive(Clone, Copy, Debug)]
pub struct Nvme;

fn subsystem<'k>(kernel: &'k dyn Kernel, pf: &PfFacts) -> Subsystem<'k> {
    Subsystem {
        nvme: kernel.nvme(),
        pf: pf.address,
    }
}

fn amiss(of: Subsystem<'_>, words: impl Into<String>) -> DriverError {
    DriverError::Storage {
        pf: of.pf,
        words: words.into(),
    }
}

/// What the controller lacks of what is needed to hand out its namespaces, with what to do.
fn able(of: Subsystem<'_>, controller: Controller) -> Result<(), DriverError> {
    let lacks = [
        (controller.virtualizes, "Virtualization Management"),
        (controller.manages_namespaces, "Namespace Attachment"),
        (controller.formats, "Format NVM"),
    ];
    if let Some((_, lack)) = lacks.into_iter().find(|(has, _)| !has) {
        let words = format!("its controller has no {lack}, without which no VF of it is of use");
        return Err(amiss(of, words));
    }
    if controller.erases_all {
        return Err(amiss(
            of,
            "its controller erases all namespaces when one is formatted (FNA), so that none can be \
             taken back from one guest while others have theirs; take it out of the class",
        ));
    }
    Ok(())
}

/// The secondary controller of the VF of that index.
fn secondary(of: Subsystem<'_>, index: u16) -> Result<Option<Secondary>, KernelError> {
    let all = of.secondaries()?.into_iter();
    let number = index.checked_add(1);
    Ok(all.into_iter().find(|found| Some(found.vf) == number))
}

fn must_have(of: Subsystem<'_>, index: u16) -> Result<Secondary, DriverError> {
    let words = || format!("it lists no secondary controller of VF {index}");
    secondary(of, index)?.ok_or_else(|| amiss(of, words()))
}

/// The namespaces that a controller has, each with all controllers that have it.
fn namespaces_of(of: Subsystem<'_>, id: u16) -> Result<Vec<(u32, Vec<u16>)>, KernelError> {
    let mut found = Vec::new();
    for nsid in of.namespaces()? {
        let controllers = of.attached(nsid)?;
        if controllers.contains(&id) {
            found.push((nsid, controllers));
        }
    }
    Ok(found)
}

/// Numbers, for a sentence.
fn list<T: ToString>(numbers: impl IntoIterator<Item = T>) -> String {
    let words: Vec<String> = numbers.into_iter().map(|n| n.to_string()).collect();
    words.join(", ")
}

impl VfDriver for Nvme {
    fn name(&self) -> &'static str {
        "nvme"
    }

    fn capabilities(&self, _pf: &PfFacts) -> Capabilities {
        Capabilities {
            driver: "nvme",
            growth: Growth::AllAtOnce,
            zero_mac: true,
            settings: VfCapabilities {
                namespaces: true,
                ..VfCapabilities::default()
            },
        }
    }

    /// It has no interface; what is wrong with its controllers their settings say.
    fn is_up(&self, _pf: &PfFacts) -> bool {
        true
    }

    fn settings(
        &self,
        kernel: &dyn Kernel,
        pf: &PfFacts,
        index: u16,
    ) -> Result<VfConfig, KernelError> {
        let of = subsystem(kernel, pf);
        let storage = match secondary(of, index)? {
            None => Storage::Amiss("no secondary controller"),
            Some(found) if !found.online => Storage::Amiss("a controller that is offline"),
            Some(found) => match namespaces_of(of, found.id)?.as_slice() {
                [] => Storage::Nothing,
                [(nsid, controllers)] if controllers.len() == 1 => Storage::Namespace(*nsid),
                [_] => Storage::Amiss("a namespace that another controller has too"),
                _ => Storage::Amiss("several namespaces"),
            },
        };
        Ok(VfConfig::of_storage(storage))
    }

    fn namespaces(&self, kernel: &dyn Kernel, pf: &PfFacts) -> Result<Namespaces, KernelError> {
        let of = subsystem(kernel, pf);
        let secondaries = of.secondaries()?;
        let vf_of = |id: u16| {
            let found = secondaries.iter().find(|found| found.id == id)?;
            found.vf.checked_sub(1)
        };
        let user = |id| vf_of(id).map_or(NamespaceUser::Controller(id), NamespaceUser::Vf);
        let all = of.namespaces()?.into_iter();
        all.map(|nsid| Ok((nsid, of.attached(nsid)?.into_iter().map(user).collect())))
            .collect()
    }

    fn reclaim(
        &self,
        kernel: &dyn Kernel,
        pf: &PfFacts,
        vf: u16,
        namespace: u32,
    ) -> Result<(), DriverError> {
        let of = subsystem(kernel, pf);
        if !of.namespaces()?.contains(&namespace) {
            // It was deleted, and its blocks are nobody's.
            return Ok(());
        }
        let own = must_have(of, vf)?;
        let mut errors = Vec::new();
        erase::take_back(of, namespace, own.id, &of.attached(namespace)?, &mut errors);
        match errors.pop() {
            None => Ok(()),
            Some(error) if errors.is_empty() => Err(error),
            Some(last) => {
                errors.push(last);
                Err(amiss(of, super::list(&errors)))
            }
        }
    }

    fn create(&self, kernel: &dyn Kernel, pf: &PfFacts, count: u16) -> Result<(), DriverError> {
        let of = subsystem(kernel, pf);
        able(of, of.controller()?)?;
        let share = Share::of(of, of.primary()?, count)?;
        resources::let_go(of)?;
        kernel.set_num_vfs(pf.address, count)?;
        for index in 0..count {
            resources::ready(of, must_have(of, index)?, share)?;
        }
        Ok(())
    }

    fn remove_all(&self, kernel: &dyn Kernel, pf: &PfFacts) -> Result<(), DriverError> {
        let of = subsystem(kernel, pf);
        for found in of.secondaries()? {
            let left = namespaces_of(of, found.id)?;
            if !left.is_empty() {
                let nsids = list(left.into_iter().map(|(nsid, _)| nsid));
                let words = format!(
                    "the controller {} of VF {} still has namespace {nsids}, which would be taken \
                     for an erased one without its VF; an administrator has to see to its data, \
                     erase it and detach it (nvme format, nvme detach-ns)",
                    found.id,
                    found.vf.saturating_sub(1)
                );
                return Err(amiss(of, words));
            }
        }
        Ok(kernel.set_num_vfs(pf.address, 0)?)
    }

    fn setup(
        &self,
        kernel: &dyn Kernel,
        pf: &PfFacts,
        vf: &VfFacts,
        want: &VfConfig,
    ) -> Result<(), DriverError> {
        self.capabilities(pf).supports(want)?;
        let of = subsystem(kernel, pf);
        let own = must_have(of, vf.index)?;
        let has = namespaces_of(of, own.id)?;
        let wanted = match want.storage {
            Storage::Namespace(nsid) => Some(nsid),
            Storage::Foreign | Storage::Nothing | Storage::Amiss(_) => None,
        };
        if let Some((nsid, _)) = has.iter().find(|(nsid, _)| Some(*nsid) != wanted) {
            let words = format!(
                "the controller {} of VF {} has namespace {nsid} of somebody else; nothing was \
                 changed: an administrator has to see to its data, erase it and detach it (nvme \
                 format, nvme detach-ns)",
                own.id, vf.index
            );
            return Err(amiss(of, words));
        }
        if let Some(nsid) = wanted {
            alone(of, nsid, own.id)?;
        }
        let share = Share::of(
            of,
            of.primary()?,
            kernel.physical_function(pf.address)?.num_vfs,
        )?;
        resources::ready(of, own, share)?;
        if let Some(nsid) = wanted
            && has.is_empty()
        {
            of.attach(nsid, own.id)?;
        }
        let got = self.settings(kernel, pf, vf.index)?;
        if got == *want {
            return Ok(());
        }
        Err(amiss(
            of,
            format!("VF {} was given {want} and has {got}", vf.index),
        ))
    }

    fn teardown(&self, kernel: &dyn Kernel, pf: &PfFacts, vf: &VfFacts) -> Result<(), DriverError> {
        let of = subsystem(kernel, pf);
        let mut errors = Vec::new();
        // First, so that no command of its last holder comes after the erase.
        if let Err(error) = kernel.reset_function(vf.address) {
            errors.push(error.into());
        }
        if let Err(error) = bare(kernel, of, pf, vf.index, &mut errors) {
            errors.push(error);
        }
        if errors.is_empty() {
            return Ok(());
        }
        Err(DriverError::NotClean {
            vf: vf.address,
            errors,
        })
    }
}

/// The namespace exists, and no controller but this one has it.
fn alone(of: Subsystem<'_>, nsid: u32, id: u16) -> Result<(), DriverError> {
    let all = of.namespaces()?;
    if !all.contains(&nsid) {
        let words = format!("there is no namespace {nsid}; there are {}", list(all));
        return Err(amiss(of, words));
    }
    let others: Vec<u16> = of
        .attached(nsid)?
        .into_iter()
        .filter(|c| *c != id)
        .collect();
    if others.is_empty() {
        return Ok(());
    }
    let words = format!(
        "namespace {nsid} is attached to controller {} already, and a namespace has one user; \
         detach it there first (nvme detach-ns), or name another",
        list(others)
    );
    Err(amiss(of, words))
}

/// Takes all namespaces off the VF's controller, erased, and leaves it ready for the next.
fn bare(
    kernel: &dyn Kernel,
    of: Subsystem<'_>,
    pf: &PfFacts,
    index: u16,
    errors: &mut Vec<DriverError>,
) -> Result<(), DriverError> {
    let own = must_have(of, index)?;
    for (nsid, controllers) in namespaces_of(of, own.id)? {
        erase::take_back(of, nsid, own.id, &controllers, errors);
    }
    let share = Share::of(
        of,
        of.primary()?,
        kernel.physical_function(pf.address)?.num_vfs,
    )?;
    resources::ready(of, own, share)
}

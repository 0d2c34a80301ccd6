//! What differs between PF drivers: one file a backend, behind one trait.
//!
//! A backend says what it can and how VFs come and go; it reaches the hardware
//! through [`Kernel`] alone. Nothing here assumes that VFs are made by a count
//! in sysfs: a backend with [`Growth::OneByOne`] makes single VFs beside used ones.

mod bnxt;
mod capabilities;
mod generic;
mod i40e;
mod ice;
mod igb;
mod ixgbe;
mod mlx5;
mod nvme;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use common::pci::PciAddress;
use thiserror::Error;

use crate::kernel::{Eswitch, Kernel, KernelError, PfFacts, VfConfig, VfFacts};

pub use bnxt::Bnxt;
pub use capabilities::{Capabilities, Growth, Unsupported, supports};
pub use generic::settled;
pub use i40e::I40e;
pub use ice::Ice;
pub use igb::Igb;
pub use ixgbe::Ixgbe;
pub use mlx5::Mlx5;
pub use nvme::Nvme;

/// Why a VF was not made or not made ready.
#[derive(Debug, Error)]
pub enum DriverError {
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The kernel's error, with what this driver means by it and what to do.
    #[error("{error}; {hint}")]
    Explained {
        error: KernelError,
        hint: &'static str,
    },
    /// Every step is tried, so that one failure does not keep the rest dirty.
    #[error("VF {vf} could not be cleaned: {}", list(.errors))]
    NotClean {
        vf: PciAddress,
        errors: Vec<DriverError>,
    },
    /// What an NVMe subsystem cannot do, or what in it keeps from doing it, with what to do.
    #[error("the NVMe subsystem of {pf}: {words}")]
    Storage { pf: PciAddress, words: String },
}

impl DriverError {
    /// The kernel's error number, where it gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel(error) | Self::Explained { error, .. } => error.errno(),
            Self::Unsupported(_) | Self::NotClean { .. } | Self::Storage { .. } => None,
        }
    }
}

fn list(errors: &[DriverError]) -> String {
    let words: Vec<String> = errors.iter().map(ToString::to_string).collect();
    words.join("; ")
}

/// Who has a namespace of an NVMe subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamespaceUser {
    /// The VF of that index.
    Vf(u16),
    /// A controller of another number: the host's own, or one without a VF.
    Controller(u16),
}

/// The namespaces of a PF by number, each with all who have it.
pub type Namespaces = BTreeMap<u32, Vec<NamespaceUser>>;

/// The namespace that the controller of the VF of that index has; the first where it has several.
#[must_use]
pub fn namespace_of(all: &Namespaces, vf: u16) -> Option<u32> {
    let has = |users: &Vec<NamespaceUser>| users.contains(&NamespaceUser::Vf(vf));
    all.iter()
        .find(|(_, users)| has(users))
        .map(|(nsid, _)| *nsid)
}

/// A backend: one family of PFs. What is not said here is done as most drivers have it done
/// (`generic`); a backend is its capabilities and where it departs from that.
pub trait VfDriver: Send + Sync + 'static {
    /// Name of the kernel driver that it stands for.
    fn name(&self) -> &'static str;

    /// Whether this PF is one of its.
    fn matches(&self, pf: &PfFacts) -> bool {
        pf.driver.as_deref() == Some(self.name())
    }

    /// What it can do for this PF: one driver may stand for several chips.
    fn capabilities(&self, pf: &PfFacts) -> Capabilities;

    /// Why this PF, as it is set up, serves nobody, with what to do about it.
    fn unserviceable(&self, pf: &PfFacts) -> Option<&'static str> {
        (pf.eswitch == Some(Eswitch::Switchdev)).then_some(SWITCHDEV)
    }

    /// What this driver means by an error of making VFs, with what to do; `None` where the
    /// error says it all.
    fn explain(&self, _error: &KernelError) -> Option<&'static str> {
        None
    }

    /// Whether VFs of this PF work as far as it is concerned: without the interface of a network
    /// card none has a link.
    fn is_up(&self, pf: &PfFacts) -> bool {
        pf.up
    }

    /// The settings of the VF of that index, as they are.
    ///
    /// # Errors
    /// The kernel's, with errno; [`KernelError::NoSuchVf`] also of one that is being reset.
    fn settings(
        &self,
        kernel: &dyn Kernel,
        pf: &PfFacts,
        index: u16,
    ) -> Result<VfConfig, KernelError> {
        kernel.vf_config(pf, index)
    }

    /// The namespaces that there are to give; none of a network card.
    ///
    /// # Errors
    /// The kernel's, with errno.
    fn namespaces(&self, _kernel: &dyn Kernel, _pf: &PfFacts) -> Result<Namespaces, KernelError> {
        Ok(Namespaces::new())
    }

    /// Erases a namespace of a claim that goes, where its VF's controller has not got it (any
    /// more), so that [`VfDriver::teardown`] does not. `vf` is the index of that VF.
    ///
    /// # Errors
    /// Whatever keeps it from being erased.
    fn reclaim(
        &self,
        _kernel: &dyn Kernel,
        _pf: &PfFacts,
        _vf: u16,
        _namespace: u32,
    ) -> Result<(), DriverError> {
        Ok(())
    }

    /// Makes VFs so that at least `count` exist, and takes the PF up. The caller has planned
    /// it ([`crate::node::pool`]) and holds the PF's turn.
    ///
    /// # Errors
    /// The kernel's, with errno; [`KernelError::VfCount`] when it made another number.
    fn create(&self, kernel: &dyn Kernel, pf: &PfFacts, count: u16) -> Result<(), DriverError> {
        generic::create_by_count(kernel, pf, count).map_err(|error| self.explained(error))?;
        generic::link_up(kernel, pf)
    }

    /// Takes all VFs away. The caller has proven every one of them free.
    ///
    /// # Errors
    /// The kernel's, with errno.
    fn remove_all(&self, kernel: &dyn Kernel, pf: &PfFacts) -> Result<(), DriverError> {
        generic::create_by_count(kernel, pf, 0).map_err(|error| self.explained(error))
    }

    /// Gives the VF what was admitted, and reads it back.
    ///
    /// # Errors
    /// A setting that the driver does not have, or the kernel's refusal.
    fn setup(
        &self,
        kernel: &dyn Kernel,
        pf: &PfFacts,
        vf: &VfFacts,
        want: &VfConfig,
    ) -> Result<(), DriverError> {
        generic::configure(kernel, pf, vf, want, &self.capabilities(pf))
    }

    /// Takes everything of its last holder off the VF and resets it. The caller
    /// holds the VF's group.
    ///
    /// # Errors
    /// [`DriverError::NotClean`] with all that failed.
    fn teardown(&self, kernel: &dyn Kernel, pf: &PfFacts, vf: &VfFacts) -> Result<(), DriverError> {
        generic::clean(kernel, pf, vf, &self.capabilities(pf))
    }

    /// The error with what [`VfDriver::explain`] knows of it.
    #[doc(hidden)]
    fn explained(&self, error: KernelError) -> DriverError {
        match self.explain(&error) {
            // One that has not come back is no refusal, and the callers look for it.
            Some(hint) if !matches!(error, KernelError::Stuck { .. }) => {
                DriverError::Explained { error, hint }
            }
            _ => error.into(),
        }
    }
}

/// In switchdev mode a VF's traffic goes where its representor's rules send it, and nobody
/// here makes such rules; VLANs by the PF are refused (mlx5_eswitch_set_vport_vlan).
const SWITCHDEV: &str = "its eswitch is in switchdev mode, in which a VF reaches nothing without \
     rules that nobody here makes; an administrator has to set the mode to legacy while it has \
     no VFs (devlink dev eswitch set pci/ADDRESS mode legacy)";

/// The backends. A new one is one file and one line here; see `docs/drivers.md`.
const DRIVERS: [&dyn VfDriver; 7] = [&Igb, &Ixgbe, &I40e, &Ice, &Mlx5, &Bnxt, &Nvme];

/// The backend of this PF; `None`: not supported, to be left alone.
#[must_use]
pub fn driver_for(pf: &PfFacts) -> Option<&'static dyn VfDriver> {
    DRIVERS.into_iter().find(|driver| driver.matches(pf))
}

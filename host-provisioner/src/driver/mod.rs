//! What differs between PF drivers: one file a backend, behind one trait.
//!
//! A backend says what it can and how VFs come and go; it reaches the hardware
//! through [`Kernel`] alone. Nothing here assumes that VFs are made by a count
//! in sysfs: a backend with [`Growth::OneByOne`] makes single VFs beside used ones.

mod capabilities;
mod generic;
mod igb;
#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::kernel::{Kernel, KernelError, PfFacts, VfConfig, VfFacts};

pub use capabilities::{Capabilities, Growth, Unsupported, supports};
pub use generic::{configure, create_by_count};
pub use igb::Igb;

/// Why a VF was not made or not made ready.
#[derive(Debug, Error)]
pub enum DriverError {
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Every step is tried, so that one failure does not keep the rest dirty.
    #[error("VF {vf} could not be cleaned: {}", list(.errors))]
    NotClean {
        vf: common::pci::PciAddress,
        errors: Vec<KernelError>,
    },
}

fn list(errors: &[KernelError]) -> String {
    let words: Vec<String> = errors.iter().map(ToString::to_string).collect();
    words.join("; ")
}

/// A backend: one family of PFs.
pub trait VfDriver: Send + Sync + 'static {
    /// Name of the kernel driver that it stands for.
    fn name(&self) -> &'static str;

    /// Whether this PF is one of its.
    fn matches(&self, pf: &PfFacts) -> bool {
        pf.driver.as_deref() == Some(self.name())
    }

    /// What it can do for this PF: one driver may stand for several chips.
    fn capabilities(&self, pf: &PfFacts) -> Capabilities;

    /// Makes VFs so that at least `count` exist. The caller has planned it
    /// ([`crate::node::pool`]) and holds the PF's turn.
    ///
    /// # Errors
    /// The kernel's, with errno; [`KernelError::VfCount`] when it made another number.
    fn create(&self, kernel: &dyn Kernel, pf: &PfFacts, count: u16) -> Result<(), DriverError>;

    /// Takes all VFs away. The caller has proven every one of them free.
    ///
    /// # Errors
    /// The kernel's, with errno.
    fn remove_all(&self, kernel: &dyn Kernel, pf: &PfFacts) -> Result<(), DriverError>;

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
    ) -> Result<(), DriverError>;

    /// Takes everything of its last holder off the VF and resets it. The caller
    /// holds the VF's group.
    ///
    /// # Errors
    /// [`DriverError::NotClean`] with all that failed.
    fn teardown(&self, kernel: &dyn Kernel, pf: &PfFacts, vf: &VfFacts) -> Result<(), DriverError>;
}

/// The backend of this PF; `None`: not supported, to be left alone.
#[must_use]
pub fn driver_for(pf: &PfFacts) -> Option<&'static dyn VfDriver> {
    const DRIVERS: [&dyn VfDriver; 1] = [&Igb];
    DRIVERS.into_iter().find(|driver| driver.matches(pf))
}

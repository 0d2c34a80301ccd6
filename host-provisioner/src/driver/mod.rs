//! What differs between PF drivers: one file a backend, behind one trait.
//!
//! A backend says what it can and how VFs come and go; it reaches the hardware
//! through [`Kernel`] alone. Nothing here assumes that VFs are made by a count
//! in sysfs: a backend with [`Growth::OneByOne`] makes single VFs beside used ones.

mod generic;
mod igb;
#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::kernel::{Kernel, KernelError, PfFacts, VfConfig, VfFacts};

pub use generic::{configure, create_by_count};
pub use igb::Igb;

/// How a backend's VFs come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// All at once, from none: `sriov_numvfs` goes 0 -> N or N -> 0 only.
    AllAtOnce,
    /// Each by itself, beside VFs in use.
    OneByOne,
}

/// What a backend can set. Planners refuse by it, before anything is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The backend's name, for messages.
    pub driver: &'static str,
    pub growth: Growth,
    pub vlan: bool,
    pub spoof_check: bool,
    pub trust: bool,
    /// The driver takes the zero MAC, that is, "none given"; i40e does not.
    pub zero_mac: bool,
}

impl Capabilities {
    /// Whether every setting of `want` can be made.
    ///
    /// # Errors
    /// [`Unsupported`] names the first setting that cannot.
    pub fn supports(&self, want: &VfConfig) -> Result<(), Unsupported> {
        let no = |setting: &'static str| {
            Err(Unsupported {
                driver: self.driver,
                setting,
            })
        };
        if want.mac.is_multicast() {
            return no("a multicast MAC address");
        }
        if want.mac.is_zero() && !self.zero_mac {
            return no("an empty MAC address");
        }
        if want.vlan.is_some() && !self.vlan {
            return no("a VLAN");
        }
        if want.spoof_check && !self.spoof_check {
            return no("the spoof check");
        }
        if want.trust && !self.trust {
            return no("trust");
        }
        match want.vlan {
            Some(tag) if !(1..=4094).contains(&tag.id) => no("a VLAN outside 1 to 4094"),
            Some(tag) if tag.qos > 7 => no("a VLAN priority above 7"),
            _ => Ok(()),
        }
    }

    /// The settings of a VF that nobody holds, as near to [`VfConfig::CLEAN`]
    /// as the driver has them. A backend without `zero_mac` has to choose an
    /// address in its own teardown.
    #[must_use]
    pub fn clean(&self) -> VfConfig {
        VfConfig {
            spoof_check: self.spoof_check,
            ..VfConfig::CLEAN
        }
    }
}

/// A setting that the PF's driver does not have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("driver {driver} cannot set {setting}")]
pub struct Unsupported {
    pub driver: &'static str,
    pub setting: &'static str,
}

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

    fn capabilities(&self) -> Capabilities;

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

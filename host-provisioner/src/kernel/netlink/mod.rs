//! What is asked of rtnetlink, behind a trait so that everything above it is
//! tested without a card. `socket` speaks to the kernel, `parse` reads its
//! answers and does no I/O, `devlink` writes and reads what is not rtnetlink.

mod devlink;
mod parse;
mod socket;

use std::fmt;

use common::api::LinkState;
use common::pci::PciAddress;

use super::{Eswitch, KernelError, MacAddr, TxRate, VfConfig, VlanTag};

pub use parse::changed_links;
#[cfg(feature = "fuzzing")]
pub use parse::{Answers, End, Fault, default_route, global_address, link, vf};
pub use socket::RtNetlink;

/// A network interface, as far as we care.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// Administratively up.
    pub up: bool,
    pub mac: Option<MacAddr>,
    pub permanent_mac: Option<MacAddr>,
    /// The bond, bridge, team or VRF that it is part of.
    pub master: Option<u32>,
    /// The interface below it, of a VLAN or macvlan in this network namespace.
    pub lower: Option<u32>,
    /// `bond`, `bridge`, `vlan`, ...; absent for hardware.
    pub kind: Option<String>,
}

/// Who uses which interface for the host's own traffic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetUse {
    pub links: Vec<Link>,
    /// Interface index and address, global scope only, with prefix length.
    pub addresses: Vec<(u32, String)>,
    /// Indexes of the interfaces that a default route leaves by.
    pub default_routes: Vec<u32>,
}

/// One setting of a VF: a request of its own, so that a refusal names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VfSetting {
    Mac(MacAddr),
    Vlan(Option<VlanTag>),
    SpoofCheck(bool),
    LinkState(LinkState),
    Trust(bool),
    /// Both bounds are one request of the kernel's.
    Rate(TxRate),
}

impl VfSetting {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mac(_) => "MAC",
            Self::Vlan(_) => "VLAN",
            Self::SpoofCheck(_) => "spoof check",
            Self::LinkState(_) => "link state",
            Self::Trust(_) => "trust",
            Self::Rate(_) => "transmit rate",
        }
    }

    pub fn value(self) -> String {
        match self {
            Self::Mac(mac) => mac.to_string(),
            Self::Vlan(None) => "none".to_owned(),
            Self::Vlan(Some(tag)) => tag.to_string(),
            Self::SpoofCheck(on) | Self::Trust(on) => if on { "on" } else { "off" }.to_owned(),
            Self::LinkState(state) => state.to_string(),
            Self::Rate(rate) => rate.to_string(),
        }
    }

    /// Every setting of `config`. Trust comes late: the rest holds before a guest
    /// may change anything. The rate is behind it, because drivers refuse one while they have
    /// no link, and that must keep nothing else from being set.
    pub const fn all(config: &VfConfig) -> [Self; 6] {
        [
            Self::Mac(config.mac),
            Self::Vlan(config.vlan),
            Self::SpoofCheck(config.spoof_check),
            Self::LinkState(config.link_state),
            Self::Trust(config.trust),
            Self::Rate(config.rate),
        ]
    }

    /// What a person can do about a refusal of this setting with this errno; empty where the
    /// errno says it all. Drivers give a reason in the kernel's log alone.
    pub const fn hint(self, errno: i32) -> &'static str {
        match (self, errno) {
            // igb, ixgbe, i40e, ice and bnxt_en compare it with the speed of their link, which
            // is 0 while there is none.
            (Self::Rate(_), libc::EINVAL) => {
                "; a rate can be set only while the physical function has a link, and up to the link's speed"
            }
            (Self::Vlan(_), libc::EPROTONOSUPPORT) => {
                "; the card does not have this VLAN protocol as it is set up, use 802.1Q"
            }
            (Self::Vlan(_) | Self::Rate(_), libc::EPERM | libc::EOPNOTSUPP) => {
                "; the card's firmware or its eswitch mode does not allow it"
            }
            _ => "",
        }
    }
}

/// The questions and orders.
pub trait Netlink: Send + Sync + fmt::Debug + 'static {
    /// Links, addresses and default routes.
    fn net_use(&self) -> Result<NetUse, KernelError>;
    /// One VF as the kernel has it.
    fn vf(&self, interface: &str, index: u16) -> Result<VfConfig, KernelError>;
    fn set_vf(&self, interface: &str, index: u16, setting: VfSetting) -> Result<(), KernelError>;
    fn is_up(&self, interface: &str) -> Result<bool, KernelError>;
    fn set_up(&self, interface: &str) -> Result<(), KernelError>;
    /// Mode of a PF's eswitch; `None` where its driver has no choice of it.
    fn eswitch(&self, pf: PciAddress) -> Result<Option<Eswitch>, KernelError>;
}

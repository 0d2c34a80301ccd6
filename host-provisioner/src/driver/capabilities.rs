//! What a PF's driver can set on its VFs. Planners refuse by it, before anything is touched,
//! and the node's report shows it. Pure.

use std::fmt;

use common::api::{LinkState, VfCapabilities, VlanProtocol};
use common::pci::PciAddress;
use thiserror::Error;

use crate::kernel::{MacAddr, Storage, VfConfig};

/// How a backend's VFs come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// All at once, from none: `sriov_numvfs` goes 0 -> N or N -> 0 only.
    AllAtOnce,
    /// Each by itself, beside VFs in use.
    OneByOne,
}

/// What a backend can do for one of its PFs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The backend's name, for messages.
    pub driver: &'static str,
    pub growth: Growth,
    /// The driver takes the zero MAC, that is, "none given", and reports it again.
    pub zero_mac: bool,
    pub settings: VfCapabilities,
}

impl Capabilities {
    /// Whether every setting of `want` can be made.
    ///
    /// # Errors
    /// [`Unsupported`] names the first setting that cannot.
    pub fn supports(&self, want: &VfConfig) -> Result<(), Unsupported> {
        let refused = |setting| {
            Err(Unsupported {
                driver: self.driver.to_owned(),
                setting,
                can: None,
            })
        };
        match (self.settings.namespaces, want.storage) {
            (true, Storage::Foreign) => return refused("what a network interface has"),
            (true, Storage::Amiss(what)) => return refused(what),
            (true, Storage::Nothing | Storage::Namespace(_)) => {
                return match *want == VfConfig::of_storage(want.storage) {
                    true => Ok(()),
                    false => refused("what a network interface has"),
                };
            }
            (false, Storage::Foreign) => {}
            (false, _) => return refused("a namespace"),
        }
        if want.mac.is_zero() && !self.zero_mac {
            return refused("an empty MAC address");
        }
        supports(self.driver, &self.settings, want)
    }

    /// The settings of a VF that nobody holds, as near to [`VfConfig::CLEAN`]
    /// as the driver has them.
    #[must_use]
    pub fn clean(&self, vf: PciAddress) -> VfConfig {
        if self.settings.namespaces {
            return VfConfig::of_storage(Storage::Nothing);
        }
        VfConfig {
            mac: if self.zero_mac {
                MacAddr::ZERO
            } else {
                parked(vf)
            },
            spoof_check: self.settings.spoof_check,
            ..VfConfig::CLEAN
        }
    }
}

/// The MAC of a VF that nobody holds, where the driver does not take or not tell the zero
/// one: locally administered, and the VF's own. Nothing sends from it.
fn parked(vf: PciAddress) -> MacAddr {
    let [domain, _] = vf.domain().to_le_bytes();
    MacAddr([
        0x02,
        0x56,
        0x46,
        domain,
        vf.bus(),
        (vf.slot() << 3) | vf.function(),
    ])
}

/// A setting that the PF's driver does not have.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub struct Unsupported {
    pub driver: String,
    pub setting: &'static str,
    /// What it has; absent where no driver can do what was asked.
    pub can: Option<VfCapabilities>,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "driver {} cannot set {}", self.driver, self.setting)?;
        match &self.can {
            Some(can) => write!(f, "; it can set {}", words(can)),
            None => Ok(()),
        }
    }
}

/// Whether a driver that can set `can` can make every setting of `want`.
///
/// # Errors
/// [`Unsupported`] names the first setting that it cannot.
pub fn supports(driver: &str, can: &VfCapabilities, want: &VfConfig) -> Result<(), Unsupported> {
    let refused = |setting, can| {
        Err(Unsupported {
            driver: driver.to_owned(),
            setting,
            can,
        })
    };
    if let Some(setting) = nobodys(want) {
        return refused(setting, None);
    }
    match missing(can, want) {
        Some(setting) => refused(setting, Some(*can)),
        None => Ok(()),
    }
}

/// What no driver can set.
fn nobodys(want: &VfConfig) -> Option<&'static str> {
    let tag = want.vlan;
    if want.mac.is_multicast() {
        return Some("a multicast MAC address");
    }
    if tag.is_some_and(|tag| !(1..=4094).contains(&tag.id)) {
        return Some("a VLAN outside 1 to 4094");
    }
    if tag.is_some_and(|tag| tag.qos > 7) {
        return Some("a VLAN priority above 7");
    }
    if want.rate.max != 0 && want.rate.min > want.rate.max {
        return Some("a minimum transmit rate above the maximum");
    }
    None
}

fn missing(can: &VfCapabilities, want: &VfConfig) -> Option<&'static str> {
    if let Some(tag) = want.vlan {
        if !can.vlan {
            return Some("a VLAN");
        }
        if tag.qos != 0 && !can.vlan_qos {
            return Some("a VLAN priority");
        }
        if tag.protocol == VlanProtocol::Ieee8021Ad && !can.vlan_8021ad {
            return Some("a VLAN of protocol 802.1ad");
        }
    }
    if want.spoof_check && !can.spoof_check {
        return Some("the spoof check");
    }
    if want.trust && !can.trust {
        return Some("trust");
    }
    match want.link_state {
        LinkState::Auto => {}
        LinkState::Enable if can.link_enable => {}
        LinkState::Disable if can.link_disable => {}
        LinkState::Enable => return Some("link state Enable"),
        LinkState::Disable => return Some("link state Disable"),
    }
    if want.rate.min != 0 && !can.min_tx_rate {
        return Some("a minimum transmit rate");
    }
    match can.max_tx_rate_from_mbps {
        _ if want.rate.max == 0 => None,
        None => Some("a maximum transmit rate"),
        Some(least) if want.rate.max < least => Some("so low a maximum transmit rate"),
        Some(_) => None,
    }
}

/// What can be set, for a sentence.
#[must_use]
pub fn words(can: &VfCapabilities) -> String {
    let vlan = match (can.vlan, can.vlan_8021ad) {
        (false, _) => None,
        (true, false) => Some("a VLAN (802.1Q)"),
        (true, true) => Some("a VLAN (802.1Q or 802.1ad)"),
    };
    let link = match (can.link_enable, can.link_disable) {
        (false, false) => None,
        (true, false) => Some("link state Enable"),
        (false, true) => Some("link state Disable"),
        (true, true) => Some("the link state"),
    };
    let named = [
        (true, Some("a MAC address".to_owned())),
        (true, vlan.map(str::to_owned)),
        (can.vlan_qos, Some("its priority".to_owned())),
        (can.spoof_check, Some("the spoof check".to_owned())),
        (can.trust, Some("trust".to_owned())),
        (true, link.map(str::to_owned)),
        (can.min_tx_rate, Some("a minimum transmit rate".to_owned())),
        (
            true,
            can.max_tx_rate_from_mbps.map(|least| match least {
                0 | 1 => "a maximum transmit rate".to_owned(),
                least => format!("a maximum transmit rate from {least} Mbit/s on"),
            }),
        ),
    ];
    let named: Vec<String> = named
        .into_iter()
        .filter_map(|(can, words)| words.filter(|_| can))
        .collect();
    named.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{TxRate, VlanTag};

    const ALL: VfCapabilities = VfCapabilities {
        vlan: true,
        vlan_qos: true,
        vlan_8021ad: true,
        spoof_check: true,
        trust: true,
        link_enable: true,
        link_disable: true,
        min_tx_rate: true,
        max_tx_rate_from_mbps: Some(1),
        namespaces: false,
    };

    /// Everything that can be asked for.
    const WANT: VfConfig = VfConfig {
        vlan: Some(VlanTag {
            id: 5,
            qos: 1,
            protocol: VlanProtocol::Ieee8021Ad,
        }),
        trust: true,
        link_state: LinkState::Disable,
        rate: TxRate { min: 10, max: 20 },
        ..VfConfig::CLEAN
    };

    #[test]
    fn what_is_not_there_is_named_and_what_is_there_with_it() {
        assert_eq!(supports("x", &ALL, &WANT), Ok(()));
        let enable = VfConfig {
            link_state: LinkState::Enable,
            ..WANT
        };
        type Lack = fn(&mut VfCapabilities);
        let cases: [(Lack, VfConfig, &str); 10] = [
            (|c| c.vlan = false, WANT, "a VLAN"),
            (|c| c.vlan_qos = false, WANT, "a VLAN priority"),
            (
                |c| c.vlan_8021ad = false,
                WANT,
                "a VLAN of protocol 802.1ad",
            ),
            (|c| c.spoof_check = false, WANT, "the spoof check"),
            (|c| c.trust = false, WANT, "trust"),
            (|c| c.link_disable = false, WANT, "link state Disable"),
            (|c| c.link_enable = false, enable, "link state Enable"),
            (|c| c.min_tx_rate = false, WANT, "a minimum transmit rate"),
            (
                |c| c.max_tx_rate_from_mbps = None,
                WANT,
                "a maximum transmit rate",
            ),
            (
                |c| c.max_tx_rate_from_mbps = Some(21),
                WANT,
                "so low a maximum transmit rate",
            ),
        ];
        for (lack, want, setting) in cases {
            let mut can = ALL;
            lack(&mut can);
            let refused = supports("x", &can, &want).unwrap_err();
            assert_eq!(refused.setting, setting);
            assert!(refused.to_string().contains("; it can set a MAC address"));
        }
        // Nothing of it is asked for by who asks for nothing.
        let none = VfCapabilities::default();
        let nothing = VfConfig {
            spoof_check: false,
            ..VfConfig::CLEAN
        };
        assert_eq!(supports("x", &none, &nothing), Ok(()));
        assert_eq!(words(&none), "a MAC address");
    }

    #[test]
    fn what_nobody_can_is_said_without_a_list() {
        let reversed = VfConfig {
            rate: TxRate { min: 30, max: 20 },
            ..WANT
        };
        assert_eq!(
            supports("x", &ALL, &reversed).unwrap_err().to_string(),
            "driver x cannot set a minimum transmit rate above the maximum"
        );
    }

    #[test]
    fn storage_and_network_do_not_mix() {
        let network = Capabilities {
            driver: "x",
            growth: Growth::AllAtOnce,
            zero_mac: true,
            settings: ALL,
        };
        let storage = Capabilities {
            settings: VfCapabilities {
                namespaces: true,
                ..VfCapabilities::default()
            },
            ..network
        };
        let vf = "0000:01:10.0".parse().unwrap();
        let namespace = VfConfig::of_storage(Storage::Namespace(1));
        assert_eq!(storage.supports(&namespace), Ok(()));
        assert_eq!(storage.supports(&storage.clean(vf)), Ok(()));
        let refused = |can: Capabilities, want: &VfConfig| can.supports(want).unwrap_err().setting;
        assert_eq!(refused(network, &namespace), "a namespace");
        let both = VfConfig {
            vlan: Some(VlanTag::new(5, 0)),
            ..namespace
        };
        for want in [VfConfig::CLEAN, WANT, both] {
            assert_eq!(refused(storage, &want), "what a network interface has");
        }
        let amiss = VfConfig::of_storage(Storage::Amiss("two of them"));
        assert_eq!(refused(storage, &amiss), "two of them");
    }

    #[test]
    fn a_parked_vf_has_an_address_of_its_own() {
        let park = |text: &str| parked(text.parse().unwrap());
        let one = park("0000:01:10.2");
        assert_eq!(one.to_string(), "02:56:46:00:01:82");
        assert!(!one.is_multicast());
        assert_ne!(one, park("0000:01:10.4"));
        assert_ne!(one, park("0001:01:10.2"));
    }
}

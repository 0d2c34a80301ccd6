//! How each PF driver answers a setting of a VF, as their source says
//! (drivers/net/ethernet/...; the functions are named at each).

use common::api::{LinkState, VlanProtocol};

use crate::kernel::netlink::VfSetting;
use crate::kernel::{Eswitch, MacAddr, PfFacts, TxRate, VfConfig};

/// What a driver goes by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pf<'a> {
    pub driver: &'a str,
    /// Device id of the PF.
    pub device: u16,
    /// Speed of its link in Mbit/s; 0 while it has none.
    pub speed: u32,
    /// ice: the card's package does 802.1ad.
    pub double_vlan: bool,
    /// The eswitch is in switchdev mode.
    pub switchdev: bool,
}

impl<'a> Pf<'a> {
    pub(super) fn of(facts: &'a PfFacts, speed: u32, double_vlan: bool) -> Self {
        Self {
            driver: facts.driver.as_deref().unwrap_or_default(),
            device: facts.device.0,
            speed: if facts.up { speed } else { 0 },
            double_vlan,
            switchdev: facts.eswitch == Some(Eswitch::Switchdev),
        }
    }
}

/// The 82576 that QEMU emulates; the I350 limits no rates.
const IGB_82576: u16 = 0x10c9;

/// Makes the setting, or says the errno.
pub(super) fn set(pf: Pf<'_>, vf: &mut VfConfig, setting: VfSetting) -> Result<(), i32> {
    match setting {
        VfSetting::Mac(mac) => vf.mac = mac_of(pf.driver, mac)?,
        VfSetting::Vlan(tag) => {
            let tag = tag.filter(|tag| tag.id != 0 || tag.qos != 0);
            if tag.is_some_and(|tag| tag.id > 4095 || tag.qos > 7) {
                return Err(libc::EINVAL);
            }
            match (pf.driver, tag) {
                // mlx5_eswitch_set_vport_vlan: taking one away is let pass.
                ("mlx5_core", Some(_)) if pf.switchdev => return Err(libc::EOPNOTSUPP),
                // ice_is_supported_port_vlan_proto: in double VLAN mode.
                ("ice", _) if pf.double_vlan => {}
                (_, Some(tag)) if tag.protocol == VlanProtocol::Ieee8021Ad => {
                    return Err(libc::EPROTONOSUPPORT);
                }
                // bnxt_set_vf_vlan
                ("bnxt_en", Some(tag)) if tag.qos != 0 => return Err(libc::EINVAL),
                _ => {}
            }
            vf.vlan = tag;
        }
        VfSetting::SpoofCheck(on) => vf.spoof_check = on,
        VfSetting::LinkState(state) => match (pf.driver, state) {
            // No ndo_set_vf_link_state.
            ("igb", _) => return Err(libc::EOPNOTSUPP),
            // ixgbe_ndo_set_vf_link_state: a success that does nothing.
            ("ixgbe", LinkState::Enable) => {}
            (_, state) => vf.link_state = state,
        },
        VfSetting::Trust(on) => vf.trust = on,
        VfSetting::Rate(rate) => vf.rate = rate_of(pf, rate)?,
    }
    Ok(())
}

fn mac_of(driver: &str, mac: MacAddr) -> Result<MacAddr, i32> {
    match (driver, mac.is_zero()) {
        _ if mac.is_multicast() => Err(libc::EINVAL),
        // i40e_ndo_set_vf_mac, as it was before it took the zero address.
        ("i40e", true) => Err(libc::EINVAL),
        // bnxt_get_vf_config: without an administrator's it tells the VF's own.
        ("bnxt_en", true) => Ok(MacAddr([0xba, 0, 0, 0, 0, 1])),
        _ => Ok(mac),
    }
}

fn rate_of(pf: Pf<'_>, rate: TxRate) -> Result<TxRate, i32> {
    // do_setvfinfo (net/core/rtnetlink.c)
    if rate.max != 0 && rate.min > rate.max {
        return Err(libc::EINVAL);
    }
    let TxRate { min, max } = rate;
    let refused = match pf.driver {
        // igb_ndo_set_vf_bw; taking a limit away needs a link too.
        "igb" if pf.device != IGB_82576 => return Err(libc::EOPNOTSUPP),
        "igb" => min != 0 || pf.speed == 0 || max > pf.speed,
        // ixgbe_ndo_set_vf_bw
        "ixgbe" => min != 0 || pf.speed != 10_000 || (1..=10).contains(&max) || max > pf.speed,
        // i40e_ndo_set_vf_bw, i40e_set_bw_limit
        "i40e" => min != 0 || max > pf.speed,
        // ice_set_vf_bw, bnxt_set_vf_bw
        "ice" | "bnxt_en" => min > pf.speed || max > pf.speed,
        // mlx5_eswitch_set_vport_rate
        _ => false,
    };
    if refused { Err(libc::EINVAL) } else { Ok(rate) }
}

/// Whether the driver forgets the rates when its link has another speed
/// (igb_check_vf_rate_limit, ixgbe_check_vf_rate_limit).
pub(super) fn forgets_rates(driver: &str) -> bool {
    matches!(driver, "igb" | "ixgbe")
}

/// The number of VFs that the driver makes when it is asked for `count`.
pub(super) fn made(driver: &str, up: bool, count: u16) -> u16 {
    match driver {
        // bnxt_sriov_configure: a success with none.
        "bnxt_en" if !up => 0,
        _ => count,
    }
}

/// The errno of a VF that is still being reset (i40e_check_vf_init_timeout,
/// ice_check_vf_ready_for_cfg).
pub(super) fn in_reset(driver: &str) -> i32 {
    match driver {
        "ice" => libc::EBUSY,
        _ => libc::EAGAIN,
    }
}

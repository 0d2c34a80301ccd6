//! `igb`: Intel 82576 and I350. VFs by count; settings by netlink on the PF's
//! interface.
//!
//! Its manners (drivers/net/ethernet/intel/igb/igb_main.c):
//! - a change of the count closes and reopens the PF's netdev, so the link is
//!   taken up after it, not before;
//! - a VF's MAC is handed to the guest only while the PF's interface is up;
//!   with it down the setting is accepted and igbvf makes up a random address;
//! - the zero MAC takes the administrative one away again;
//! - 802.1Q only, no link state, no minimum rate (`igb_ndo_set_vf_vlan`, `igb_ndo_set_vf_bw`);
//! - a maximum rate on the 82576 alone; it is set and taken away only while there is a link,
//!   up to the link's speed, and forgotten when the link comes back with another speed
//!   (`igb_check_vf_rate_limit`), which is then seen as drift.

use common::api::VfCapabilities;

use crate::kernel::PfFacts;

use super::{Capabilities, Growth, VfDriver};

/// Device ids of the 82576 in its forms (`E1000_DEV_ID_82576*` in e1000_hw.h). The other chip
/// with VFs is the I350.
const E1000_82576: [u16; 8] = [
    0x10c9, 0x10e6, 0x10e7, 0x10e8, 0x150a, 0x150d, 0x1518, 0x1526,
];

#[derive(Clone, Copy, Debug)]
pub struct Igb;

impl VfDriver for Igb {
    fn name(&self) -> &'static str {
        "igb"
    }

    fn capabilities(&self, pf: &PfFacts) -> Capabilities {
        Capabilities {
            driver: "igb",
            growth: Growth::AllAtOnce,
            zero_mac: true,
            settings: VfCapabilities {
                vlan: true,
                vlan_qos: true,
                spoof_check: true,
                trust: true,
                max_tx_rate_from_mbps: E1000_82576.contains(&pf.device.0).then_some(1),
                ..VfCapabilities::default()
            },
        }
    }
}

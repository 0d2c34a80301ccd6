//! `mlx5_core`: NVIDIA (Mellanox) ConnectX-4 and later, BlueField, with Ethernet ports and the
//! eswitch in legacy mode.
//!
//! Its manners (drivers/net/ethernet/mellanox/mlx5/core: sriov.c, eswitch.c,
//! esw/legacy.c, en_main.c):
//! - how many VFs there can be is set in the card's firmware (NUM_OF_VFS, with mstconfig, and a
//!   reset); making them takes the firmware seconds;
//! - the zero MAC is taken (`mlx5_eswitch_set_vport_mac`), with a warning while the spoof
//!   check is on. The guest's driver asks for its MAC when it is loaded;
//! - 802.1Q only (`mlx5e_set_vf_vlan`), all link states, both rates
//!   (`mlx5_eswitch_set_vport_rate`; EOPNOTSUPP where the firmware has no QoS);
//! - new VFs have no spoof check;
//! - in switchdev mode a VLAN is EOPNOTSUPP, and a VF reaches nothing without rules for its
//!   representor; the mode is asked for by devlink, and the PF refused;
//! - on an InfiniBand port there are GUIDs instead of MACs: refused.

use common::api::VfCapabilities;

use crate::kernel::{Eswitch, PfFacts};

use super::{Capabilities, Growth, SWITCHDEV, VfDriver};

#[derive(Clone, Copy, Debug)]
pub struct Mlx5;

impl VfDriver for Mlx5 {
    fn name(&self) -> &'static str {
        "mlx5_core"
    }

    fn capabilities(&self, _pf: &PfFacts) -> Capabilities {
        Capabilities {
            driver: "mlx5_core",
            growth: Growth::AllAtOnce,
            zero_mac: true,
            settings: VfCapabilities {
                vlan: true,
                vlan_qos: true,
                spoof_check: true,
                trust: true,
                link_enable: true,
                link_disable: true,
                min_tx_rate: true,
                max_tx_rate_from_mbps: Some(1),
                ..VfCapabilities::default()
            },
        }
    }

    fn unserviceable(&self, pf: &PfFacts) -> Option<&'static str> {
        if pf.eswitch == Some(Eswitch::Switchdev) {
            return Some(SWITCHDEV);
        }
        // Its link layer's addresses have 20 bytes, which are no MAC.
        (pf.interface.is_some() && pf.mac.is_none()).then_some(
            "its port is not Ethernet; an administrator can set the port's type in the card's \
             firmware (LINK_TYPE, with mstconfig)",
        )
    }
}

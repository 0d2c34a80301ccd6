//! `ixgbe`: Intel 82599, X540, X550.
//!
//! Its manners (drivers/net/ethernet/intel/ixgbe/ixgbe_sriov.c):
//! - 63 VFs at most, fewer with traffic classes, and EPERM beyond (`ixgbe_pci_sriov_enable`);
//!   a change of the count sets the PF's queues up anew, so its link goes and comes;
//! - the zero MAC takes the administrative one away again (`ixgbe_ndo_set_vf_mac`);
//! - 802.1Q only (`ixgbe_ndo_set_vf_vlan`);
//! - link state Disable and Auto; Enable is a success that does nothing
//!   (`ixgbe_ndo_set_vf_link_state`). Kernels before 5.18 have none, and what was set is told
//!   by later ones only: there the readback says that it does not hold;
//! - a maximum rate at a link of 10 Gbit/s alone, above 10 Mbit/s, never a minimum
//!   (`ixgbe_ndo_set_vf_bw`), and forgotten when the link comes back with another speed;
//! - a change of trust or link state restarts the guest's driver.

use common::api::VfCapabilities;

use crate::kernel::{KernelError, PfFacts};

use super::{Capabilities, Growth, VfDriver};

#[derive(Clone, Copy, Debug)]
pub struct Ixgbe;

impl VfDriver for Ixgbe {
    fn name(&self) -> &'static str {
        "ixgbe"
    }

    fn capabilities(&self, _pf: &PfFacts) -> Capabilities {
        Capabilities {
            driver: "ixgbe",
            growth: Growth::AllAtOnce,
            zero_mac: true,
            settings: VfCapabilities {
                vlan: true,
                vlan_qos: true,
                spoof_check: true,
                trust: true,
                link_disable: true,
                max_tx_rate_from_mbps: Some(11),
                ..VfCapabilities::default()
            },
        }
    }

    fn explain(&self, error: &KernelError) -> Option<&'static str> {
        (error.errno() == Some(libc::EPERM)).then_some(
            "with traffic classes (DCB) the card has fewer VFs than it says; an administrator \
             can set numVFs of that PhysicalFunction to less",
        )
    }
}

//! `i40e`: Intel X710, XL710, X722.
//!
//! Its manners (drivers/net/ethernet/intel/i40e/i40e_virtchnl_pf.c):
//! - 64 VFs take about 22 s to make; EAGAIN while another change is under way
//!   (`i40e_pci_sriov_configure`), EPERM when the card has fewer to give;
//! - a VF that was reset answers EAGAIN until it is ready (`i40e_check_vf_init_timeout`);
//!   changes of MAC, VLAN and trust reset it, and what was set survives that
//!   (`i40e_reset_vf`): the guest's link goes and comes;
//! - older kernels refuse the zero MAC, later ones take it (`i40e_ndo_set_vf_mac`). A VF that nobody holds has an address of its own instead, which
//!   all of them take;
//! - 802.1Q only, all link states, no minimum rate (`i40e_ndo_set_vf_bw`); the card limits in
//!   steps of 50 Mbit/s from 50 on (`i40e_set_bw_limit`), and tells what was asked;
//! - no trust where the card is partitioned (MFP): EINVAL.

use common::api::VfCapabilities;

use crate::kernel::{KernelError, PfFacts};

use super::{Capabilities, Growth, VfDriver};

#[derive(Clone, Copy, Debug)]
pub struct I40e;

impl VfDriver for I40e {
    fn name(&self) -> &'static str {
        "i40e"
    }

    fn capabilities(&self, _pf: &PfFacts) -> Capabilities {
        Capabilities {
            driver: "i40e",
            growth: Growth::AllAtOnce,
            zero_mac: false,
            settings: VfCapabilities {
                vlan: true,
                vlan_qos: true,
                spoof_check: true,
                trust: true,
                link_enable: true,
                link_disable: true,
                max_tx_rate_from_mbps: Some(50),
                ..VfCapabilities::default()
            },
        }
    }

    fn explain(&self, error: &KernelError) -> Option<&'static str> {
        match error.errno() {
            Some(libc::EPERM) => Some(
                "the card has fewer VFs to give than it says, or its self-test runs; an \
                 administrator can set numVFs of that PhysicalFunction to less",
            ),
            Some(libc::EAGAIN) => Some("the driver is busy with another change; it is tried again"),
            _ => None,
        }
    }
}

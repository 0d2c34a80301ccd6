//! `ice`: Intel E810, E822, E823, E825, E830.
//!
//! Its manners (drivers/net/ethernet/intel/ice/ice_sriov.c):
//! - EOPNOTSUPP in safe mode, that is, without the card's DDP package, and for more VFs than
//!   there are resources; EBUSY while the card is being reset (`ice_check_sriov_allowed`,
//!   `ice_pci_sriov_ena`);
//! - a VF that was reset answers EBUSY until it is ready (`ice_check_vf_ready_for_cfg`);
//!   changes of MAC, VLAN and trust reset it: the guest's link goes and comes;
//! - the zero MAC takes the administrative one away again (`ice_set_vf_mac`);
//! - 802.1ad where the firmware and the package have double VLAN mode, else
//!   EPROTONOSUPPORT (`ice_is_supported_port_vlan_proto`): which of the two a card is in
//!   cannot be asked, so a claim is let through and the kernel's refusal is told;
//! - all link states; a minimum and a maximum rate (`ice_set_vf_bw`), the minimum not with
//!   DCB (EOPNOTSUPP), and of all VFs together not above the link's speed (EINVAL).

use common::api::VfCapabilities;

use crate::kernel::{KernelError, PfFacts};

use super::{Capabilities, Growth, VfDriver};

#[derive(Clone, Copy, Debug)]
pub struct Ice;

impl VfDriver for Ice {
    fn name(&self) -> &'static str {
        "ice"
    }

    fn capabilities(&self, _pf: &PfFacts) -> Capabilities {
        Capabilities {
            driver: "ice",
            growth: Growth::AllAtOnce,
            zero_mac: true,
            settings: VfCapabilities {
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
            },
        }
    }

    fn explain(&self, error: &KernelError) -> Option<&'static str> {
        match error.errno() {
            Some(libc::EOPNOTSUPP) => Some(
                "the card is in safe mode, because its DDP package was not loaded, or has not \
                 the resources for so many; an administrator has to install the package \
                 (linux-firmware, intel/ice/ddp) or set numVFs of that PhysicalFunction to less",
            ),
            Some(libc::EBUSY) => Some("the card is being reset; it is tried again"),
            _ => None,
        }
    }
}

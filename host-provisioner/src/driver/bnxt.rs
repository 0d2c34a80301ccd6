//! `bnxt_en`: Broadcom NetXtreme-C and NetXtreme-E (BCM573xx, BCM574xx, BCM575xx).
//!
//! Its manners (drivers/net/ethernet/broadcom/bnxt/bnxt_sriov.c):
//! - with the PF's interface down, while the firmware is being reset, or with VFs in the hands
//!   of an old-style assignment, the write of the count is a success and there are no VFs; with
//!   fewer resources than asked for there are fewer (`bnxt_sriov_configure`). So the interface
//!   is taken up first;
//! - the zero MAC is taken, and then the VF's own is told (`bnxt_get_vf_config`), which is what
//!   its last holder's driver had set: a VF that nobody holds has an address of its own instead;
//! - 802.1Q without a priority: EINVAL with one (`bnxt_set_vf_vlan`);
//! - all link states, both rates up to the link's speed (`bnxt_set_vf_bw`);
//! - new VFs have no spoof check.

use common::api::VfCapabilities;

use crate::kernel::{Kernel, KernelError, PfFacts};

use super::{Capabilities, DriverError, Growth, VfDriver, generic};

#[derive(Clone, Copy, Debug)]
pub struct Bnxt;

impl VfDriver for Bnxt {
    fn name(&self) -> &'static str {
        "bnxt_en"
    }

    fn capabilities(&self, _pf: &PfFacts) -> Capabilities {
        Capabilities {
            driver: "bnxt_en",
            growth: Growth::AllAtOnce,
            zero_mac: false,
            settings: VfCapabilities {
                vlan: true,
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

    fn explain(&self, error: &KernelError) -> Option<&'static str> {
        match error {
            KernelError::VfCount { got: 0, .. } => Some(
                "the driver makes none while the firmware is being reset or some are assigned \
                 to a VM by other means; it is tried again",
            ),
            KernelError::VfCount { got, wanted, .. } if got < wanted => Some(
                "the card has not the resources for more; an administrator can set numVFs of \
                 that PhysicalFunction to so many",
            ),
            _ => None,
        }
    }

    fn create(&self, kernel: &dyn Kernel, pf: &PfFacts, count: u16) -> Result<(), DriverError> {
        generic::link_up(kernel, pf)?;
        generic::create_by_count(kernel, pf, count).map_err(|error| self.explained(error))
    }
}

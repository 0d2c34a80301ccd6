//! `igb`: Intel 82576 and I350. VFs by count; settings by netlink on the PF's
//! interface.
//!
//! Its manners (drivers/net/ethernet/intel/igb/igb_main.c):
//! - a change of the count closes and reopens the PF's netdev, so the link is
//!   taken up after it, not before;
//! - a VF's MAC is handed to the guest only while the PF's interface is up;
//!   with it down the setting is accepted and igbvf makes up a random address;
//! - the zero MAC takes the administrative one away again;
//! - 802.1Q only, no link state, no minimum rate.

use crate::kernel::{Kernel, PfFacts, VfConfig, VfFacts};

use super::{Capabilities, DriverError, Growth, VfDriver, generic};

#[derive(Clone, Copy, Debug)]
pub struct Igb;

impl VfDriver for Igb {
    fn name(&self) -> &'static str {
        "igb"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            driver: "igb",
            growth: Growth::AllAtOnce,
            vlan: true,
            spoof_check: true,
            trust: true,
            zero_mac: true,
        }
    }

    fn create(&self, kernel: &dyn Kernel, pf: &PfFacts, count: u16) -> Result<(), DriverError> {
        generic::create_by_count(kernel, pf, count)?;
        generic::link_up(kernel, pf)
    }

    fn remove_all(&self, kernel: &dyn Kernel, pf: &PfFacts) -> Result<(), DriverError> {
        Ok(kernel.set_num_vfs(pf.address, 0)?)
    }

    fn setup(
        &self,
        kernel: &dyn Kernel,
        pf: &PfFacts,
        vf: &VfFacts,
        want: &VfConfig,
    ) -> Result<(), DriverError> {
        generic::configure(kernel, pf, vf, want, &self.capabilities())
    }

    fn teardown(&self, kernel: &dyn Kernel, pf: &PfFacts, vf: &VfFacts) -> Result<(), DriverError> {
        generic::clean(kernel, pf, vf, &self.capabilities())
    }
}

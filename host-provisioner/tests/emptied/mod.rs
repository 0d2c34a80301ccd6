//! What a test of real hardware puts back.

use host_provisioner::driver::VfDriver;
use host_provisioner::kernel::{PfFacts, RealKernel};

/// Takes the VFs away again, also when the test fails.
pub struct Emptied<'a>(
    pub &'a RealKernel,
    pub &'static dyn VfDriver,
    pub &'a PfFacts,
);

impl Drop for Emptied<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.1.remove_all(self.0, self.2) {
            eprintln!("the VFs of {} stay: {error}", self.2.address);
        }
    }
}

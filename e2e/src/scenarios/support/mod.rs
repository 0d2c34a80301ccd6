//! What scenarios share: the laboratory they run in, claims and waits on them, and the
//! far ends (L1's kernel, QEMU, the guest, the switch) where proof is taken.

pub mod claims;
pub mod events;
pub mod far;
pub mod hold;
pub mod kinds;
pub mod l1;
pub mod l2;
pub mod lab;
pub mod outage;
pub mod pods;
pub mod pool;
pub mod ports;
pub mod second;
pub mod site;
pub mod stops;
pub mod untouched;
pub mod watch;
pub mod wire;
pub mod writes;

pub use claims::{Attached, Claim, Wish};
pub use lab::{Lab, run};

//! The node agent: one process a host node, owner of its VF pool.
//!
//! `pool`, `inventory`, `plan`, `ledger` and `report` are pure: plain functions
//! over plain values, no client, no kernel, no clock. `reconcile` walks a claim
//! through them; `vf`, `attach`, `release`, `resize`, `qemu`, `left` and `gone` execute; `near`
//! says which PFs are near a VM; `publish`
//! reports, and has the number of VFs changed that a PF is to have;
//! `hold` and `listen` tell which claims are to be looked at again; `drivers` loads the host's
//! kernel modules.

mod agent;
mod allocate;
mod attach;
mod drivers;
mod error;
mod follow;
mod gone;
pub mod hold;
pub mod inventory;
pub mod ledger;
mod left;
mod listen;
mod lock;
mod near;
pub mod plan;
pub mod pool;
mod publish;
mod qemu;
mod reconcile;
mod release;
pub mod report;
mod resize;
mod run;
mod sessions;
#[cfg(test)]
mod test_stage;
mod vf;

pub use run::{NodeArgs, NodeError, run};

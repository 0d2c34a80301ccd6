//! The host controller: admits claims, finds their VMs and host nodes, and gives
//! guests their namespaces and rights.
//!
//! It writes `status.admitted`, `vm`, `hostNode`, `launcher` and the conditions
//! Admitted and Resolved of a claim, its finalizer, what a `PhysicalFunction`
//! withholds, and the status of `GuestCluster`s and `VFClass`es. It touches no pod and no hardware.
//! Decisions are plain functions (`identity`, `admit`, `resolve`, `plan`, `guests`,
//! `withhold`, `capacity`); `claims`, `guests_apply`, `withhold_apply` and `capacity_apply`
//! carry them out.

pub mod admit;
mod caches;
pub mod capacity;
mod capacity_apply;
mod claims;
pub mod drivers;
pub mod guests;
mod guests_apply;
pub mod identity;
mod metrics;
pub mod plan;
mod quota;
mod refusal;
pub mod resolve;
mod run;
pub mod vmi;
pub mod withhold;
mod withhold_apply;

pub use refusal::Refusal;
pub use run::{ControllerError, MANAGER, Settings, run};

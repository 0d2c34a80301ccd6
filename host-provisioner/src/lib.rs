//! The host cluster's side of VF provisioning, as a library: the binary only
//! parses arguments, and tests reach every module from outside.
//!
//! Arrows point one way: pure planners, then executors, then controllers, then `main`.

pub mod cli;
pub mod controller;
pub mod cpus;
pub mod driver;
pub mod hypervisor;
pub mod kernel;
pub mod node;
pub mod points;

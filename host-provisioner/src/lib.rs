//! The host side of VF provisioning, as a library so that its parts can be
//! tested and used apart from the program.
//!
//! Arrows point one way: pure planners, then executors, then `main`.

pub mod driver;
pub mod kernel;
pub mod node;

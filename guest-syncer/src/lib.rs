//! The guest half: carries a guest cluster's `VFClaim`s to its host and their
//! status back, and shows the classes that the host allows. It owns nothing else.
#![forbid(unsafe_code)]

pub mod args;
pub mod host_link;
pub mod mirror;
pub mod node_identity;
pub mod program;
pub mod syncer;

//! Kubernetes plumbing that the controllers share: the client that follows its
//! files, the leader's Lease, finalizers, the two kinds of status write, and
//! what to do with an error. The only module of this crate that talks to an
//! API server.

pub mod backoff;
pub mod client;
pub mod error;
pub mod events;
pub mod finalizer;
pub mod leader;
mod limit;
pub mod status;

pub use backoff::Backoff;
pub use client::{ClientOptions, KubeClient, install_crypto};
pub use error::{ErrorClass, class_of, is_conflict, is_gone, is_invalid, says_not_found};
pub use leader::{LeaderConfig, LeaderError, run_as_leader};

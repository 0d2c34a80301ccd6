//! The mirror between a guest cluster and its host: claims up, their status and
//! the classes down.
//!
//! `up`, `down`, `classes` and `orphans` decide and touch nothing; `claims`,
//! `host_claims`, `report`, `class_mirror` and `orphan_pass` do what was decided;
//! `controller` says when.

pub mod claims;
pub mod class_mirror;
pub mod classes;
pub mod controller;
pub mod down;
pub mod host_claims;
pub mod metrics;
pub mod orphan_pass;
pub mod orphans;
pub mod report;
pub mod up;

use crate::node_identity::{NodeIdentity, NodeProblem};

/// A claim's node as this cluster knows it now.
pub type NodeView = Result<NodeIdentity, NodeProblem>;

/// Reason: a claim in a guest cluster that names no node.
pub const INVALID_TARGET: &str = "InvalidTarget";
/// The field manager of everything that this program writes.
pub const MANAGER: &str = "guest-syncer";

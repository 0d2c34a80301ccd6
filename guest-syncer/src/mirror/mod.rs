//! The mirror between a guest cluster and its host: claims up, their status and
//! the classes down.
//!
//! `up`, `down` and `classes` decide and touch nothing; `claims`, `executor` and
//! `class_mirror` do what was decided.

pub mod classes;
pub mod down;
pub mod up;

use crate::node_identity::{NodeIdentity, NodeProblem};

/// A claim's node as this cluster knows it now.
pub type NodeView = Result<NodeIdentity, NodeProblem>;

/// Reason: a claim in a guest cluster that names no node.
pub const INVALID_TARGET: &str = "InvalidTarget";

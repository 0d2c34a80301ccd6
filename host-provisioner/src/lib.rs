//! The host cluster's half: the controller, and the agent on the host nodes.

pub mod cli;
pub mod controller;

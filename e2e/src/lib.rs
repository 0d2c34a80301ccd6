//! The emulated data centre: what sets it up, runs scenarios against it, and takes it
//! down. Each external program is wrapped once, each wait is bounded.

pub mod cache;
pub mod daemon;
pub mod exec;
pub mod interrupt;
pub mod paths;
pub mod progress;
pub mod wait;

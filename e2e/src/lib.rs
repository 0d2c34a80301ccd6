//! The emulated data centre: what sets it up, runs scenarios against it, and takes it
//! down. Each external program is wrapped once, each wait is bounded.

pub mod archive;
pub mod cache;
pub mod clusters;
pub mod context;
pub mod daemon;
pub mod debian;
pub mod demo;
pub mod deploy;
pub mod docker;
pub mod exec;
pub mod footprint;
pub mod fuzz;
pub mod interrupt;
pub mod kubernetes_images;
pub mod lint;
pub mod logs;
pub mod machine;
pub mod mutants;
pub mod node_image;
pub mod oci_runtime;
pub mod paths;
pub(crate) mod programs;
pub mod progress;
pub mod runner;
pub mod scenarios;
pub mod tools;
pub mod wait;

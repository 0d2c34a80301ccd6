//! The controller against a real API server, under the very rights that the
//! chart gives it.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod capacity;
mod claims;
mod classes;
mod guests;
mod harness;
mod leaders;
mod withheld;

//! The CRDs on a real API server: accepted, and each rule, pattern, bound and
//! default shown to do its work.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod claims;
mod objects;
mod support;

//! The controller against a real API server, under the very rights that the
//! chart gives it.

mod claims;
mod guests;
mod harness;

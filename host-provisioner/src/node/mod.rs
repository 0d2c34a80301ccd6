//! The node agent. `pool` and `inventory` are pure: plain functions over plain
//! values, no client, no kernel, no clock.

pub mod inventory;
pub mod pool;

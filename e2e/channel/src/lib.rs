//! The command channel into an emulated machine: a request is one line over a virtio-serial
//! port, its answer another, so it works without the machine's network and without
//! Kubernetes. `protocol` is what both ends speak, `serve` the guest's end: it does as much
//! as it can without a process of its own, which an emulated machine can least afford.

#![forbid(unsafe_code)]

pub mod port;
pub mod protocol;
pub mod serve;

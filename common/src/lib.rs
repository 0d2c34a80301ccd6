//! What both programs speak: the API types, PCI names and numbers, and the
//! Kubernetes plumbing that controllers share.
//!
//! `api` and `pci` do no I/O. Only `kube` talks to an API server; `telemetry`
//! listens on the HTTP endpoint and writes logs.
#![forbid(unsafe_code)]

pub mod api;
pub mod cli;
pub mod crdgen;
pub mod kube;
pub mod pci;
pub mod telemetry;

//! What both programs speak: the API types, PCI names and numbers, and the
//! Kubernetes plumbing that controllers share.
//!
//! `api` and `pci` do no I/O. Only `kube` talks to an API server; `telemetry`
//! listens on the HTTP endpoint and writes logs.
#![forbid(unsafe_code)]
// kube's derive repeats `validation` and `printcolumn` by design; clippy takes them for duplicates.
#![allow(clippy::duplicated_attributes)]

pub mod api;
pub mod cli;
pub mod crdgen;
pub mod kube;
pub mod pci;
pub mod telemetry;

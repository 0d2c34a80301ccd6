//! The host cluster's side of vf-provisioner, as a library: the binary only
//! parses arguments, and tests reach every module from outside.

pub mod hypervisor;

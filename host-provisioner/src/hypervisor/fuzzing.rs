//! The parsers of this room for the fuzzers, which lie outside of this crate (room `fuzz`).

use std::path::PathBuf;

use super::launcher;

/// The start time in a process's `stat`.
#[must_use]
pub fn start_time(stat: &str) -> Option<u64> {
    launcher::parse_start_time(stat)
}

/// The effective id in a `Uid` or `Gid` line of a process's `status`.
#[must_use]
pub fn effective_id(status: &str, name: &str) -> Option<u32> {
    launcher::effective_id(status, name)
}

/// The cgroup v2 path in a process's `cgroup`.
#[must_use]
pub fn unified_cgroup(text: &str) -> Option<PathBuf> {
    launcher::unified_cgroup(text, 1).ok()
}

/// Whether a line of a process's `cgroup` lies in the pod's.
#[must_use]
pub fn names_pod(line: &str, pod_uid: &str) -> bool {
    launcher::names_pod(line, pod_uid)
}

/// Whether a QEMU was started to be asked what it can do.
#[must_use]
pub fn is_capability_probe(cmdline: &[u8]) -> bool {
    launcher::is_capability_probe(cmdline)
}

/// Whether a thread of this name is a vCPU's.
#[must_use]
pub fn is_vcpu(comm: &str) -> bool {
    launcher::vcpus::is_vcpu(comm)
}

/// The VFIO group of an open file's link.
#[must_use]
pub fn vfio_group(link: &str) -> Option<u32> {
    launcher::vfio_group(link)
}

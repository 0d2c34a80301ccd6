//! The parsers of this room for the fuzzers, which lie outside of this crate (room `fuzz`).

pub use super::netlink::{
    Answers, End, Fault, Link, NetUse, changed_links, default_route, global_address, link, vf,
};
use super::{Change, changes, config_space, host_use, real};

/// As the agent reads a PF's serial number.
#[must_use]
pub fn serial_number(config: &[u8]) -> Option<String> {
    config_space::serial_number(config)
}

/// As the agent reads a PF's number of VFs.
#[must_use]
pub fn num_vfs(config: &[u8]) -> Option<u16> {
    config_space::num_vfs(config)
}

/// What a datagram of rtnetlink tells of, if all interfaces can have VFs.
#[must_use]
pub fn links_of(datagram: &[u8]) -> Vec<Change> {
    changes::links_of(datagram, &|_| true)
}

/// What a uevent tells of.
#[must_use]
pub fn function_of(datagram: &[u8]) -> Option<Change> {
    changes::function_of(datagram)
}

/// The chosen one of a sysfs choice.
#[must_use]
pub fn chosen(text: &str) -> Option<String> {
    real::chosen(text)
}

/// Why an interface is the host's own.
#[must_use]
pub fn host_use(usage: &NetUse, interface: &str) -> Option<String> {
    host_use::reason(usage, interface)
}

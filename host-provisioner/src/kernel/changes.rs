//! What the kernel tells of itself: interfaces that change (rtnetlink) and PCI functions
//! that come, go or change driver (uevents). Messages are hints to look again; what counts
//! is what is read then.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use common::pci::PciAddress;
use netlink_sys::protocols::{NETLINK_KOBJECT_UEVENT, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

use super::KernelError;
use super::netlink;

/// Something that may have changed what a VF does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A PF's network interface: up or down, or a setting of one of its VFs.
    Interface(String),
    /// A PCI function came, went, or changed driver.
    Function(PciAddress),
    /// The kernel had to drop messages.
    Anything,
}

/// Who is told; answers whether it still listens.
pub type Watcher = Arc<dyn Fn(Change) -> bool + Send + Sync>;

/// RTMGRP_LINK (include/uapi/linux/rtnetlink.h).
const LINKS: u32 = 1;
/// The kernel's own uevents; udev sends its to group 2 (lib/kobject_uevent.c).
const UEVENTS: u32 = 1;
/// What the socket may have waiting before the kernel drops messages. A pod's start on a
/// busy host brings dozens of messages of a kilobyte or two.
const BACKLOG: usize = 1 << 20;

/// Tells of changes, on two threads, until the watcher has gone.
pub(super) fn watch(sys: &Path, told: &Watcher) -> Result<(), KernelError> {
    let interfaces = sys.join("class/net");
    let links = subscribe(NETLINK_ROUTE, LINKS, "follow interfaces")?;
    follow("watch-links", links, Arc::clone(told), move |datagram| {
        links_of(datagram, &|name| {
            // Most interfaces of a node are its pods'.
            interfaces.join(name).join("device/sriov_totalvfs").exists()
        })
    })?;
    let functions = subscribe(NETLINK_KOBJECT_UEVENT, UEVENTS, "follow PCI functions")?;
    follow("watch-pci", functions, Arc::clone(told), |datagram| {
        function_of(datagram).into_iter().collect()
    })
}

fn subscribe(protocol: isize, group: u32, what: &str) -> Result<Socket, KernelError> {
    let fail = |source| KernelError::Netlink {
        request: what.to_owned(),
        source,
    };
    let mut socket = Socket::new(protocol).map_err(fail)?;
    // As far as net.core.rmem_max lets it.
    socket.set_rx_buf_sz(BACKLOG).map_err(fail)?;
    socket.bind(&SocketAddr::new(0, group)).map_err(fail)?;
    Ok(socket)
}

fn follow(
    name: &str,
    socket: Socket,
    told: Watcher,
    read: impl Fn(&[u8]) -> Vec<Change> + Send + 'static,
) -> Result<(), KernelError> {
    let run = move || {
        loop {
            let changes = match socket.recv_from_full() {
                // Other processes may send to a netlink address; the kernel's is 0.
                Ok((datagram, from)) if from.port_number() == 0 => read(&datagram),
                Ok(_) => continue,
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => vec![Change::Anything],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "changes are not followed any more, only looked for now and then");
                    return;
                }
            };
            if !changes.into_iter().all(|change| told(change)) {
                return;
            }
        }
    };
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map(drop)
        .map_err(|source| KernelError::Netlink {
            request: format!("start thread {name}"),
            source,
        })
}

/// The interfaces that a datagram of rtnetlink tells of, if they can have VFs.
pub(super) fn links_of(datagram: &[u8], has_vfs: &dyn Fn(&str) -> bool) -> Vec<Change> {
    let Ok(names) = netlink::changed_links(datagram) else {
        // What it says is not known; that something changed is.
        return vec![Change::Anything];
    };
    let names = names.into_iter().filter(|name| has_vfs(name));
    names.map(Change::Interface).collect()
}

/// The PCI function that a uevent is about: `ACTION@DEVPATH`, then `KEY=value`, each ended
/// by a zero byte (lib/kobject_uevent.c).
pub(super) fn function_of(datagram: &[u8]) -> Option<Change> {
    let mut pci = false;
    let mut relevant = false;
    let mut address = None;
    for field in datagram.split(|b| *b == 0) {
        let Some((key, value)) = std::str::from_utf8(field)
            .ok()
            .and_then(|f| f.split_once('='))
        else {
            continue;
        };
        match key {
            "SUBSYSTEM" => pci = value == "pci",
            "ACTION" => relevant = matches!(value, "add" | "remove" | "bind" | "unbind"),
            "PCI_SLOT_NAME" => address = value.parse::<PciAddress>().ok(),
            _ => {}
        }
    }
    (pci && relevant)
        .then_some(address)
        .flatten()
        .map(Change::Function)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const BIND: &[u8] = b"bind@/devices/pci0000:00/0000:01:10.0\0ACTION=bind\0\
DEVPATH=/devices/pci0000:00/0000:01:10.0\0SUBSYSTEM=pci\0DRIVER=vfio-pci\0\
PCI_SLOT_NAME=0000:01:10.0\0SEQNUM=77\0";

    fn text(change: &[u8], from: &str, to: &str) -> Vec<u8> {
        String::from_utf8_lossy(change)
            .replace(from, to)
            .into_bytes()
    }

    #[test]
    fn a_uevent_names_its_function() {
        let address = "0000:01:10.0".parse().unwrap();
        assert_eq!(function_of(BIND), Some(Change::Function(address)));
        assert_eq!(function_of(&text(BIND, "=bind", "=change")), None);
        assert_eq!(function_of(&text(BIND, "=pci", "=net")), None);
        assert_eq!(function_of(&text(BIND, "=0000:01:10.0", "=wifi")), None);
    }

    /// The loopback of a network namespace of our own is taken up, and the kernel says so.
    #[test]
    fn the_kernel_tells_of_a_link() {
        let (sent, got) = mpsc::channel();
        thread::spawn(move || {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                sent.send(None).unwrap();
                return;
            }
            let socket = subscribe(NETLINK_ROUTE, LINKS, "test").unwrap();
            netlink::Netlink::set_up(&netlink::RtNetlink, "lo").unwrap();
            let (datagram, from) = socket.recv_from_full().unwrap();
            assert_eq!(from.port_number(), 0);
            sent.send(Some(datagram)).unwrap();
        });
        let Some(datagram) = got.recv_timeout(Duration::from_secs(20)).unwrap() else {
            assert!(!nix::unistd::geteuid().is_root(), "root may unshare");
            return;
        };
        let all = links_of(&datagram, &|_| true);
        assert_eq!(all, [Change::Interface("lo".into())]);
        assert_eq!(links_of(&datagram, &|_| false), []);
        let cut = datagram.get(..datagram.len() - 4).unwrap();
        assert_eq!(links_of(cut, &|_| true), [Change::Anything]);
    }

    proptest! {
        #[test]
        fn any_datagram_ends_in_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            function_of(&bytes);
            links_of(&bytes, &|_| true);
        }
    }
}

//! The one place that knows what of the machine the scenarios use: names, addresses and
//! how a script gets into L1 and L2.

use std::time::Duration;

use anyhow::Result;
use futures::FutureExt;
use futures::future::BoxFuture;

use super::far::{Said, Shell};
use crate::machine::{L1, L2, Output};

pub use crate::machine::{NODE as L1_NODE, Stats, Switch, TraceEvent, TraceKind};

/// Hardware addresses of L1's PFs: the one whose wire is the switch, the one with the
/// default route, the one that shares its IOMMU group, the second one that can be managed.
pub const PF_MACS: [&str; 4] = [
    "52:54:00:aa:00:01",
    "52:54:00:aa:00:02",
    "52:54:00:aa:00:03",
    "52:54:00:aa:00:04",
];
/// The VM of the main story: its name and its node's.
pub const L2_NODE: &str = "l2a";
/// What libvirt calls it.
pub const L2_DOMAIN: &str = "tenant-vms_l2a";
/// The second VM, where there is one.
pub const SECOND_NODE: &str = "l2b";
pub const SECOND_DOMAIN: &str = "tenant-vms_l2b";
/// Answered by the switch.
pub const PEER: &str = "10.9.0.1";
/// Addresses for the guest's side of VFs, in the peer's network.
pub const GUEST_ADDRESSES: [&str; 3] = ["10.9.0.50/24", "10.9.0.51/24", "10.9.0.52/24"];

impl Shell for L1 {
    fn name(&self) -> &str {
        L1_NODE
    }

    fn said<'a>(&'a self, script: &'a str, limit: Duration) -> BoxFuture<'a, Result<Said>> {
        async move { Ok(said(&self.run_with(script, &[], limit).await?)) }.boxed()
    }
}

impl Shell for L2 {
    fn name(&self) -> &str {
        Self::name(self)
    }

    fn said<'a>(&'a self, script: &'a str, limit: Duration) -> BoxFuture<'a, Result<Said>> {
        async move { Ok(said(&self.run_with(script, &[], limit).await?)) }.boxed()
    }
}

fn said(output: &Output) -> Said {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said {
        status: output.status,
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    }
}

//! L1's place in the clusters' network: a tap on the network's bridge. Touches the
//! machine's links only; made by `up`, removed by `down`.

use std::path::Path;

use anyhow::Result;

use crate::docker;
use crate::exec::Cmd;

/// The tap of L1's second PF. At most 15 characters.
pub(super) const TAP: &str = "vf-e2e-l1";
/// L1's address, outside the range Docker gives out.
pub(super) const ADDRESS: &str = "172.31.240.50";
pub(super) const PREFIX: u8 = 24;

/// Makes the tap unless it is there, and plugs it into the bridge.
pub(super) fn up() -> Result<()> {
    if !exists() {
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap"])?;
    }
    ip(&["link", "set", TAP, "master", docker::BRIDGE, "up"])
}

/// Removes the tap, existing or not.
pub(super) fn down() -> Result<()> {
    if exists() {
        ip(&["link", "delete", TAP])?;
    }
    Ok(())
}

fn exists() -> bool {
    Path::new("/sys/class/net").join(TAP).exists()
}

fn ip(args: &[&str]) -> Result<()> {
    Cmd::new("ip").args(args).run()?;
    Ok(())
}

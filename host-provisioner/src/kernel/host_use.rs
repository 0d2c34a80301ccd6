//! Whether an interface carries the host's own traffic. Pure.

use super::netlink::{Link, NetUse};

/// Deeper stacks do not exist; a loop of links (it cannot be made) ends here.
const MOST_LAYERS: usize = 8;

/// Why the interface is the host's own, in words; `None` when it is not.
///
/// It is, when it or a VLAN or macvlan above it has a default route, is part of
/// a bond, bridge or the like, or has an address of global scope. An address
/// may be idle, but nobody can tell from here, and a wrong "free" cuts a node
/// off: a change of the number of VFs restarts the PF.
pub(super) fn reason(usage: &NetUse, interface: &str) -> Option<String> {
    let link = usage.links.iter().find(|link| link.name == interface)?;
    look(usage, link, MOST_LAYERS)
}

fn look(usage: &NetUse, link: &Link, layers: usize) -> Option<String> {
    if usage.default_routes.contains(&link.index) {
        return Some(format!("default route via {}", link.name));
    }
    if let Some(master) = link.master {
        return Some(enslaved(usage, link, master));
    }
    if let Some((_, address)) = usage
        .addresses
        .iter()
        .find(|(index, _)| *index == link.index)
    {
        return Some(format!("{} has the address {address}", link.name));
    }
    let layers = layers.checked_sub(1)?;
    usage
        .links
        .iter()
        .filter(|above| above.lower == Some(link.index))
        .find_map(|above| look(usage, above, layers))
}

fn enslaved(usage: &NetUse, link: &Link, master: u32) -> String {
    let Some(master) = usage.links.iter().find(|link| link.index == master) else {
        return format!("{} is part of interface number {master}", link.name);
    };
    let role = match master.kind.as_deref() {
        Some("bond") => "a bond member of",
        Some("bridge") => "a bridge port of",
        Some("team") => "a team port of",
        _ => "part of",
    };
    format!("{} is {role} {}", link.name, master.name)
}

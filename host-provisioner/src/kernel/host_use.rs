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

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: Option<&str>) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: kind.map(str::to_owned),
            ..Link::default()
        }
    }

    /// eth0, a VLAN on it, a macvlan on that; a bond and a bridge beside them.
    fn host() -> NetUse {
        let mut links = vec![
            link(2, "eth0", None),
            link(3, "eth0.5", Some("vlan")),
            link(4, "mv0", Some("macvlan")),
            link(5, "bond0", Some("bond")),
            link(6, "br0", Some("bridge")),
            link(7, "eth1", None),
        ];
        links[1].lower = Some(2);
        links[2].lower = Some(3);
        NetUse {
            links,
            ..NetUse::default()
        }
    }

    #[test]
    fn an_interface_that_carries_nothing_is_not_the_hosts() {
        let mut host = host();
        // What others carry is theirs.
        host.default_routes = vec![7];
        host.addresses = vec![(7, "192.0.2.1/24".to_owned())];
        assert_eq!(reason(&host, "eth0"), None);
        assert_eq!(reason(&host, "absent"), None);
    }

    #[test]
    fn use_is_seen_on_the_interface_and_on_all_above_it() {
        for (index, words) in [
            (2, "default route via eth0"),
            (3, "default route via eth0.5"),
            (4, "default route via mv0"),
        ] {
            let mut host = host();
            host.default_routes = vec![index];
            assert_eq!(reason(&host, "eth0").as_deref(), Some(words));
        }
        for (index, words) in [
            (2, "eth0 has the address 192.0.2.1/24"),
            (4, "mv0 has the address 192.0.2.1/24"),
        ] {
            let mut host = host();
            host.addresses = vec![(index, "192.0.2.1/24".to_owned())];
            assert_eq!(reason(&host, "eth0").as_deref(), Some(words));
        }
        for (at, master, words) in [
            (0, 5, "eth0 is a bond member of bond0"),
            (0, 6, "eth0 is a bridge port of br0"),
            (1, 6, "eth0.5 is a bridge port of br0"),
            (0, 99, "eth0 is part of interface number 99"),
        ] {
            let mut host = host();
            host.links[at].master = Some(master);
            assert_eq!(reason(&host, "eth0").as_deref(), Some(words));
        }
    }

    #[test]
    fn a_loop_of_links_ends() {
        let mut host = host();
        host.links[0].lower = Some(3);
        assert_eq!(reason(&host, "eth0"), None);
    }
}

//! What the data centre changes on the machine itself: firewall rules of a private
//! Docker daemon and sysctls that kubelets in node containers set for all. Recorded
//! before the first change, taken back by `down`.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::exec::Cmd;

/// dockerd turns forwarding on; the kubelet (pkg/util/sysctl) and kube-proxy set the rest.
const SYSCTLS: &[&str] = &[
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv6/conf/all/forwarding",
    "net/ipv6/conf/default/forwarding",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// The machine's settings before the data centre.
#[derive(Debug, Deserialize, Serialize)]
pub struct Before {
    sysctls: BTreeMap<String, String>,
    ip4: String,
    ip6: String,
}

/// Records the settings in `file`, unless an earlier run did: that one saw the machine
/// untouched.
pub fn record(file: &Path) -> Result<()> {
    if file.exists() {
        return Ok(());
    }
    let mut sysctls = BTreeMap::new();
    for name in SYSCTLS {
        if let Ok(value) = std::fs::read_to_string(format!("/proc/sys/{name}")) {
            sysctls.insert((*name).to_owned(), value.trim().to_owned());
        }
    }
    let save = |family: &str| Cmd::new(format!("{family}-save")).text();
    let before = Before {
        sysctls,
        ip4: save("iptables")?,
        ip6: save("ip6tables")?,
    };
    let tmp = file.with_extension("tmp");
    std::fs::write(&tmp, serde_json::to_vec_pretty(&before)?)?;
    std::fs::rename(&tmp, file).with_context(|| format!("writing {}", file.display()))
}

/// Takes back what was changed since [`record`], and forgets the record. `marks` are the
/// words that tell our rules from those others added meanwhile.
pub fn restore(file: &Path, marks: &[&str]) -> Result<()> {
    let data = match std::fs::read(file) {
        Ok(data) => data,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("reading {}", file.display())),
    };
    let before: Before = serde_json::from_slice(&data)?;
    for (family, old) in [("iptables", &before.ip4), ("ip6tables", &before.ip6)] {
        let now = Cmd::new(format!("{family}-save")).text()?;
        let script = removals(old, &now, marks);
        if !script.is_empty() {
            Cmd::new(format!("{family}-restore"))
                .arg("--noflush")
                .stdin(script)
                .run()?;
        }
    }
    for (name, value) in &before.sysctls {
        let path = format!("/proc/sys/{name}");
        let now = std::fs::read_to_string(&path).unwrap_or_default();
        if now.trim() != value {
            std::fs::write(&path, value).with_context(|| format!("writing {path}"))?;
        }
    }
    std::fs::remove_file(file).with_context(|| format!("removing {}", file.display()))
}

#[derive(Default)]
struct Table<'a> {
    name: &'a str,
    /// Chain and policy (`-` for a chain of a user).
    chains: Vec<(&'a str, &'a str)>,
    rules: Vec<&'a str>,
}

fn parse(text: &str) -> Vec<Table<'_>> {
    let mut tables: Vec<Table<'_>> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table {
                name,
                ..Table::default()
            });
        } else if let Some(t) = tables.last_mut() {
            if let Some(chain) = line.strip_prefix(':') {
                let mut words = chain.split(' ');
                if let (Some(name), Some(policy)) = (words.next(), words.next()) {
                    t.chains.push((name, policy));
                }
            } else if line.starts_with("-A ") {
                t.rules.push(line);
            }
        }
    }
    tables
}

/// Input for `iptables-restore --noflush` that removes the rules and chains which bear
/// one of `marks` and are in `now` but not in `before`, and sets policies back. Empty if
/// there is nothing to do.
fn removals(before: &str, now: &str, marks: &[&str]) -> String {
    let old = parse(before);
    let none = Table::default();
    let mut script = String::new();
    for t in parse(now) {
        let was = old.iter().find(|o| o.name == t.name).unwrap_or(&none);
        let kept: HashSet<&str> = was.rules.iter().copied().collect();
        let chains: HashSet<&str> = was.chains.iter().map(|(c, _)| *c).collect();
        let ours = |s: &str| marks.iter().any(|m| s.contains(m));
        let new: Vec<&str> = t
            .chains
            .iter()
            .map(|(c, _)| *c)
            .filter(|c| !chains.contains(c) && ours(c))
            .collect();
        let mut lines = Vec::new();
        for (chain, policy) in &t.chains {
            // A table that was not loaded had the kernel's policy, ACCEPT.
            let old = was
                .chains
                .iter()
                .find(|(c, _)| c == chain)
                .map_or("ACCEPT", |(_, p)| p);
            if *policy != "-" && *policy != old {
                lines.push(format!(":{chain} {old} [0:0]"));
            }
        }
        for rule in t.rules.iter().filter(|r| !kept.contains(*r) && ours(r)) {
            let chain = rule.split(' ').nth(1).unwrap_or_default();
            if !new.contains(&chain) {
                lines.push(rule.replacen("-A ", "-D ", 1));
            }
        }
        lines.extend(new.iter().map(|c| format!("-F {c}")));
        lines.extend(new.iter().map(|c| format!("-X {c}")));
        if !lines.is_empty() {
            script.push_str(&format!("*{}\n{}\nCOMMIT\n", t.name, lines.join("\n")));
        }
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str =
        "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n-A INPUT -j LOG\nCOMMIT\n";

    #[test]
    fn removes_docker_and_keeps_what_others_added() {
        let now = "*nat\n:POSTROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n\
            -A POSTROUTING -s 172.31.240.0/24 ! -o vf0 -j MASQUERADE\n-A DOCKER -i vf0 -j RETURN\n\
            COMMIT\n*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [1:2]\n:DOCKER - [0:0]\n:MINE - [0:0]\n\
            -A INPUT -j LOG\n-A INPUT -j MINE\n-A FORWARD -o vf0 -j DOCKER\nCOMMIT\n";
        assert_eq!(
            removals(BEFORE, now, &["DOCKER", "172.31.240."]),
            "*nat\n-D POSTROUTING -s 172.31.240.0/24 ! -o vf0 -j MASQUERADE\n-F DOCKER\n-X DOCKER\n\
             COMMIT\n*filter\n:FORWARD ACCEPT [0:0]\n-D FORWARD -o vf0 -j DOCKER\n-F DOCKER\n\
             -X DOCKER\nCOMMIT\n"
        );
    }

    #[test]
    fn leaves_what_was_there_before() {
        let docker =
            "*filter\n:FORWARD DROP [0:0]\n:DOCKER - [0:0]\n-A FORWARD -j DOCKER\nCOMMIT\n";
        assert_eq!(removals(docker, docker, &["DOCKER"]), "");
        assert_eq!(removals(BEFORE, BEFORE, &["DOCKER"]), "");
    }
}

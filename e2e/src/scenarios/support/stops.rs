//! The points at which the node agent can be stopped (host-provisioner/src/points.rs), and
//! what of a claim there is at each, from the API server, the kernel, the container and QEMU.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::far::{self, sh};
use super::lab::Lab;
use super::pods::Part;
use super::{Claim, l1};
use crate::wait::{self, Probe};

const FOLDER: &str = "/run/vf-provisioner/points";
const JOURNAL: &str = "/run/vf-provisioner/journal";
/// Longest the agent may take to come to a point.
const REACH: Duration = Duration::from_secs(90);
const EVERY: Duration = Duration::from_millis(200);

/// Something of a claim that is there or is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fact {
    /// The copy records a VF.
    Device,
    /// The copy records an attachment.
    Attachment,
    /// The PF has VFs.
    Vfs,
    /// A VF has the claim's MAC.
    Settings,
    /// A VF is on vfio-pci.
    Bound,
    /// The agent has a journal of the VM.
    Journal,
    /// QEMU may lock more than it might before.
    Memlock,
    /// QEMU's cgroup lets /dev/vfio/vfio through.
    ContainerRule,
    /// QEMU's cgroup lets the VF's group through.
    GroupRule,
    /// The launcher has /dev/vfio/vfio.
    ContainerNode,
    /// The launcher has the group's node.
    GroupNode,
    /// QEMU has the device.
    Plugged,
}

/// A point: what has come to be there since the one before, and what has gone.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub name: &'static str,
    comes: &'static [Fact],
    goes: &'static [Fact],
    /// What is the guest's to decide, who is not stopped.
    either: &'static [Fact],
}

const fn point(name: &'static str, comes: &'static [Fact], goes: &'static [Fact]) -> Point {
    Point {
        name,
        comes,
        goes,
        either: &[],
    }
}

use Fact::{
    Attachment, Bound, ContainerNode, ContainerRule, Device, GroupNode, GroupRule, Journal,
    Memlock, Plugged, Settings, Vfs,
};

/// All of them, in the order in which a claim that comes and goes passes them.
pub const POINTS: [Point; 23] = [
    point("chosen", &[], &[]),
    point("allocated", &[Device], &[]),
    point("vfs-created", &[Vfs], &[]),
    point("configured", &[Settings], &[]),
    point("bound", &[Bound], &[]),
    point("attachment-recorded", &[Attachment], &[]),
    point("journal-written", &[Journal], &[]),
    point("memlock-raised", &[Memlock], &[]),
    point("rules-set", &[ContainerRule, GroupRule], &[]),
    point("nodes-made", &[ContainerNode, GroupNode], &[]),
    point("device-added", &[Plugged], &[]),
    point("group-closed", &[], &[GroupRule, GroupNode]),
    point("guest-configured", &[], &[]),
    Point {
        name: "unplug-requested",
        comes: &[],
        goes: &[],
        either: &[Plugged],
    },
    point("unplugged", &[], &[Plugged]),
    point("nodes-removed", &[], &[ContainerNode]),
    point("rules-restored", &[], &[ContainerRule]),
    point("memlock-restored", &[], &[Memlock]),
    point("gates-closed", &[], &[Journal]),
    point("reset", &[], &[Settings]),
    point("let-go", &[], &[]),
    point("unbound", &[], &[Bound]),
    point("device-cleared", &[], &[Device, Attachment]),
];

/// The last point on the way up: what is there then is there until the claim goes.
pub const ATTACHED: &str = "guest-configured";
/// The last of all.
pub const RELEASED: &str = "device-cleared";

/// Whether a claim that comes to this point still has to have VFs made, if the PF has none.
pub fn before_the_vfs(name: &str) -> Result<bool> {
    let (point, facts) = at(name)?;
    Ok(!facts.contains(&Vfs) || point.comes.contains(&Vfs))
}

/// The point of that name with what is there at it.
pub fn at(name: &str) -> Result<(Point, BTreeSet<Fact>)> {
    let mut facts = BTreeSet::new();
    for point in POINTS {
        facts.extend(point.comes);
        facts.retain(|f| !point.goes.contains(f));
        if point.name == name {
            return Ok((point, facts));
        }
    }
    bail!("there is no point {name}")
}

/// A launcher as it is without any VF, and the claim that is watched.
pub struct Look<'l> {
    lab: &'l Lab<'l>,
    memlock: String,
    mac: String,
}

impl<'l> Look<'l> {
    /// The launcher has no VF now; the claim that is watched asks for `mac`.
    pub async fn begin(lab: &'l Lab<'l>, mac: &str) -> Result<Self> {
        Ok(Self {
            lab,
            memlock: lab.qemu.memlock(&lab.l1).await?,
            mac: mac.to_owned(),
        })
    }

    /// What there is of the claim now.
    pub async fn facts(&self, claim: &Claim) -> Result<BTreeSet<Fact>> {
        let (lab, qemu) = (self.lab, &self.lab.qemu);
        let scripts = [
            qemu.memlock_script(),
            qemu.nodes_script(),
            l1::pf_script(&lab.wired.address),
            l1::settings_script(&lab.wired.interface),
            format!("shopt -s nullglob; echo {JOURNAL}/*.json"),
        ];
        let (said, copy, devices) = tokio::try_join!(
            far::several(&lab.l1, &scripts),
            lab.host_copy(claim),
            qemu.ours()
        )?;
        let [memlock, nodes, pf, settings, journal] = said.as_slice() else {
            bail!("L1 said {said:?}")
        };
        let status = copy.and_then(|c| c.status);
        let pf = l1::read_pf(pf)?;
        let bound = pf.vfs.iter().find(|v| v.driver.is_some());
        let group = bound.and_then(|v| v.group).map(|g| g.to_string());
        let nodes = l1::read_nodes(nodes);
        let node = |name: &str| nodes.iter().any(|n| n.split(' ').next() == Some(name));
        let settings = l1::read_settings(settings)?;
        let group_rule = match &group {
            Some(group) => qemu.cgroup_allows(&lab.l1, group).await?,
            None => false,
        };
        let seen = [
            (Device, status.as_ref().is_some_and(|s| s.device.is_some())),
            (Attachment, status.is_some_and(|s| s.attachment.is_some())),
            (Vfs, pf.num_vfs > 0),
            (Settings, settings.values().any(|s| s.mac == self.mac)),
            (Bound, bound.is_some()),
            (Journal, !journal.is_empty()),
            (Memlock, *memlock != self.memlock),
            (ContainerRule, qemu.cgroup_allows(&lab.l1, "vfio").await?),
            (GroupRule, group_rule),
            (ContainerNode, node("vfio")),
            (GroupNode, group.as_deref().is_some_and(node)),
            (Plugged, devices.iter().any(|d| d.id == claim.qemu_id())),
        ];
        Ok(seen.into_iter().filter(|s| s.1).map(|s| s.0).collect())
    }

    /// An error if what there is is not what there is to be at the point.
    pub async fn expect(&self, claim: &Claim, name: &str) -> Result<()> {
        let (point, mut wanted) = at(name)?;
        let mut seen = self.facts(claim).await?;
        for fact in point.either {
            wanted.remove(fact);
            seen.remove(fact);
        }
        let missing: Vec<_> = wanted.difference(&seen).collect();
        let surplus: Vec<_> = seen.difference(&wanted).collect();
        ensure!(
            missing.is_empty() && surplus.is_empty(),
            "at point {name} there is not {missing:?}, and there is {surplus:?}"
        );
        Ok(())
    }
}

/// Makes the agent stop the next time it comes to the point.
pub async fn arm(lab: &Lab<'_>, name: &str) -> Result<()> {
    at(name)?;
    let script = format!("mkdir -p {FOLDER}; rm -f {FOLDER}/*; echo SIGSTOP >{FOLDER}/{name}");
    sh(&lab.l1, &script).await.map(drop)
}

/// Waits until the agent has stopped at the point.
pub async fn stopped(lab: &Lab<'_>, name: &str) -> Result<()> {
    let script = format!(
        "[[ -e {FOLDER}/{name} ]] && {{ echo not reached; exit; }}
{}",
        Part::Agent
            .each_process("while read -r k v _; do [[ $k == State: ]] && echo $v; done <$p/status")
    );
    let what = format!("the agent to stop at point {name}");
    wait::until(&what, REACH, EVERY, || async {
        let said = sh(&lab.l1, &script).await?;
        Ok(if said == "T" {
            Probe::Ready(())
        } else {
            Probe::NotYet(said)
        })
    })
    .await
    .with_context(|| format!("point {name}"))
}

/// A script that lets an agent that has stopped go on, and takes away what is armed.
pub(super) fn disarm() -> String {
    let go_on = Part::Agent.each_process("kill -CONT ${p#/proc/}");
    format!("rm -f {FOLDER}/*\n{go_on}")
}

/// Does so.
pub async fn go_on(lab: &Lab<'_>) -> Result<()> {
    sh(&lab.l1, &disarm()).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The agent's own list, read from its source: its names in lower case with hyphens.
    #[test]
    fn these_are_the_agents_points() {
        let source = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../host-provisioner/src/points.rs"
        );
        let text = std::fs::read_to_string(source).unwrap();
        let (_, list) = text.split_once("pub enum Point {").unwrap();
        let (list, _) = list.split_once('}').unwrap();
        let names: Vec<String> = list
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty() && !l.starts_with("//"))
            .map(|l| {
                let mut name = String::new();
                for c in l.trim_end_matches(',').chars() {
                    if c.is_ascii_uppercase() && !name.is_empty() {
                        name.push('-');
                    }
                    name.push(c.to_ascii_lowercase());
                }
                name
            })
            .collect();
        assert_eq!(names, POINTS.map(|p| p.name));
    }

    #[test]
    fn a_claim_leaves_nothing_but_vfs() {
        let (_, there) = at("bound").unwrap();
        assert_eq!(
            there.into_iter().collect::<Vec<_>>(),
            [Device, Vfs, Settings, Bound]
        );
        let (_, left) = at("device-cleared").unwrap();
        assert_eq!(left.into_iter().collect::<Vec<_>>(), [Vfs]);
        assert!(at("nowhere").is_err());
    }
}

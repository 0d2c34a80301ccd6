//! A launcher whose cgroup is rewritten under the agent's hands, by systemd or by somebody who
//! manages its devices himself: attached all the same, once, and nothing stays open.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::FutureExt;

use super::support::far::sh;
use super::support::site::PEER;
use super::support::stops::{self, Look};
use super::support::{Lab, Wish};
use super::{Scenario, scenario, traffic};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "gates-rewritten-by-systemd",
            "daemon-reload and set-property on the launcher's scope between gate and device_add, and after it: attached all the same, no wider rule left",
            rewritten_by_systemd
        ),
        scenario!(
            "gates-replaced-wholesale",
            "somebody puts device programs of his own in the place of all of the launcher's, between gate and device_add and while the VF is attached: attached all the same, and his are there when it has gone",
            replaced_wholesale
        ),
    ]
}

/// Programs that somebody else puts in the place of a launcher's.
const REPLACE: &str = include_str!("files/replace-device-programs.pl");

/// The device programs of QEMU's cgroup, after `denied` were put in their place, if any.
async fn programs(lab: &Lab<'_>, denied: &str) -> Result<String> {
    let script = format!(
        "cg=$(sed -n 's/^0:://p' /proc/{}/cgroup); perl - /sys/fs/cgroup$cg {denied}",
        lab.qemu.pid
    );
    let limit = Duration::from_secs(30);
    let said = lab.l1.run_with(&script, REPLACE.as_bytes(), limit).await?;
    Ok(said.ok("replacing the device programs")?.text())
}

/// Puts programs in their place that know nothing of VFIO; their ids.
async fn replace(lab: &Lab<'_>) -> Result<String> {
    let script = "while read -r n d; do if [[ $d == vfio ]]; then echo $n; fi; done </proc/devices";
    let groups = sh(&lab.l1, script).await?;
    programs(lab, &format!("10:196 '{groups}:*'")).await
}

async fn replaced_wholesale(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:70:02";
    let look = Look::begin(lab, mac).await?;
    stops::arm(lab, "nodes-made").await?;
    let claim = lab.create(&Wish::new("replaced").mac(mac)).await?;
    stops::stopped(lab, "nodes-made").await?;
    look.expect(&claim, "nodes-made").await?;
    let first = replace(lab).await?;
    let shut = look.facts(&claim).await?;
    ensure!(
        !shut.contains(&stops::Fact::GroupRule) && !shut.contains(&stops::Fact::ContainerRule),
        "the replacement lets VFs through, so nothing is shown: {shut:?}"
    );
    stops::go_on(lab).await?;
    let attached = lab.ready(&claim).await?;
    look.expect(&claim, stops::ATTACHED).await?;
    let ours = programs(lab, "").await?;
    ensure!(ours != first, "the rule was set in no program: {ours}");

    let theirs = replace(lab).await?;
    let net = traffic::net(lab, &attached, 0).await?;
    net.ping(&lab.l2, PEER, 3, Duration::from_secs(30)).await?;
    // The next one has to open again what they closed.
    let (second, _) = lab.attach(&Wish::new("after")).await?;
    lab.release(&second).await?;
    lab.release(&claim).await?;
    look.expect(&claim, stops::RELEASED).await?;
    let left = programs(lab, "").await?;
    ensure!(
        left == theirs,
        "of the programs {theirs} there are now {left}"
    );
    Ok(())
}

/// What systemd does to a scope when anybody reloads it or sets a property of it: its own
/// device program is attached anew.
async fn rewrite(lab: &Lab<'_>) -> Result<()> {
    let script = format!(
        "cg=$(sed -n 's/^0:://p' /proc/{}/cgroup)
while [[ $cg && ${{cg##*/}} != *.scope ]]; do cg=${{cg%/*}}; done
[[ $cg ]] || {{ echo 'QEMU is in no scope' >&2; exit 1; }}
systemctl daemon-reload
systemctl set-property --runtime ${{cg##*/}} AllowedCPUs=0",
        lab.qemu.pid
    );
    sh(&lab.l1, &script).await.map(drop)
}

async fn rewritten_by_systemd(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:70:01";
    let look = Look::begin(lab, mac).await?;
    stops::arm(lab, "nodes-made").await?;
    let claim = lab.create(&Wish::new("rewritten").mac(mac)).await?;
    stops::stopped(lab, "nodes-made").await?;
    look.expect(&claim, "nodes-made").await?;
    rewrite(lab).await?;
    let open = look.facts(&claim).await?;
    ensure!(
        !open.contains(&stops::Fact::GroupRule),
        "systemd took nothing away, so nothing is shown: {open:?}"
    );
    stops::go_on(lab).await?;
    let attached = lab.ready(&claim).await?;
    look.expect(&claim, stops::ATTACHED).await?;

    rewrite(lab).await?;
    let net = traffic::net(lab, &attached, 0).await?;
    net.ping(&lab.l2, PEER, 3, Duration::from_secs(30)).await?;
    // The next one has to open again what systemd closed.
    let (second, _) = lab.attach(&Wish::new("after")).await?;
    lab.release(&second).await?;
    lab.release(&claim).await?;
    look.expect(&claim, stops::RELEASED).await
}

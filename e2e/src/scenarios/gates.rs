//! A launcher whose cgroup is rewritten under the agent's hands: attached all the same, once,
//! and nothing stays open.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::FutureExt;

use super::support::far::sh;
use super::support::site::PEER;
use super::support::stops::{self, Look};
use super::support::{Lab, Wish};
use super::{Scenario, scenario, traffic};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![scenario!(
        "gates-rewritten-by-systemd",
        "daemon-reload and set-property on the launcher's scope between gate and device_add, and after it: attached all the same, no wider rule left",
        rewritten_by_systemd
    )]
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

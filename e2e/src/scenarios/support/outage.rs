//! An API server that is away: its static pod is taken from the kubelet, and given back. And one
//! to which the link comes and goes: what is sent to it is dropped without a word.

use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;

use crate::clusters::Cluster;
use crate::docker::GATEWAY;
use crate::wait::{self, Probe};

/// Gives the pod back should the harness not come to it, before anybody starts anew.
const TIMER: &str = "e2e-outage";
const TIMER_SECONDS: u32 = 900;
const MANIFEST: &str = "/etc/kubernetes/manifests/kube-apiserver.yaml";
const AWAY: &str = "/etc/kubernetes/kube-apiserver.away";
const LIMIT: Duration = Duration::from_secs(120);
const EVERY: Duration = Duration::from_millis(500);

/// Ends only by [`Outage::end`], or by a timer of the node.
pub struct Outage<'c> {
    cluster: &'c Cluster,
    client: Client,
}

impl<'c> Outage<'c> {
    /// The cluster's API server is gone when this returns.
    pub async fn begin(cluster: &'c Cluster) -> Result<Self> {
        let outage = Self {
            cluster,
            client: cluster.client(),
        };
        outage
            .run(&format!(
                "systemctl stop {TIMER}.timer {TIMER}.service 2>/dev/null
systemctl reset-failed {TIMER}.service 2>/dev/null
set -e
systemd-run -q --unit={TIMER} --on-active={TIMER_SECONDS} mv -f {AWAY} {MANIFEST}
mv {MANIFEST} {AWAY}"
            ))
            .context("taking the API server away")?;
        wait::until("the API server to be gone", LIMIT, EVERY, || async {
            let left = outage.run("crictl ps -q --name '^kube-apiserver$'")?;
            Ok(if left.trim().is_empty() {
                Probe::Ready(())
            } else {
                Probe::NotYet("its container runs".to_owned())
            })
        })
        .await?;
        Ok(outage)
    }

    /// The API server answers again when this returns.
    pub async fn end(self) -> Result<()> {
        self.run(&format!(
            "systemctl stop {TIMER}.timer; [[ ! -e {AWAY} ]] || mv {AWAY} {MANIFEST}"
        ))
        .context("giving the API server back")?;
        wait::until("the API server to be ready", LIMIT, EVERY, || async {
            let ready = http::Request::get("/readyz").body(Vec::new())?;
            Ok(match self.client.request_text(ready).await {
                Ok(_) => Probe::Ready(()),
                Err(error) => Probe::NotYet(error.to_string()),
            })
        })
        .await
    }

    fn run(&self, script: &str) -> Result<String> {
        run(self.cluster, script)
    }
}

fn run(cluster: &Cluster, script: &str) -> Result<String> {
    Ok(cluster.exec().args(["bash", "-c", script]).text()?)
}

const FLAPS: &str = "e2e-flaps";
/// Seconds without and with a link. The programs give a request up after 15 s, a leader its Lease
/// after 10 s.
const DOWN_SECONDS: u32 = 20;
const UP_SECONDS: u32 = 10;

/// A link to a cluster's API server that comes and goes, for everybody but the harness and the
/// server's own node. Ends only by [`Flapping::end`], or by a timer of the node.
pub struct Flapping<'c> {
    cluster: &'c Cluster,
}

impl<'c> Flapping<'c> {
    /// The link is down when this returns, and comes and goes from then on.
    pub async fn begin(cluster: &'c Cluster) -> Result<Self> {
        let rule = format!("INPUT -p tcp --dport 6443 ! -i lo ! -s {GATEWAY} -j DROP");
        let script = format!(
            "systemctl stop {FLAPS} 2>/dev/null; systemctl reset-failed {FLAPS} 2>/dev/null
rm -f /run/{FLAPS}; set -e
systemd-run -q --unit={FLAPS} -p RuntimeMaxSec={TIMER_SECONDS} -p 'ExecStopPost=-iptables -D {rule}' \
bash -c 'while iptables -I {rule}; do sleep {DOWN_SECONDS}
n=$(iptables -nvxL INPUT 1); set -- $n; iptables -D {rule}; echo $1 >>/run/{FLAPS}; sleep {UP_SECONDS}; done'"
        );
        run(cluster, &script).context("taking the link to the API server down")?;
        wait::until("the link to be down", LIMIT, EVERY, || async {
            let there = run(
                cluster,
                &format!("iptables -C {rule} 2>&1 && echo down; true"),
            )?;
            Ok(if there.contains("down") {
                Probe::Ready(())
            } else {
                Probe::NotYet(there)
            })
        })
        .await?;
        Ok(Self { cluster })
    }

    /// Packets that were dropped, each time that the link was down so far.
    pub fn dropped(&self) -> Result<Vec<u64>> {
        let said = run(self.cluster, &format!("cat /run/{FLAPS} 2>/dev/null; true"))?;
        said.split_ascii_whitespace()
            .map(|n| n.parse().with_context(|| format!("{said:?}")))
            .collect()
    }

    /// The link is up for good when this returns.
    pub fn end(self) -> Result<()> {
        run(self.cluster, &format!("systemctl stop {FLAPS}"))
            .context("giving the link to the API server back")?;
        Ok(())
    }
}

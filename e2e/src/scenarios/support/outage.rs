//! An API server that is away: its static pod is taken from the kubelet, and given back.

use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;

use crate::clusters::Cluster;
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
        Ok(self.cluster.exec().args(["bash", "-c", script]).text()?)
    }
}

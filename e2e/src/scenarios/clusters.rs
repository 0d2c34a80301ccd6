//! The floor that everything stands on: both clusters run pods with addresses of their
//! own, and a pod of the guest's cluster reaches the host's API server.

use std::time::Duration;

use anyhow::{Context, Result};
use futures::FutureExt;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;

use super::{Needs, Scenario};
use crate::clusters::Cluster;
use crate::context::DataCentre;
use crate::wait::{self, Probe};

const POD: &str = "e2e-floor";
const LIMIT: Duration = Duration::from_secs(90);
const EVERY: Duration = Duration::from_millis(300);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![Scenario {
        when: super::When::Always,
        needs: Needs::Clusters,
        name: "clusters-run-pods",
        shows: "both clusters run a pod, and the guest's node reaches the host's API server",
        run: |dc| run(dc).boxed(),
    }]
}

async fn run(dc: &DataCentre) -> Result<()> {
    let pods = tokio::try_join!(pod(&dc.host), pod(&dc.guest));
    let reached = reach(dc);
    for c in [&dc.host, &dc.guest] {
        remove(c).await?;
    }
    let (host, guest) = pods?;
    anyhow::ensure!(
        host.starts_with("10.244."),
        "the host's pod has address {host}"
    );
    anyhow::ensure!(
        guest.starts_with("10.245."),
        "the guest's pod has address {guest}"
    );
    reached
}

/// Runs a pod and returns its address.
async fn pod(cluster: &Cluster) -> Result<String> {
    let api: Api<Pod> = Api::default_namespaced(cluster.client());
    let pod = serde_json::from_value(json!({
        "metadata": {"name": POD},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "pause",
                "image": "registry.k8s.io/pause:3.10",
                "imagePullPolicy": "Never",
            }],
        },
    }))?;
    api.create(&PostParams::default(), &pod)
        .await
        .context("creating the pod")?;
    wait::until(
        &format!("pod {POD} of {}", cluster.spec.name),
        LIMIT,
        EVERY,
        || async {
            let status = api.get_status(POD).await?.status.unwrap_or_default();
            Ok(match (status.phase.as_deref(), status.pod_ip) {
                (Some("Running"), Some(ip)) => Probe::Ready(ip),
                (phase, _) => Probe::NotYet(format!("{phase:?} {:?}", status.container_statuses)),
            })
        },
    )
    .await
}

async fn remove(cluster: &Cluster) -> Result<()> {
    let api: Api<Pod> = Api::default_namespaced(cluster.client());
    match api.delete(POD, &DeleteParams::default()).await {
        Ok(_) => {}
        Err(kube::Error::Api(s)) if s.code == 404 => return Ok(()),
        Err(e) => return Err(e.into()),
    }
    wait::until(&format!("pod {POD} to go"), LIMIT, EVERY, || async {
        Ok(match api.get_opt(POD).await? {
            None => Probe::Ready(()),
            Some(_) => Probe::NotYet("still there".into()),
        })
    })
    .await
}

/// The way the guest-syncer takes: by name, inside the shared network.
fn reach(dc: &DataCentre) -> Result<()> {
    let admin = dc
        .host
        .exec()
        .args(["cat", "/etc/kubernetes/admin.conf"])
        .run()?
        .stdout;
    let kubectl = [
        "kubectl",
        "--kubeconfig=/dev/stdin",
        "get",
        "nodes",
        "-o",
        "name",
    ];
    let answer = dc.guest.exec().args(kubectl).stdin(admin).text()?;
    let want = format!("node/{}", dc.host.node());
    anyhow::ensure!(
        answer.lines().any(|l| l == want),
        "the host's API server said {answer:?}"
    );
    Ok(())
}

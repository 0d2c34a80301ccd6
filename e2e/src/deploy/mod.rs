//! Puts the project into the data centre the way its users would: images, Helm charts,
//! and what an administrator sets up by hand. Run again, it redeploys what changed.

pub mod apply;
pub mod credential;
mod helm;
mod images;
pub mod names;
mod tenant;

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Api;
use kube::api::ListParams;
use serde_json::{Value, json};
use tokio::task::block_in_place;

use crate::clusters::Cluster;
use crate::context::DataCentre;
use crate::machine::{self, L1};
use crate::progress::Step;
use crate::wait::{self, Probe};
use images::Image;
pub use images::{Images, build};

/// Imports and installs both programs; returns when all their pods are ready. L1 must
/// have joined.
pub async fn up(dc: &DataCentre, images: &Images) -> Result<()> {
    into_l1(machine::find(dc)?.l1(), images).await?;
    into_clusters(dc, images).await?;
    agents_are_ready(&dc.host).await
}

/// Imports and installs both programs but for L1's part: the node agents wait for their image
/// there.
pub async fn into_clusters(dc: &DataCentre, images: &Images) -> Result<()> {
    let step = Step::begin("importing the images");
    import(&dc.host, &images.host_provisioner, &step)?;
    import(&dc.guest, &images.guest_syncer, &step)?;
    step.done();
    let step = Step::begin("installing the host's charts");
    release(dc, true, "vf-crds", &json!({}))?;
    tenant::guest_cluster(&dc.host).await?;
    release(
        dc,
        true,
        "host-provisioner",
        &host_values(&images.host_provisioner),
    )?;
    tenant::guest_is_ready(&dc.host).await?;
    step.done();
    let step = Step::begin("installing the guest's charts");
    release(dc, false, "vf-crds", &json!({}))?;
    tenant::guest_side(&dc.host, &dc.guest).await?;
    release(
        dc,
        false,
        "guest-syncer",
        &guest_values(&images.guest_syncer),
    )?;
    step.done();
    Ok(())
}

/// helm does not wait for a DaemonSet whose pods may all be unavailable during an update.
pub async fn agents_are_ready(host: &Cluster) -> Result<()> {
    let api: Api<DaemonSet> = Api::namespaced(host.client(), names::SYSTEM);
    let limit = Duration::from_secs(120);
    let every = Duration::from_millis(500);
    wait::until("the node agents to be ready", limit, every, || async {
        let all = api.list(&ListParams::default()).await?.items;
        let behind: Vec<String> = all.iter().filter_map(behind).collect();
        Ok(match behind.as_slice() {
            [] if !all.is_empty() => Probe::Ready(()),
            _ => Probe::NotYet(behind.join(", ")),
        })
    })
    .await
}

/// What keeps a DaemonSet from being as its spec says, everywhere.
fn behind(set: &DaemonSet) -> Option<String> {
    let status = set.status.clone().unwrap_or_default();
    let seen = status.observed_generation == set.metadata.generation;
    let updated = status.updated_number_scheduled.unwrap_or(0);
    let (ready, wanted) = (status.number_ready, status.desired_number_scheduled);
    (!seen || wanted == 0 || updated < wanted || ready < wanted)
        .then(|| format!("{updated} updated and {ready} ready of {wanted}"))
}

fn release(dc: &DataCentre, host: bool, chart: &str, values: &Value) -> Result<()> {
    let cluster = if host { &dc.host } else { &dc.guest };
    let (paths, tools) = (&dc.ctx.paths, &dc.ctx.tools);
    block_in_place(|| helm::install(paths, tools, cluster, chart, names::SYSTEM, values))
}

/// Into the containerd of a cluster's control plane: a tag is a hash, so one that is there is
/// the right one.
fn import(cluster: &Cluster, image: &Image, step: &Step) -> Result<()> {
    step.note(format!("{} into {}", image.name(), cluster.spec.name));
    block_in_place(|| {
        let known = cluster
            .exec()
            .args(["ctr", "-n", "k8s.io", "images", "ls", "-q"])
            .text()?;
        if !known.lines().any(|l| l == image.name()) {
            cluster.import_image(&image.archive)?;
        }
        Ok(())
    })
}

/// The node agent's image into L1's containerd. L1 must have joined.
pub async fn into_l1(l1: &L1, images: &Images) -> Result<()> {
    let image = &images.host_provisioner;
    let step = Step::begin("importing the node agent's image into L1");
    let known = l1
        .ok("ctr --connect-timeout 60s -n k8s.io images ls -q")
        .await?
        .text();
    if !known.lines().any(|l| l == image.name()) {
        l1.import_image(&image.archive).await?;
    }
    step.done();
    Ok(())
}

fn image_values(image: &Image) -> Value {
    json!({"repository": image.repository, "tag": image.tag, "pullPolicy": "Never"})
}

/// The control plane's node is the harness's own machine and runs at its speed.
fn on_control_plane() -> Value {
    json!({"node-role.kubernetes.io/control-plane": ""})
}

fn host_values(image: &Image) -> Value {
    json!({
        "image": image_values(image),
        "controller": {"nodeSelector": on_control_plane()},
        "node": {"nodeSelector": {"kubernetes.io/hostname": "l1"}},
    })
}

fn guest_values(image: &Image) -> Value {
    json!({
        "image": image_values(image),
        "nodeSelector": on_control_plane(),
        "guestCluster": names::GUEST_CLUSTER,
        "hostKubeconfigSecret": {
            "name": names::HOST_KUBECONFIG_SECRET,
            "key": tenant::KUBECONFIG_KEY,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(generation: i64, status: Value) -> DaemonSet {
        let text = json!({
            "metadata": {"name": "agent", "generation": generation},
            "status": status,
        });
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn agents_are_awaited_until_all_are_new_and_ready() {
        let status = |seen: i64, updated: i32, ready: i32, wanted: i32| {
            json!({
                "observedGeneration": seen, "updatedNumberScheduled": updated,
                "numberReady": ready, "desiredNumberScheduled": wanted,
                "currentNumberScheduled": updated, "numberMisscheduled": 0,
            })
        };
        assert_eq!(behind(&set(2, status(2, 1, 1, 1))), None);
        for (why, of) in [
            ("the controller has not seen it", status(1, 1, 1, 1)),
            ("an old pod is ready", status(2, 0, 1, 1)),
            ("the new pod is not", status(2, 1, 0, 1)),
            ("no node takes it yet", status(2, 0, 0, 0)),
        ] {
            assert!(behind(&set(2, of)).is_some(), "{why}");
        }
    }
}

//! Puts the project into the data centre the way its users would: images, Helm charts,
//! and what an administrator sets up by hand. Run again, it redeploys what changed.

pub mod apply;
pub mod credential;
mod helm;
mod images;
pub mod names;
mod tenant;

use anyhow::Result;
use serde_json::{Value, json};

use crate::context::DataCentre;
use crate::machine;
use crate::progress::Step;
use images::Image;
pub use images::{Images, build};

/// Imports and installs both programs; returns when all their pods are ready. L1 must
/// have joined.
pub async fn up(dc: &DataCentre, images: &Images) -> Result<()> {
    let step = Step::begin("importing the images");
    import(dc, images, &step).await?;
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

fn release(dc: &DataCentre, host: bool, chart: &str, values: &Value) -> Result<()> {
    let cluster = if host { &dc.host } else { &dc.guest };
    helm::install(
        &dc.ctx.paths,
        &dc.ctx.tools,
        cluster,
        chart,
        names::SYSTEM,
        values,
    )
}

/// Into the containerd of every node that runs it: a tag is a hash, so one that is there
/// is the right one.
async fn import(dc: &DataCentre, images: &Images, step: &Step) -> Result<()> {
    for (cluster, image) in [
        (&dc.host, &images.host_provisioner),
        (&dc.guest, &images.guest_syncer),
    ] {
        step.note(format!("{} into {}", image.name(), cluster.spec.name));
        let known = cluster
            .exec()
            .args(["ctr", "-n", "k8s.io", "images", "ls", "-q"])
            .text()?;
        if !known.lines().any(|l| l == image.name()) {
            cluster.import_image(&image.archive)?;
        }
    }
    let l1 = machine::find(dc)?.l1().clone();
    let image = &images.host_provisioner;
    step.note(format!("{} into L1", image.name()));
    let known = l1.ok("ctr -n k8s.io images ls -q").await?.text();
    if !known.lines().any(|l| l == image.name()) {
        l1.import_image(&image.archive).await?;
    }
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

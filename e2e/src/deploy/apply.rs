//! Server-side apply as the data centre's administrator: what scenarios and the
//! deployment make in a cluster, made again without harm.

use anyhow::{Context, Result};
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::Value;

/// The field manager of everything the harness writes.
pub const MANAGER: &str = "e2e-administrator";

/// An API for any kind: by `plural`, in `namespace` or cluster-wide.
#[must_use]
pub fn api(
    client: &Client,
    api_version: &str,
    kind: &str,
    plural: &str,
    namespace: Option<&str>,
) -> Api<DynamicObject> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let gvk = GroupVersionKind::gvk(group, version, kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, plural);
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

/// Applies `object` (with apiVersion, kind, metadata.name) through `api` and returns it.
pub async fn apply(api: &Api<DynamicObject>, object: &Value) -> Result<DynamicObject> {
    let parsed: DynamicObject = serde_json::from_value(object.clone())?;
    let name = parsed
        .metadata
        .name
        .as_deref()
        .context("an object without a name")?;
    let kind = parsed.types.unwrap_or_default().kind;
    api.patch(
        name,
        &PatchParams::apply(MANAGER).force(),
        &Patch::Apply(object),
    )
    .await
    .with_context(|| format!("applying {kind} {name}"))
}

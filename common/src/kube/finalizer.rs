//! Putting a finalizer on an object and taking it off: each one fenced write.

use std::fmt::Debug;

use kube::api::{Api, Patch, PatchParams};
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::json;

/// True when `object` carries `finalizer`.
#[must_use]
pub fn has<K: Resource>(object: &K, finalizer: &str) -> bool {
    object.finalizers().iter().any(|f| f == finalizer)
}

/// Adds `finalizer` to the object as it was seen; `None` when it is there already.
///
/// The request carries the seen uid and resourceVersion: 409 when the object
/// has changed since, and never a write on a new object of the same name.
pub async fn add<K>(api: &Api<K>, seen: &K, finalizer: &str) -> Result<Option<K>, kube::Error>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    if has(seen, finalizer) {
        return Ok(None);
    }
    let mut all = seen.finalizers().to_vec();
    all.push(finalizer.to_owned());
    write(api, seen, &all).await.map(Some)
}

/// Takes `finalizer` off the object as it was seen; `None` when it is not there.
/// Fenced as [`add`].
pub async fn remove<K>(api: &Api<K>, seen: &K, finalizer: &str) -> Result<Option<K>, kube::Error>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    if !has(seen, finalizer) {
        return Ok(None);
    }
    let all: Vec<String> = seen
        .finalizers()
        .iter()
        .filter(|f| *f != finalizer)
        .cloned()
        .collect();
    write(api, seen, &all).await.map(Some)
}

async fn write<K>(api: &Api<K>, seen: &K, finalizers: &[String]) -> Result<K, kube::Error>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let patch = json!({"metadata": {
        "uid": seen.meta().uid,
        "resourceVersion": seen.meta().resource_version,
        "finalizers": finalizers,
    }});
    api.patch(
        &seen.name_any(),
        &PatchParams::default(),
        &Patch::Merge(patch),
    )
    .await
}

//! A server with the CRDs, and what each test says to it.

use std::path::Path;

use kube::api::{Api, DynamicObject, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Error};
use serde_json::{Value, json};
use test_apiserver::TestApiServer;

pub async fn server() -> TestApiServer {
    let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/vf-crds/templates");
    TestApiServer::lend(&[&crds]).await.unwrap()
}

pub fn api(client: Client, kind: &str, plural: &str, namespaced: bool) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk(common::api::GROUP, common::api::VERSION, kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, plural);
    if namespaced {
        Api::namespaced_with(client, "default", &resource)
    } else {
        Api::all_with(client, &resource)
    }
}

pub fn claims(server: &TestApiServer) -> Api<DynamicObject> {
    api(server.admin(), "VFClaim", "vfclaims", true)
}

pub fn object(kind: &str, name: &str, spec: &Value) -> DynamicObject {
    serde_json::from_value(json!({
        "apiVersion": format!("{}/{}", common::api::GROUP, common::api::VERSION),
        "kind": kind, "metadata": {"name": name}, "spec": spec,
    }))
    .unwrap()
}

/// `base` with the value at `pointer` set (null removes), parents made.
pub fn with(base: &Value, changes: &[(&str, Value)]) -> Value {
    let mut spec = base.clone();
    for (path, value) in changes {
        let mut at = &mut spec;
        let keys: Vec<&str> = path.split('.').collect();
        let (last, parents) = keys.split_last().unwrap();
        for key in parents {
            at = &mut at[*key];
        }
        if value.is_null() {
            at.as_object_mut().unwrap().remove(*last);
        } else {
            at[*last] = value.clone();
        }
    }
    spec
}

#[track_caller]
pub fn refused<T>(what: &str, result: Result<T, Error>, says: &str) {
    match result {
        Ok(_) => panic!("{what}: accepted"),
        Err(Error::Api(status)) => {
            assert_eq!(status.code, 422, "{what}: {}", status.message);
            assert!(status.message.contains(says), "{what}: {}", status.message);
        }
        Err(other) => panic!("{what}: {other}"),
    }
}

pub const DRY: fn() -> PostParams = || PostParams {
    dry_run: true,
    field_manager: None,
};

pub async fn create_refused(api: &Api<DynamicObject>, kind: &str, spec: Value, says: &str) {
    let result = api.create(&DRY(), &object(kind, "try", &spec)).await;
    refused(&spec.to_string(), result, says);
}

pub async fn create_accepted(api: &Api<DynamicObject>, kind: &str, spec: Value) -> DynamicObject {
    let result = api.create(&DRY(), &object(kind, "try", &spec)).await;
    result.unwrap_or_else(|e| panic!("{spec}: {e}"))
}

/// Makes an object that stays.
pub async fn create(
    api: &Api<DynamicObject>,
    kind: &str,
    name: &str,
    spec: &Value,
) -> DynamicObject {
    let made = api
        .create(&PostParams::default(), &object(kind, name, spec))
        .await;
    made.unwrap_or_else(|e| panic!("{kind} {name}: {e}"))
}

pub fn tenant_claim() -> Value {
    json!({"className": "gold", "nodeName": "worker"})
}

pub fn host_claim() -> Value {
    json!({"className": "gold", "vmIP": "10.0.0.1", "guest": {
        "cluster": "blue", "clusterUID": "u", "namespace": "default", "name": "c", "uid": "1",
        "nodeName": "n", "systemUUID": "6d1a3a5e-4e5f-4b7a-9a43-0a7c1f2e3d4c",
    }})
}

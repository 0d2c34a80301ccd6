//! The CRDs on a real API server: accepted, and each rule, pattern, bound and
//! default shown to do its work.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::path::Path;

use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Error};
use serde_json::{Value, json};
use test_apiserver::TestApiServer;

async fn server() -> TestApiServer {
    let server = TestApiServer::start().await.unwrap();
    let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/vf-crds/templates");
    server.install_crds(&crds).await.unwrap();
    server
}

fn api(client: Client, kind: &str, plural: &str, namespaced: bool) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk(common::api::GROUP, common::api::VERSION, kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, plural);
    if namespaced {
        Api::namespaced_with(client, "default", &resource)
    } else {
        Api::all_with(client, &resource)
    }
}

fn claims(server: &TestApiServer) -> Api<DynamicObject> {
    api(server.admin(), "VFClaim", "vfclaims", true)
}

fn object(kind: &str, name: &str, spec: &Value) -> DynamicObject {
    serde_json::from_value(json!({
        "apiVersion": format!("{}/{}", common::api::GROUP, common::api::VERSION),
        "kind": kind, "metadata": {"name": name}, "spec": spec,
    }))
    .unwrap()
}

/// `base` with the value at `pointer` set (null removes), parents made.
fn with(base: &Value, changes: &[(&str, Value)]) -> Value {
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
fn refused<T>(what: &str, result: Result<T, Error>, says: &str) {
    match result {
        Ok(_) => panic!("{what}: accepted"),
        Err(Error::Api(status)) => {
            assert_eq!(status.code, 422, "{what}: {}", status.message);
            assert!(status.message.contains(says), "{what}: {}", status.message);
        }
        Err(other) => panic!("{what}: {other}"),
    }
}

const DRY: fn() -> PostParams = || PostParams {
    dry_run: true,
    field_manager: None,
};

async fn create_refused(api: &Api<DynamicObject>, kind: &str, spec: Value, says: &str) {
    let result = api.create(&DRY(), &object(kind, "try", &spec)).await;
    refused(&spec.to_string(), result, says);
}

async fn create_accepted(api: &Api<DynamicObject>, kind: &str, spec: Value) -> DynamicObject {
    let result = api.create(&DRY(), &object(kind, "try", &spec)).await;
    result.unwrap_or_else(|e| panic!("{spec}: {e}"))
}

fn tenant_claim() -> Value {
    json!({"className": "gold", "nodeName": "worker"})
}

fn host_claim() -> Value {
    json!({"className": "gold", "vmIP": "10.0.0.1", "guest": {
        "cluster": "blue", "clusterUID": "u", "namespace": "default", "name": "c", "uid": "1",
        "nodeName": "n", "systemUUID": "6d1a3a5e-4e5f-4b7a-9a43-0a7c1f2e3d4c",
    }})
}

#[tokio::test]
async fn claim_specs() {
    let server = server().await;
    let api = claims(&server);
    let (tenant, host) = (tenant_claim(), host_claim());
    create_accepted(&api, "VFClaim", tenant.clone()).await;
    create_accepted(&api, "VFClaim", host.clone()).await;
    create_accepted(
        &api,
        "VFClaim",
        with(&tenant, &[("className", json!(null))]),
    )
    .await;

    let long = |n: usize| json!("a".repeat(n));
    let none = "exactly one target";
    for (base, path, value, says) in [
        (&tenant, "nodeName", json!(null), none),
        (&host, "nodeName", json!("n"), none),
        (
            &tenant,
            "vmIP",
            json!("10.0.0.1"),
            "vmIP belongs to host copies",
        ),
        (&tenant, "nodeName", json!(""), "at least 1 chars"),
        (&tenant, "nodeName", long(254), "more than 253"),
        (&tenant, "className", json!(""), "at least 1 chars"),
        (&tenant, "className", json!("Gold"), "should match"),
        (&tenant, "className", json!("-gold"), "should match"),
        (&tenant, "className", long(64), "more than 63"),
        (&host, "vmIP", json!("1"), "at least 2 chars"),
        (&host, "vmIP", long(46), "more than 45"),
        (&host, "guest.cluster", json!(""), "at least 1 chars"),
        (&host, "guest.cluster", long(64), "more than 63"),
        (&host, "guest.cluster", json!(null), "Required value"),
        (&host, "guest.clusterUID", json!(""), "at least 1 chars"),
        (&host, "guest.clusterUID", long(65), "more than 64"),
        (&host, "guest.namespace", json!(""), "at least 1 chars"),
        (&host, "guest.namespace", long(64), "more than 63"),
        (&host, "guest.name", json!(""), "at least 1 chars"),
        (&host, "guest.name", long(254), "more than 253"),
        (&host, "guest.uid", json!(""), "at least 1 chars"),
        (&host, "guest.uid", long(65), "more than 64"),
        (&host, "guest.nodeName", json!(""), "at least 1 chars"),
        (&host, "guest.nodeName", long(254), "more than 253"),
        (
            &host,
            "guest.systemUUID",
            json!("short"),
            "at least 36 chars",
        ),
        (&host, "guest.systemUUID", long(37), "more than 36"),
        (&host, "guest.systemUUID", json!(null), "Required value"),
        (&host, "guest.providerID", long(513), "more than 512"),
    ] {
        create_refused(&api, "VFClaim", with(base, &[(path, value)]), says).await;
    }

    let network = with(
        &tenant,
        &[(
            "network",
            json!({"vlan": {"id": 100, "qos": 7}, "macAddress": "02:AB:cd:00:00:01"}),
        )],
    );
    create_accepted(&api, "VFClaim", network.clone()).await;
    for (path, value, says) in [
        ("network.macAddress", json!("nonsense"), "should match"),
        (
            "network.macAddress",
            json!("01:00:00:00:00:01"),
            "should match",
        ),
        (
            "network.macAddress",
            json!("02:00:00:00:00"),
            "should match",
        ),
        (
            "network.macAddress",
            json!("02:00:00:00:00:01:02"),
            "more than 17",
        ),
        (
            "network.macAddress",
            json!("00:00:00:00:00:00"),
            "must not be all zero",
        ),
        ("network.vlan.id", json!(0), "greater than or equal to 1"),
        ("network.vlan.id", json!(4095), "less than or equal to 4094"),
        ("network.vlan.id", json!(null), "Required value"),
        ("network.vlan.qos", json!(8), "less than or equal to 7"),
        ("network.vlan.qos", json!(-1), "greater than or equal to 0"),
    ] {
        create_refused(&api, "VFClaim", with(&network, &[(path, value)]), says).await;
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn claim_targets_and_classes_do_not_change() {
    let server = server().await;
    let api = claims(&server);
    let bare = json!({"nodeName": "worker"});
    for (name, spec) in [
        ("tenant", tenant_claim()),
        ("host", host_claim()),
        ("bare", bare),
    ] {
        api.create(&PostParams::default(), &object("VFClaim", name, &spec))
            .await
            .unwrap();
    }
    let guest = host_claim()["guest"].clone();
    let class = "className is immutable";
    for (name, patch, says) in [
        ("tenant", json!({"className": "silver"}), class),
        ("tenant", json!({"className": null}), class),
        ("bare", json!({"className": "gold"}), class),
        (
            "tenant",
            json!({"nodeName": "other"}),
            "nodeName is immutable",
        ),
        (
            "tenant",
            json!({"nodeName": null, "guest": guest}),
            "nodeName is immutable",
        ),
        (
            "tenant",
            json!({"nodeName": null, "guest": guest}),
            "guest is immutable",
        ),
        (
            "host",
            json!({"guest": {"systemUUID": "6d1a3a5e-4e5f-4b7a-9a43-0a7c1f2e3d4d"}}),
            "guest is immutable",
        ),
        (
            "host",
            json!({"guest": {"providerID": "x"}}),
            "guest is immutable",
        ),
    ] {
        let patch = json!({ "spec": patch });
        let done = api
            .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        refused(&format!("{name} {patch}"), done, says);
    }
    for (name, patch) in [
        ("tenant", json!({"network": {"vlan": {"id": 5}}})),
        ("host", json!({"vmIP": "10.0.0.2"})),
        ("host", json!({"vmIP": null})),
    ] {
        let patch = json!({ "spec": patch });
        api.patch(name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .unwrap();
    }
    server.stop().await.unwrap();
}

fn device() -> Value {
    json!({"nodeName": "h1", "physicalFunction": "pf", "vfIndex": 3})
}

fn attachment() -> Value {
    json!({"vmiUID": "v", "podUID": "p", "qemuDeviceID": "vfc-1", "port": "rp1",
        "transport": "QmpSocket", "bootID": "b", "qemuStartTime": 1})
}

async fn status(api: &Api<DynamicObject>, patch: &Value) -> Result<DynamicObject, Error> {
    let patch = json!({ "status": patch });
    api.patch_status("c", &PatchParams::default(), &Patch::Merge(&patch))
        .await
}

#[tokio::test]
async fn claim_status_keeps_its_order() {
    let server = server().await;
    let api = claims(&server);
    api.create(
        &PostParams::default(),
        &object("VFClaim", "c", &host_claim()),
    )
    .await
    .unwrap();
    refused(
        "device first",
        status(&api, &json!({"device": device()})).await,
        "a device needs a hostNode",
    );
    status(&api, &json!({"hostNode": "h1"})).await.unwrap();
    refused(
        "attachment first",
        status(&api, &json!({"attachment": attachment()})).await,
        "an attachment needs a device",
    );
    status(&api, &json!({"device": device()})).await.unwrap();
    let once = "device is set once until it is cleared";
    for (path, value) in [
        ("nodeName", json!("h2")),
        ("physicalFunction", json!("other")),
        ("vfIndex", json!(4)),
    ] {
        let patch = json!({"device": {path: value}});
        refused(path, status(&api, &patch).await, once);
    }
    status(&api, &json!({"device": {"pciAddress": "0000:03:10.2"}}))
        .await
        .unwrap();
    for address in [json!("0000:03:10.4"), json!(null)] {
        let patch = json!({"device": {"pciAddress": address}});
        refused("pciAddress", status(&api, &patch).await, once);
    }
    let node = "hostNode cannot change while a device is set";
    refused(
        "moved",
        status(&api, &json!({"hostNode": "h2"})).await,
        node,
    );
    refused(
        "left",
        status(&api, &json!({"hostNode": null})).await,
        "hostNode",
    );
    refused(
        "no status",
        status(&api, &json!(null)).await,
        "status cannot be removed",
    );
    status(&api, &json!({"attachment": attachment()}))
        .await
        .unwrap();
    let other = json!({"attachment": {"transport": "Telepathy"}});
    refused("transport", status(&api, &other).await, "Unsupported value");
    refused(
        "device before attachment",
        status(&api, &json!({"device": null})).await,
        "an attachment needs a device",
    );
    status(&api, &json!({"device": null, "attachment": null}))
        .await
        .unwrap();
    status(&api, &json!({"hostNode": "h2"})).await.unwrap();
    server.stop().await.unwrap();
}

#[tokio::test]
async fn claim_conditions_are_a_map_with_bounds() {
    let server = server().await;
    let api = claims(&server);
    api.create(
        &PostParams::default(),
        &object("VFClaim", "c", &host_claim()),
    )
    .await
    .unwrap();
    let condition = |type_: &str, status: &str, reason: &str| {
        json!({"type": type_, "status": status, "reason": reason, "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z"})
    };
    let list = |all: Vec<Value>| json!({ "conditions": all });
    let good = condition("Ready", "True", "Ready");
    status(&api, &list(vec![good.clone()])).await.unwrap();
    let many = (0..17)
        .map(|i| condition(&format!("C{i}"), "True", "Ready"))
        .collect();
    for (what, conditions, says) in [
        ("twice", vec![good.clone(), good.clone()], "Duplicate value"),
        (
            "status",
            vec![condition("Ready", "Maybe", "Ready")],
            "Unsupported value",
        ),
        (
            "reason",
            vec![condition("Ready", "True", "not a word")],
            "should match",
        ),
        (
            "no reason",
            vec![condition("Ready", "True", "")],
            "at least 1 chars",
        ),
        (
            "no type",
            vec![condition("", "True", "Ready")],
            "at least 1 chars",
        ),
        ("many", many, "at most 16 items"),
    ] {
        refused(what, status(&api, &list(conditions)).await, says);
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn claims_are_found_by_their_host_node_and_pfs_by_theirs() {
    let server = server().await;
    let api = claims(&server);
    for name in ["c", "d"] {
        api.create(
            &PostParams::default(),
            &object("VFClaim", name, &host_claim()),
        )
        .await
        .unwrap();
    }
    status(&api, &json!({"hostNode": "h1"})).await.unwrap();
    let found = api
        .list(&ListParams::default().fields("status.hostNode=h1"))
        .await
        .unwrap();
    assert_eq!(found.items.len(), 1);
    assert_eq!(found.items[0].metadata.name.as_deref(), Some("c"));

    let pfs = self::api(
        server.admin(),
        "PhysicalFunction",
        "physicalfunctions",
        false,
    );
    for node in ["h1", "h2"] {
        let spec = json!({"nodeName": node, "identity": "serial"});
        pfs.create(
            &PostParams::default(),
            &object("PhysicalFunction", node, &spec),
        )
        .await
        .unwrap();
    }
    let found = pfs
        .list(&ListParams::default().fields("spec.nodeName=h2"))
        .await
        .unwrap();
    assert_eq!(found.items.len(), 1);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn classes_have_defaults_and_bounds() {
    let server = server().await;
    let api = api(server.admin(), "VFClass", "vfclasses", false);
    let made = create_accepted(&api, "VFClass", json!({})).await;
    assert_eq!(made.data["spec"]["allowedOverrides"], json!(["MacAddress"]));
    assert_eq!(made.data["spec"]["pfSelector"], json!({}));
    assert_eq!(made.data["spec"]["network"], json!({}));
    let base = json!({"pfSelector": {}, "network": {"vlan": {"id": 1}}});
    for (path, value, says) in [
        ("numVFs", json!(0), "greater than or equal to 1"),
        ("numVFs", json!(65536), "less than or equal to 65535"),
        (
            "allowedOverrides",
            json!(["Everything"]),
            "Unsupported value",
        ),
        (
            "allowedOverrides",
            json!(vec!["Vlan"; 9]),
            "at most 8 items",
        ),
        ("description", json!("a".repeat(1025)), "more than 1024"),
        ("network.vlan.id", json!(4095), "less than or equal to 4094"),
        ("pfSelector.vendorIDs", json!(["8086x"]), "more than 4"),
        ("pfSelector.vendorIDs", json!(["80GG"]), "should match"),
        ("pfSelector.deviceIDs", json!(["10C9"]), "should match"),
        (
            "pfSelector.pciAddresses",
            json!(["03:00.0"]),
            "should match",
        ),
        (
            "pfSelector.pciAddresses",
            json!(["0000:03:20.0"]),
            "should match",
        ),
        (
            "pfSelector.interfaceNames",
            json!(["abcdefghijklmnop"]),
            "more than 15",
        ),
        (
            "pfSelector.drivers",
            json!(["a".repeat(65)]),
            "more than 64",
        ),
        (
            "pfSelector.drivers",
            json!(vec!["igb"; 17]),
            "at most 16 items",
        ),
    ] {
        create_refused(&api, "VFClass", with(&base, &[(path, value)]), says).await;
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn guest_clusters_have_defaults_bounds_and_a_fixed_namespace() {
    let server = server().await;
    let api = api(server.admin(), "GuestCluster", "guestclusters", false);
    let base = json!({"claimNamespace": "claims-blue", "vmNamespace": "vms"});
    let made = create_accepted(&api, "GuestCluster", base.clone()).await;
    assert_eq!(made.data["spec"]["cordoned"], json!(false));
    assert_eq!(made.data["spec"]["quota"], json!({}));
    assert_eq!(made.data["spec"]["vmSelector"], json!({}));
    for (path, value, says) in [
        ("claimNamespace", json!(null), "Required value"),
        ("claimNamespace", json!("Claims"), "should match"),
        ("claimNamespace", json!(""), "at least 1 chars"),
        ("claimNamespace", json!("a".repeat(64)), "more than 63"),
        ("vmNamespace", json!("-x"), "should match"),
        ("vmNamespace", json!(""), "at least 1 chars"),
        ("vmNamespace", json!("a".repeat(64)), "more than 63"),
        ("classes", json!([""]), "at least 1 chars"),
        ("classes", json!(["a".repeat(64)]), "more than 63"),
        ("classes", json!(vec!["a"; 65]), "at most 64 items"),
        ("quota", json!({"claims": -1}), "greater than or equal to 0"),
    ] {
        create_refused(&api, "GuestCluster", with(&base, &[(path, value)]), says).await;
    }
    let long = object("GuestCluster", &"a".repeat(64), &base);
    refused(
        "name",
        api.create(&DRY(), &long).await,
        "at most 63 characters",
    );
    api.create(
        &PostParams::default(),
        &object("GuestCluster", "blue", &base),
    )
    .await
    .unwrap();
    let moved = json!({"spec": {"claimNamespace": "other"}});
    let done = api
        .patch("blue", &PatchParams::default(), &Patch::Merge(&moved))
        .await;
    refused("moved", done, "claimNamespace is immutable");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn physical_functions_keep_their_hardware_and_are_not_managed_unasked() {
    let server = server().await;
    let api = api(
        server.admin(),
        "PhysicalFunction",
        "physicalfunctions",
        false,
    );
    let base = json!({"nodeName": "h1", "identity": "serial"});
    let made = api
        .create(
            &PostParams::default(),
            &object("PhysicalFunction", "pf", &base),
        )
        .await
        .unwrap();
    assert_eq!(made.data["spec"]["managed"], json!(false));
    for (path, value, says) in [
        ("nodeName", json!(""), "at least 1 chars"),
        ("nodeName", json!("a".repeat(254)), "more than 253"),
        ("identity", json!(""), "at least 1 chars"),
        ("identity", json!("a".repeat(257)), "more than 256"),
        ("identity", json!(null), "Required value"),
        ("numVFs", json!(0), "greater than or equal to 1"),
    ] {
        create_refused(
            &api,
            "PhysicalFunction",
            with(&base, &[(path, value)]),
            says,
        )
        .await;
    }
    for (patch, says) in [
        (json!({"nodeName": "h2"}), "nodeName is immutable"),
        (json!({"identity": "other"}), "identity is immutable"),
    ] {
        let patch = json!({ "spec": patch });
        let done = api
            .patch("pf", &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        refused(&patch.to_string(), done, says);
    }
    let consent = json!({"spec": {"managed": true, "numVFs": 7}});
    api.patch("pf", &PatchParams::default(), &Patch::Merge(&consent))
        .await
        .unwrap();
    let nodes = self::api(server.admin(), "SriovNode", "sriovnodes", false);
    create_accepted(&nodes, "SriovNode", json!({})).await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_field_that_this_host_does_not_know_is_refused_under_strict_validation() {
    let server = server().await;
    let api = claims(&server);
    let spec = with(
        &tenant_claim(),
        &[("network", json!({"linkState": "Auto"}))],
    );
    let request = http::Request::post(format!(
        "/apis/{}/{}/namespaces/default/vfclaims?fieldValidation=Strict",
        common::api::GROUP,
        common::api::VERSION
    ))
    .header("content-type", "application/json")
    .body(serde_json::to_vec(&object("VFClaim", "c", &spec)).unwrap())
    .unwrap();
    let answer = server.admin().request::<Value>(request).await;
    let Err(Error::Api(status)) = answer else {
        panic!("accepted: {answer:?}");
    };
    assert!(
        status.message.contains("unknown field"),
        "{}",
        status.message
    );
    assert!(api.get_opt("c").await.unwrap().is_none());
    server.stop().await.unwrap();
}

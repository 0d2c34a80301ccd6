//! `VFClaim`: its spec, its status, and what is found by its fields.

use kube::Error;
use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use super::support::*;

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

    let storage = with(&tenant, &[("storage", json!({"namespaceID": 1}))]);
    create_accepted(&api, "VFClaim", storage.clone()).await;
    let no_mix = "network and storage do not mix";
    for (path, value, says) in [
        ("network", json!({}), no_mix),
        ("storage.namespaceID", json!(null), "Required value"),
        (
            "storage.namespaceID",
            json!(0),
            "greater than or equal to 1",
        ),
        (
            "storage.namespaceID",
            json!(4_294_967_295_u32),
            "less than or equal to 4294967294",
        ),
    ] {
        create_refused(&api, "VFClaim", with(&storage, &[(path, value)]), says).await;
    }

    let network = with(
        &tenant,
        &[(
            "network",
            json!({
                "vlan": {"id": 100, "qos": 7, "protocol": "802.1ad"},
                "macAddress": "02:AB:cd:00:00:01", "linkState": "Disable",
                "minTxRateMbps": 100, "maxTxRateMbps": 100,
            }),
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
        (
            "network.vlan.protocol",
            json!("802.1q"),
            "Unsupported value",
        ),
        ("network.linkState", json!("Up"), "Unsupported value"),
        (
            "network.minTxRateMbps",
            json!(0),
            "greater than or equal to 1",
        ),
        (
            "network.maxTxRateMbps",
            json!(1_000_001),
            "less than or equal to 1000000",
        ),
        (
            "network.maxTxRateMbps",
            json!(99),
            "minTxRateMbps must not be above maxTxRateMbps",
        ),
    ] {
        create_refused(&api, "VFClaim", with(&network, &[(path, value)]), says).await;
    }
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
        create(&api, "VFClaim", name, &spec).await;
    }
    let guest = host_claim()["guest"].clone();
    let class = "className is immutable";
    for (name, patch, says) in [
        ("tenant", json!({"className": "silver"}), class),
        ("tenant", json!({"className": null}), class),
        ("bare", json!({"className": "gold"}), class),
        (
            "bare",
            json!({"storage": {"namespaceID": 1}}),
            "storage is immutable",
        ),
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
    create(&api, "VFClaim", "c", &host_claim()).await;
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
        ("namespaceID", json!(1)),
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
}

#[tokio::test]
async fn a_grant_is_of_one_kind_and_a_namespace_is_recorded_once() {
    let server = server().await;
    let api = claims(&server);
    create(&api, "VFClaim", "c", &host_claim()).await;
    let admitted = |kind: &Value| {
        let mut granted = json!({"observedGeneration": 1, "className": "c", "classUID": "u"});
        let fields = granted.as_object_mut().unwrap();
        fields.extend(kind.as_object().unwrap().clone());
        json!({ "admitted": granted })
    };
    let network = json!({"network": {"macAddress": "02:00:00:00:00:01", "spoofCheck": true,
        "trust": false}});
    let storage = json!({"storage": {"namespaces": [1, 2]}});
    let mut both = network.clone();
    both["storage"] = storage["storage"].clone();
    let kind = "a grant is of a network interface or of storage";
    for wrong in [&json!({}), &both] {
        refused("kind", status(&api, &admitted(wrong)).await, kind);
    }
    status(&api, &admitted(&storage)).await.unwrap();
    status(&api, &json!({"hostNode": "h1"})).await.unwrap();
    let mut device = device();
    device["namespaceID"] = json!(2);
    status(&api, &json!({ "device": device })).await.unwrap();
    for other in [json!(1), json!(null)] {
        let patch = json!({"device": {"namespaceID": other}});
        let once = "device is set once until it is cleared";
        refused("namespaceID", status(&api, &patch).await, once);
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn claim_conditions_are_a_map_with_bounds() {
    let server = server().await;
    let api = claims(&server);
    create(&api, "VFClaim", "c", &host_claim()).await;
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
}

#[tokio::test]
async fn claims_are_found_by_their_host_node_and_pfs_by_theirs() {
    let server = server().await;
    let api = claims(&server);
    for name in ["c", "d"] {
        create(&api, "VFClaim", name, &host_claim()).await;
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
        create(&pfs, "PhysicalFunction", node, &spec).await;
    }
    let found = pfs
        .list(&ListParams::default().fields("spec.nodeName=h2"))
        .await
        .unwrap();
    assert_eq!(found.items.len(), 1);
}

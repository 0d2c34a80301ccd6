//! The other kinds, and what holds for all.

use kube::Error;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::support::*;

#[tokio::test]
async fn classes_have_defaults_and_bounds() {
    let server = server().await;
    let api = api(server.admin(), "VFClass", "vfclasses", false);
    let made = create_accepted(&api, "VFClass", json!({})).await;
    assert_eq!(made.data["spec"]["allowedOverrides"], json!(["MacAddress"]));
    assert_eq!(made.data["spec"]["pfSelector"], json!({}));
    assert_eq!(made.data["spec"]["network"], json!({}));
    assert_eq!(made.data["spec"]["reclaimPolicy"], json!("Return"));
    assert_eq!(made.data["spec"]["placement"], json!("Pack"));
    let base = json!({"pfSelector": {}, "network": {"vlan": {"id": 1}}});
    let every = json!([
        "MacAddress",
        "Vlan",
        "SpoofCheck",
        "Trust",
        "LinkState",
        "MinTxRateMbps",
        "MaxTxRateMbps",
    ]);
    let open = json!({
        "allowedOverrides": every,
        "network": {"linkState": "Enable", "minTxRateMbps": 1, "maxTxRateMbps": 1_000_000},
    });
    create_accepted(&api, "VFClass", open).await;
    let disks = json!({"storage": {"namespaces": [1, 2]}});
    create_accepted(&api, "VFClass", disks.clone()).await;
    let no_mix = "network and storage do not mix";
    for (path, value, says) in [
        ("network", json!({"vlan": {"id": 5}}), no_mix),
        ("network", json!({"spoofCheck": true}), no_mix),
        ("network", json!({"trust": false}), no_mix),
        ("network", json!({"linkState": "Auto"}), no_mix),
        ("network", json!({"minTxRateMbps": 1}), no_mix),
        ("network", json!({"maxTxRateMbps": 1}), no_mix),
        ("storage.namespaces", json!(null), "Required value"),
        ("storage.namespaces", json!([]), "at least 1 items"),
        (
            "storage.namespaces",
            json!([0]),
            "greater than or equal to 1",
        ),
        ("storage.namespaces", json!([1, 1]), "Duplicate value"),
        (
            "storage.namespaces",
            json!((1..=65).collect::<Vec<u32>>()),
            "at most 64 items",
        ),
    ] {
        create_refused(&api, "VFClass", with(&disks, &[(path, value)]), says).await;
    }
    for (path, value, says) in [
        ("numVFs", json!(0), "greater than or equal to 1"),
        ("numVFs", json!(65536), "less than or equal to 65535"),
        ("reclaimPolicy", json!("Keep"), "Unsupported value"),
        ("placement", json!("Random"), "Unsupported value"),
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
        (
            "network",
            json!({"minTxRateMbps": 2, "maxTxRateMbps": 1}),
            "minTxRateMbps must not be above maxTxRateMbps",
        ),
        ("network.linkState", json!("Down"), "Unsupported value"),
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
            "pfSelector.nodeSelector",
            json!({"rack": "a".repeat(64)}),
            "more than 63",
        ),
        (
            "pfSelector.drivers",
            json!(vec!["igb"; 17]),
            "at most 16 items",
        ),
    ] {
        create_refused(&api, "VFClass", with(&base, &[(path, value)]), says).await;
    }
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
    create(&api, "GuestCluster", "blue", &base).await;
    let moved = json!({"spec": {"claimNamespace": "other"}});
    let done = api
        .patch("blue", &PatchParams::default(), &Patch::Merge(&moved))
        .await;
    refused("moved", done, "claimNamespace is immutable");
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
    let made = create(&api, "PhysicalFunction", "pf", &base).await;
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
    let gone = json!({"namespace": "claims", "name": "vfc-1", "uid": "u"});
    let entry =
        |index: i64, reason: &str| json!({"vfIndex": index, "reason": reason, "claim": gone});
    for (entries, says) in [
        (json!([entry(0, "Lost")]), "Unsupported value"),
        (json!([entry(-1, "Retained")]), "greater than or equal to 0"),
        (
            json!([{"vfIndex": 0, "reason": "Retained"}]),
            "Required value",
        ),
        (
            json!([entry(3, "Retained"), entry(3, "Destroyed")]),
            "Duplicate value",
        ),
        (
            (0..257).map(|i| entry(i, "Retained")).collect(),
            "at most 256 items",
        ),
    ] {
        let made = with(&base, &[("withheld", entries)]);
        create_refused(&api, "PhysicalFunction", made, says).await;
    }
    let kept = with(&base, &[("withheld", json!([entry(3, "Retained")]))]);
    create_accepted(&api, "PhysicalFunction", kept).await;
    let consent = json!({"spec": {"managed": true, "numVFs": 7}});
    api.patch("pf", &PatchParams::default(), &Patch::Merge(&consent))
        .await
        .unwrap();
    let nodes = self::api(server.admin(), "SriovNode", "sriovnodes", false);
    create_accepted(&nodes, "SriovNode", json!({})).await;
}

#[tokio::test]
async fn host_drivers_name_a_module_and_parameters_that_the_kernel_can_read() {
    let server = server().await;
    let api = api(server.admin(), "HostDriver", "hostdrivers", false);
    let base = json!({"module": "mlx5-core", "parameters": {"prof_sel": "2"}});
    let made = create(&api, "HostDriver", "card", &base).await;
    assert_eq!(made.data["spec"]["order"], json!(0));
    for (path, value, says) in [
        ("module", json!(null), "Required value"),
        ("module", json!(""), "at least 1 chars"),
        ("module", json!("a".repeat(56)), "more than 55"),
        ("module", json!("-r"), "should match"),
        ("module", json!("../evil"), "should match"),
        (
            "parameters",
            json!({"max vfs": "1"}),
            "a parameter's name consists of",
        ),
        ("parameters", json!({"a": "1 b=2"}), "should match"),
        ("parameters", json!({"a": "\""}), "should match"),
        ("parameters", json!({"a": "x".repeat(257)}), "more than 256"),
        ("order", json!(1001), "less than or equal to 1000"),
        (
            "nodeSelector",
            json!({"zone": "x".repeat(64)}),
            "more than 63",
        ),
    ] {
        create_refused(&api, "HostDriver", with(&base, &[(path, value)]), says).await;
    }
    let other = Patch::Merge(json!({"spec": {"module": "igb"}}));
    let done = api.patch("card", &PatchParams::default(), &other).await;
    refused("another module", done, "module is immutable");
}

#[tokio::test]
async fn a_field_that_this_host_does_not_know_is_refused_under_strict_validation() {
    let server = server().await;
    let api = claims(&server);
    let spec = with(&tenant_claim(), &[("network", json!({"mtu": 9000}))]);
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
}

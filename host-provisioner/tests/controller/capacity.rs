//! What is left of each class is told, truly and not too often; with the chart's own rights.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::api::{
    ClassSummary, NodeCapacity, PhysicalFunction, PhysicalFunctionSpec, VFClass, VFClassStatus,
};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use test_apiserver::gate::Gate;

use crate::harness::{Harness, eventually};

fn functions(harness: &Harness) -> Api<PhysicalFunction> {
    Api::all(harness.admin.clone())
}

fn classes(harness: &Harness) -> Api<VFClass> {
    Api::all(harness.admin.clone())
}

fn nodes(harness: &Harness) -> Api<Node> {
    Api::all(harness.admin.clone())
}

async fn node(harness: &Harness, name: &str, rack: &str) {
    let mut node = Node::default();
    node.metadata.name = Some(name.to_owned());
    node.metadata.labels = Some(BTreeMap::from([("rack".to_owned(), rack.to_owned())]));
    let made = nodes(harness).create(&PostParams::default(), &node).await;
    made.unwrap();
}

/// A managed PF as its agent reports it, with seven VFs of which so many are free.
async fn function(harness: &Harness, name: &str, node: &str, free: u16) {
    let spec = PhysicalFunctionSpec {
        node_name: node.into(),
        identity: name.into(),
        managed: true,
        ..PhysicalFunctionSpec::default()
    };
    let new = PhysicalFunction::new(name, spec);
    let made = functions(harness)
        .create(&PostParams::default(), &new)
        .await;
    made.unwrap();
    let ready = json!({"type": "Ready", "status": "True", "reason": "Ready", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let status = json!({"driver": "igb", "totalVFs": 7, "numVFs": 7, "conditions": [ready],
        "capabilities": {"vlan": true, "spoofCheck": true, "trust": true}});
    report(harness, name, status).await;
    has_free(harness, name, free).await;
}

async fn report(harness: &Harness, name: &str, status: Value) {
    let patch = Patch::Merge(json!({ "status": status }));
    let params = PatchParams::default();
    let api = functions(harness);
    api.patch_status(name, &params, &patch).await.unwrap();
}

async fn has_free(harness: &Harness, name: &str, free: u16) {
    report(
        harness,
        name,
        json!({"counts": {"free": free, "attached": 7 - free}}),
    )
    .await;
}

async fn class_says(harness: &Harness, name: &str, each: &[(&str, u32)]) -> VFClass {
    let api = classes(harness);
    let nodes: Vec<NodeCapacity> = each
        .iter()
        .map(|(name, free)| NodeCapacity {
            name: (*name).to_owned(),
            free: *free,
        })
        .collect();
    eventually(&format!("{name} has {each:?}"), || async {
        let class = api.get(name).await.unwrap();
        let wanted = VFClassStatus {
            free: Some(each.iter().map(|(_, free)| free).sum()),
            nodes: nodes.clone(),
            observed_generation: class.metadata.generation,
        };
        let says = class.status.as_ref() == Some(&wanted);
        says.then_some(class.clone())
            .ok_or(format!("{:?}", class.status))
    })
    .await
}

/// The class as guest `blue` is told of it, once that is so many free VFs.
async fn told(harness: &Harness, name: &str, free: u32) -> ClassSummary {
    let api = harness.guests();
    eventually(
        &format!("the guest is told of {free} of {name}"),
        || async {
            let all = api.get("blue").await.unwrap().status.unwrap().classes;
            let class = all.iter().find(|c| c.name == name && c.free == Some(free));
            class.cloned().ok_or(format!("{all:?}"))
        },
    )
    .await
}

#[tokio::test]
async fn what_is_left_is_told_by_node_on_the_host_and_as_a_number_to_guests() {
    let mut harness = Harness::running().await;
    class_says(&harness, "gold", &[]).await;
    told(&harness, "gold", 0).await;
    // Hardware of a node that the cluster does not have is nobody's.
    function(&harness, "pf-1", "host1", 3).await;
    node(&harness, "host1", "1").await;
    node(&harness, "host2", "2").await;
    function(&harness, "pf-2", "host2", 2).await;
    class_says(&harness, "gold", &[("host1", 3), ("host2", 2)]).await;
    told(&harness, "gold", 5).await;
    let guest = harness.guests().get("blue").await.unwrap();
    let words = serde_json::to_string(&guest.status).unwrap();
    assert!(
        !words.contains("host1") && !words.contains("host2"),
        "{words}"
    );

    // A class by the nodes' labels, which change; the class itself as well.
    harness.class("later", &[]).await;
    let select = |rack: &str| json!({"spec": {"pfSelector": {"nodeSelector": {"rack": rack}}}});
    let params = PatchParams::default();
    let edit = Patch::Merge(select("2"));
    classes(&harness)
        .patch("later", &params, &edit)
        .await
        .unwrap();
    class_says(&harness, "later", &[("host2", 2)]).await;
    let moved = Patch::Merge(json!({"metadata": {"labels": {"rack": "2"}}}));
    nodes(&harness)
        .patch("host1", &params, &moved)
        .await
        .unwrap();
    class_says(&harness, "later", &[("host1", 3), ("host2", 2)]).await;
    told(&harness, "later", 5).await;

    // Consent that goes, an agent that says no, a node that goes.
    let no = Patch::Merge(json!({"spec": {"managed": false}}));
    functions(&harness)
        .patch("pf-2", &params, &no)
        .await
        .unwrap();
    class_says(&harness, "gold", &[("host1", 3)]).await;
    nodes(&harness)
        .delete("host1", &DeleteParams::default())
        .await
        .unwrap();
    class_says(&harness, "gold", &[]).await;
    told(&harness, "gold", 0).await;

    // A restart says nothing new, and takes nothing back meanwhile.
    harness.halt().await;
    let gate = harness.start().await;
    node(&harness, "host1", "1").await;
    class_says(&harness, "gold", &[("host1", 3)]).await;
    told(&harness, "gold", 3).await;
    assert_eq!(written(&gate, "/guestclusters/blue/status"), 1);
    assert_eq!(written(&gate, "/vfclasses/gold/status"), 1);
    harness.end().await;
}

fn written(gate: &Gate, path: &str) -> u64 {
    let sent = gate.sent();
    let those = sent.iter().filter(|write| write.path.ends_with(path));
    u64::try_from(those.count()).unwrap()
}

#[tokio::test]
async fn under_churn_each_object_is_written_now_and_then_and_afterwards_not_at_all() {
    let mut harness = Harness::new().await;
    harness.guest("blue", crate::harness::CLAIMS).await;
    node(&harness, "host1", "1").await;
    function(&harness, "pf-1", "host1", 7).await;
    let gate = harness.start().await;
    harness.guest_ready("blue").await;
    class_says(&harness, "gold", &[("host1", 7)]).await;
    told(&harness, "gold", 7).await;

    let (class, guest) = ("/vfclasses/gold/status", "/guestclusters/blue/status");
    let writes = || (written(&gate, class), written(&gate, guest));
    let before = writes();
    let begun = Instant::now();
    let mut changes = 0_u16;
    while begun.elapsed() < Duration::from_secs(13) {
        changes += 1;
        has_free(&harness, "pf-1", changes % 7).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    has_free(&harness, "pf-1", 4).await;
    class_says(&harness, "gold", &[("host1", 4)]).await;
    told(&harness, "gold", 4).await;
    let after = writes();
    // A pass every six seconds, and one at once when it was quiet before.
    let most = begun.elapsed().as_secs() / 6 + 2;
    for written in [after.0 - before.0, after.1 - before.1] {
        assert!(
            (1..=most).contains(&written),
            "{written} of {changes}, at most {most}"
        );
    }

    // What changes no number is no write: one of many passes by, and the next number is one.
    for last in 1..20 {
        report(&harness, "pf-1", json!({"numaNode": last})).await;
    }
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(writes(), after);
    has_free(&harness, "pf-1", 5).await;
    class_says(&harness, "gold", &[("host1", 5)]).await;
    told(&harness, "gold", 5).await;
    assert_eq!(writes(), (after.0 + 1, after.1 + 1));
    harness.end().await;
}

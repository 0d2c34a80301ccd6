//! A claim's whole way through the syncer, against two real API servers.
// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use common::api::{
    DeviceStatus, GUEST_FINALIZER, GUEST_GENERATION_ANNOTATION, GuestDevice, HOST_FINALIZER,
    LinkState, VFClaim, VFClaimStatus, VlanProtocol, condition,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

mod world;
use world::{UUID, World, eventually};

fn said(type_: &str, status: &str, reason: &str, about: &VFClaim) -> Condition {
    Condition {
        type_: type_.into(),
        status: status.into(),
        reason: reason.into(),
        message: format!("{reason}, says the host"),
        observed_generation: about.metadata.generation,
        last_transition_time: Time(Timestamp::UNIX_EPOCH),
    }
}

fn device(index: u16, address: &str) -> DeviceStatus {
    serde_json::from_value(json!({"nodeName": "h1", "physicalFunction": "h1-0a0a0a0a",
        "vfIndex": index, "pciAddress": address}))
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_goes_up_and_its_status_comes_down_and_it_is_released() {
    let mut world = World::new().await;
    world.start().await;

    // Up.
    let claim = world.claim("fast", "w1").await;
    let copy = world.copy_of(&claim).await;
    let guest = copy.spec.guest.clone().unwrap();
    assert_eq!(
        (
            guest.cluster.as_str(),
            guest.namespace.as_str(),
            guest.name.as_str()
        ),
        ("blue", "team", "fast")
    );
    assert_eq!(guest.system_uuid, UUID);
    assert_eq!(copy.spec.vm_ip.as_deref(), Some("10.0.0.7"));
    assert_eq!(copy.spec.class_name.as_deref(), Some("gold"));
    let synced = world.says("fast", "Synced", "True", "Synced").await;
    assert!(synced.finalizers().iter().any(|f| f == GUEST_FINALIZER));
    world.says("fast", "Ready", "False", "Pending").await;

    // Down.
    let mut status = VFClaimStatus {
        host_node: Some("h1".into()),
        device: Some(device(2, "0000:03:10.4")),
        guest_device: Some(GuestDevice {
            pci_address: "0000:06:00.0".into(),
            mac_address: Some("02:00:00:00:00:01".into()),
        }),
        conditions: vec![said("Ready", "True", "Ready", &copy)],
        ..VFClaimStatus::default()
    };
    world.host_says(&copy, &status).await;
    let ready = world.says("fast", "Ready", "True", "Ready").await;
    let shown = ready.status.clone().unwrap();
    assert_eq!(shown.device, status.device);
    assert_eq!(shown.guest_device, status.guest_device);
    let observed = condition(&shown.conditions, "Ready").unwrap();
    assert_eq!(observed.observed_generation, ready.metadata.generation);

    // A device that changed between two looks: the CRD allows it only cleared.
    world.stop().await;
    let cleared = json!({"status": {"device": null, "guestDevice": null}});
    let params = PatchParams::default();
    world
        .host_claims()
        .patch_status(&copy.name_any(), &params, &Patch::Merge(cleared))
        .await
        .unwrap();
    status.device = Some(device(5, "0000:04:10.2"));
    status.host_node = Some("h2".into());
    if let Some(d) = &mut status.device {
        d.node_name = "h2".into();
    }
    world.host_says(&copy, &status).await;
    world.start().await;
    let api = world.guest_claims();
    eventually("the new device", || async {
        let now = api.get("fast").await.unwrap().status.unwrap();
        (now.device == status.device && now.host_node == status.host_node).then_some(())
    })
    .await;

    // An edit.
    let edit = json!({"spec": {"network": {
        "vlan": {"id": 200, "qos": null, "protocol": "802.1ad"},
        "linkState": "Disable", "minTxRateMbps": 10, "maxTxRateMbps": 500,
    }}});
    let edited = api
        .patch("fast", &params, &Patch::Merge(edit))
        .await
        .unwrap();
    let host = world.host_claims();
    eventually("the edit on the host", || async {
        let copy = host.get(&copy.name_any()).await.unwrap();
        let network = copy.spec.network.as_ref()?;
        let vlan = network.vlan.clone()?;
        let about = copy.annotations().get(GUEST_GENERATION_ANNOTATION)?;
        let generation = edited.metadata.generation.unwrap().to_string();
        (vlan.id == 200 && vlan.qos.is_none() && *about == generation).then_some(())?;
        assert_eq!(vlan.protocol, Some(VlanProtocol::Ieee8021Ad));
        assert_eq!(network.link_state, Some(LinkState::Disable));
        let rates = (network.min_tx_rate_mbps, network.max_tx_rate_mbps);
        assert_eq!(rates, (Some(10), Some(500)));
        Some(())
    })
    .await;

    // Release: the guest's claim waits for the host's.
    let hold = json!({"metadata": {"finalizers": [HOST_FINALIZER]}});
    let held = host
        .patch(&copy.name_any(), &params, &Patch::Merge(hold))
        .await
        .unwrap();
    api.delete("fast", &DeleteParams::default()).await.unwrap();
    eventually("the copy told to go", || async {
        let copy = host.get(&held.name_any()).await.unwrap();
        copy.metadata.deletion_timestamp
    })
    .await;
    world.says("fast", "Ready", "False", "Releasing").await;
    let free = json!({"metadata": {"finalizers": null}});
    host.patch(&copy.name_any(), &params, &Patch::Merge(free))
        .await
        .unwrap();
    world.gone("fast").await;
    assert!(
        host.list(&Default::default())
            .await
            .unwrap()
            .items
            .is_empty()
    );
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_said_and_nothing_is_touched() {
    let mut world = World::new().await;
    world.start().await;

    // An unknown node, which then registers.
    let claim = world.claim("early", "w2").await;
    let refused = world.says("early", "Synced", "False", "NodeNotFound").await;
    let conditions = refused.status.unwrap().conditions;
    let ready = condition(&conditions, "Ready").unwrap();
    assert_eq!(
        (ready.status.as_str(), ready.reason.as_str()),
        ("False", "NodeNotFound")
    );
    assert!(ready.message.contains("w2"), "{}", ready.message);
    let host = world.host_claims();
    assert!(
        host.list(&Default::default())
            .await
            .unwrap()
            .items
            .is_empty()
    );
    eventually("its event", || async {
        let told = world.events_on("early").await;
        told.contains(&"NodeNotFound".to_owned()).then_some(())
    })
    .await;
    world
        .make_node("w2", "11111111-2222-3333-4444-555555555555")
        .await;
    let copy = world.copy_of(&claim).await;
    assert!(copy.spec.guest.unwrap().system_uuid.starts_with("1111"));

    // A node that does not say which machine it is.
    world.make_node("w3", "unknown").await;
    world.claim("faceless", "w3").await;
    world
        .says("faceless", "Synced", "False", "NodeWithoutSystemUUID")
        .await;

    // A foreign object of our copy's name: reported, not adopted, not deleted.
    world.stop().await;
    let claim = world.claim("mine", "w1").await;
    let name = common::api::host_claim_name(&claim.uid().unwrap());
    let foreign = json!({"metadata": {"name": name}, "spec": {"nodeName": "other"}});
    let foreign = world::create(&host, foreign).await;
    world.start().await;
    world.says("mine", "Synced", "False", "Conflict").await;
    let params = DeleteParams::default();
    world.guest_claims().delete("mine", &params).await.unwrap();
    world.gone("mine").await;
    let still = host.get(&name).await.unwrap();
    assert_eq!(
        (
            still.uid(),
            still.resource_version(),
            still.metadata.deletion_timestamp
        ),
        (foreign.uid(), foreign.resource_version(), None)
    );

    // A copy that somebody removed on the host is made again.
    let early = world.guest_claims().get("early").await.unwrap();
    let before = world.copy_of(&early).await;
    host.delete(&before.name_any(), &params).await.unwrap();
    eventually("another copy", || async {
        let now = host.get_opt(&before.name_any()).await.unwrap()?;
        (now.uid() != before.uid()).then_some(())
    })
    .await;
    world.says("early", "Synced", "True", "Synced").await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_refuses_is_quoted_and_asked_again() {
    let mut world = World::new().await;
    let policy = json!({"apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy", "metadata": {"name": "no"}, "spec": {
            "matchConstraints": {"resourceRules": [{"apiGroups": ["sriov.harvesterhci.io"],
                "apiVersions": ["*"], "operations": ["CREATE"], "resources": ["vfclaims"]}]},
            "validations": [{"expression": "false", "message": "not on a Monday"}]}});
    let binding = json!({"apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": "no"},
        "spec": {"policyName": "no", "validationActions": ["Deny"]}});
    let policies = world.admission("ValidatingAdmissionPolicy");
    let bindings = world.admission("ValidatingAdmissionPolicyBinding");
    world::create(&policies, policy).await;
    world::create(&bindings, binding).await;
    world.policy_in_force().await;

    world.start().await;
    world.claim("fast", "w1").await;
    let refused = world.says("fast", "Synced", "False", "RefusedByHost").await;
    let conditions = refused.status.unwrap().conditions;
    let message = &condition(&conditions, "Synced").unwrap().message;
    assert!(message.contains("not on a Monday"), "{message}");

    bindings
        .delete("no", &DeleteParams::default())
        .await
        .unwrap();
    world.says("fast", "Synced", "True", "Synced").await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_away_costs_nothing_and_takes_nothing() {
    let mut world = World::new().await;
    world.start().await;
    let claim = world.claim("old", "w1").await;
    world.says("old", "Synced", "True", "Synced").await;
    let copy = world.copy_of(&claim).await;

    world.wire.cut().await;
    world.claim("new", "w1").await;
    world
        .says("new", "Synced", "False", "HostUnreachable")
        .await;
    world.delete("old").await;
    world
        .says("old", "Synced", "False", "HostUnreachable")
        .await;
    let kept = world.guest_claims().get("old").await.unwrap();
    assert!(kept.finalizers().iter().any(|f| f == GUEST_FINALIZER));
    let host = world.host_claims();
    let still = host.get(&copy.name_any()).await.unwrap();
    assert_eq!(still.metadata.deletion_timestamp, None);

    world.wire.mend().await;
    world.says("new", "Synced", "True", "Synced").await;
    world.gone("old").await;
    assert!(host.get_opt(&copy.name_any()).await.unwrap().is_none());

    // The same from a cold start: a syncer that has never reached its host.
    world.stop().await;
    world.wire.cut().await;
    world.start().await;
    world.delete("new").await;
    world
        .says("new", "Synced", "False", "HostUnreachable")
        .await;
    world.wire.mend().await;
    world.gone("new").await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_taken_up_and_a_missing_guest_cluster_said() {
    let mut world = World::new().await;
    // A certificate of somebody without any right.
    world.start_as("nobody").await;
    world.claim("fast", "w1").await;
    world
        .says_in_words("fast", "Synced", "False", "HostUnreachable", "nobody")
        .await;
    world.host_kubeconfig("sriov.harvesterhci.io:guest:blue");
    world.says("fast", "Synced", "True", "Synced").await;

    // Without its GuestCluster nothing is taken down, for nobody knows where it is.
    let clusters: kube::Api<common::api::GuestCluster> = kube::Api::all(world.host.admin());
    clusters
        .delete("blue", &DeleteParams::default())
        .await
        .unwrap();
    // The claim that is there says when the syncer knows: until then a new one goes up still.
    world
        .says("fast", "Synced", "False", "GuestClusterNotFound")
        .await;
    world.claim("later", "w1").await;
    world
        .says("later", "Synced", "False", "GuestClusterNotFound")
        .await;
    world.delete("fast").await;
    world
        .says("fast", "Synced", "False", "GuestClusterNotFound")
        .await;
    assert_eq!(
        world
            .host_claims()
            .list(&Default::default())
            .await
            .unwrap()
            .items
            .len(),
        1
    );
    world.make_guest_cluster().await;
    world.gone("fast").await;
    world.says("later", "Synced", "True", "Synced").await;
    world.stop().await;
}

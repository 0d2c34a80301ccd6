//! The guest-syncer's plans, over objects as both API servers give them: the guest's is its
//! tenant's, the host's copy may be anybody's.

use std::collections::BTreeSet;

use common::api::{
    ClassSummary, ConditionStatus, NewCondition, PfSelector, VFClaim, VFClaimStatus, VFClass,
    condition, host_claim_name, reason, type_,
};
use guest_syncer::mirror::NodeView;
use guest_syncer::mirror::classes::{self, ClassAction};
use guest_syncer::mirror::down::{HostView, wanted_status, writes};
use guest_syncer::mirror::up::{self, Edit, GuestId, Release, Up};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use serde::Deserialize;
use serde_json::Value;

#[derive(Default, Deserialize)]
#[serde(default)]
struct World {
    claim: Value,
    copy: Value,
    node: Value,
    cluster: String,
    #[serde(rename = "clusterUID")]
    cluster_uid: String,
    listed: Value,
    classes: Vec<Value>,
}

pub fn run(data: &[u8]) {
    let Ok(world) = serde_json::from_slice::<World>(data) else {
        return;
    };
    let listed = serde_json::from_value::<Vec<ClassSummary>>(world.listed).ok();
    let present = world.classes.into_iter().map(serde_json::from_value);
    let present: Vec<VFClass> = present.filter_map(Result::ok).collect();
    mirrored_classes(&world.cluster, listed.as_deref(), &present);

    let Ok(claim) = serde_json::from_value::<VFClaim>(world.claim) else {
        return;
    };
    let copy = serde_json::from_value::<VFClaim>(world.copy).ok();
    if ![Some(&claim), copy.as_ref()]
        .into_iter()
        .flatten()
        .all(is_stored)
    {
        return;
    }
    let node = serde_json::from_value::<Node>(world.node).ok();
    let guest = GuestId {
        cluster: world.cluster,
        cluster_uid: world.cluster_uid,
        claim_namespace: "claims".to_owned(),
    };
    let node = up::target(&claim, |name| {
        node.as_ref()
            .filter(|n| n.metadata.name.as_deref() == Some(name))
    });
    ends(&claim, &guest, copy.as_ref());
    rises(&claim, &node, &guest, copy.as_ref());
    for host in [HostView::Absent, HostView::Unknown] {
        shown(&claim, host);
    }
    if let Some(copy) = &copy {
        shown(&claim, HostView::Copy(copy));
    }
}

/// No API server stores two conditions of one type (`x-kubernetes-list-map-keys`).
fn is_stored(claim: &VFClaim) -> bool {
    let conditions = claim.status.iter().flat_map(|s| &s.conditions);
    let types: Vec<&str> = conditions.map(|c| c.type_.as_str()).collect();
    let distinct: BTreeSet<&str> = types.iter().copied().collect();
    distinct.len() == types.len()
}

/// Nothing dies by absence, and nothing that is not ours.
fn ends(claim: &VFClaim, guest: &GuestId, copy: Option<&VFClaim>) {
    let ours = copy.is_some_and(|copy| up::owned(claim, guest, copy).is_ok());
    let going = copy.is_some_and(|copy| copy.metadata.deletion_timestamp.is_some());
    match up::release(claim, guest, copy) {
        Release::LetGo => assert!(copy.is_none(), "let go while the host has the copy"),
        Release::LeaveForeign(_) => assert!(copy.is_some() && !ours),
        Release::AwaitGone => assert!(ours && going),
        Release::Delete => assert!(ours && !going, "what is not ours is deleted"),
    }
}

fn rises(claim: &VFClaim, node: &NodeView, guest: &GuestId, copy: Option<&VFClaim>) {
    match up::plan(claim, node, guest, copy) {
        Up::Create(made) => {
            assert!(copy.is_none(), "made beside what is there");
            let node = node.as_ref().expect("made for a node that is known");
            assert_eq!(
                made.name_any(),
                host_claim_name(&claim.uid().unwrap_or_default())
            );
            let sent = serde_json::to_value(&*made).expect("JSON");
            let stored: VFClaim = serde_json::from_value(sent).expect("what is sent can be read");
            assert_eq!(up::owned(claim, guest, &stored), Ok(()), "the copy is ours");
            assert_eq!(
                stored.spec.guest.as_ref().map(|g| &g.system_uuid),
                Some(&node.system_uuid)
            );
            let again = up::plan(claim, &Ok(node.clone()), guest, Some(&stored));
            assert_eq!(
                again,
                Up::Keep,
                "a copy that was just made is as it should be"
            );
        }
        Up::Update(edit) => {
            let copy = copy.expect("an edit of something");
            assert_eq!(
                up::owned(claim, guest, copy),
                Ok(()),
                "somebody else's is edited"
            );
            let after = edited(copy, &edit);
            assert_eq!(up::plan(claim, node, guest, Some(&after)), Up::Keep);
        }
        Up::Keep => assert_eq!(copy.map(|c| up::owned(claim, guest, c)), Some(Ok(()))),
        Up::AwaitGone => assert!(copy.is_some_and(|c| c.metadata.deletion_timestamp.is_some())),
        Up::Refuse { message, .. } => assert!(!message.is_empty()),
    }
}

fn edited(copy: &VFClaim, edit: &Edit) -> VFClaim {
    let mut after = copy.clone();
    after.spec.network = edit.network.clone();
    after.spec.vm_ip = edit.vm_ip.clone();
    after.annotations_mut().insert(
        common::api::GUEST_GENERATION_ANNOTATION.to_owned(),
        edit.guest_generation.to_string(),
    );
    after
}

fn at(second: i64) -> Time {
    serde_json::from_value(Value::String(format!("2026-01-01T00:00:{second:02}Z"))).expect("a time")
}

/// What a tenant is shown: its own, always something, and the same again when nothing changed.
fn shown(claim: &VFClaim, host: HostView<'_>) {
    let synced = NewCondition::new(
        type_::SYNCED,
        ConditionStatus::True,
        reason::SYNCED,
        "it is",
    );
    let wanted = wanted_status(claim, host, &synced, &at(1));
    let ready = condition(&wanted.conditions, type_::READY).expect("there always is a Ready");
    assert!(condition(&wanted.conditions, type_::SYNCED).is_some_and(|c| c.status == "True"));
    match host {
        HostView::Copy(copy) => {
            assert_eq!((&wanted.launcher, &wanted.attachment), (&None, &None));
            let granted = wanted.admitted.as_ref();
            assert!(
                granted
                    .is_none_or(|a| a.pf_selector == PfSelector::default() && a.num_vfs.is_none())
            );
            let said = copy
                .status
                .as_ref()
                .and_then(|s| condition(&s.conditions, type_::READY));
            let usable = said.is_some_and(|c| c.status == "True")
                && claim.metadata.deletion_timestamp.is_none();
            assert!(
                ready.status != "True" || usable,
                "Ready, though the host does not say so"
            );
            let known = wanted
                .conditions
                .iter()
                .filter_map(|c| c.observed_generation)
                .max();
            let before = claim.status.iter().flat_map(|s| &s.conditions);
            let before = before.filter_map(|c| c.observed_generation).max();
            assert!(
                known <= Some(up::generation(claim)).max(before),
                "about a spec to come"
            );
        }
        HostView::Absent => assert!(wanted.device.is_none() && ready.status == "False"),
        HostView::Unknown => {
            let old = claim.status.clone().unwrap_or_default();
            assert_eq!(
                (&wanted.device, &wanted.admitted),
                (&old.device, &old.admitted)
            );
        }
    }
    allowed(claim.status.as_ref(), &wanted);
    let mut after = claim.clone();
    after.status = Some(wanted);
    let again = wanted_status(&after, host, &synced, &at(2));
    assert_eq!(
        writes(after.status.as_ref(), again),
        [],
        "nothing changed, and it is written"
    );
}

/// The writes are such as the CRD's rules let through (`common/src/api/vf_claim.rs`).
fn allowed(old: Option<&VFClaimStatus>, wanted: &VFClaimStatus) {
    let sound = |s: &VFClaimStatus| {
        (s.device.is_none() || s.host_node.is_some())
            && (s.attachment.is_none() || s.device.is_some())
    };
    // The API server has let the old one and the host's through already.
    if !old.is_none_or(sound) || !sound(wanted) {
        return;
    }
    let mut before = old.cloned();
    for next in writes(old, wanted.clone()) {
        assert!(sound(&next));
        if let Some(before) = &before
            && let Some(device) = &before.device
        {
            assert_eq!(
                next.host_node, before.host_node,
                "hostNode moves under a device"
            );
            if let Some(other) = &next.device {
                assert_eq!(
                    (&other.node_name, &other.physical_function, other.vf_index),
                    (
                        &device.node_name,
                        &device.physical_function,
                        device.vf_index
                    )
                );
                assert!(device.pci_address.is_none() || device.pci_address == other.pci_address);
            }
        }
        before = Some(next);
    }
    assert_eq!(before.unwrap_or_default(), *wanted);
}

fn mirrored_classes(cluster: &str, listed: Option<&[ClassSummary]>, present: &[VFClass]) {
    let actions = classes::plan(cluster, listed, present);
    assert!(
        listed.is_some() || actions.is_empty(),
        "a silent host changes classes"
    );
    let named = |name: &str| -> Vec<&VFClass> {
        let named = present.iter().filter(|c| c.name_any() == name);
        named.collect()
    };
    for action in &actions {
        match action {
            ClassAction::Create(made) => {
                assert_eq!(named(&made.name_any()), Vec::<&VFClass>::new());
                assert!(classes::ours(cluster, made));
                assert_eq!(
                    made.spec.pf_selector,
                    PfSelector::default(),
                    "hardware is shown"
                );
            }
            ClassAction::Replace(next) | ClassAction::Report(next) => {
                assert!(classes::ours(cluster, next));
                let status = next.status.clone().unwrap_or_default();
                assert!(status.nodes.is_empty(), "the host's nodes are told");
            }
            ClassAction::Delete { name, .. } => {
                assert!(
                    named(name).iter().any(|c| classes::ours(cluster, c)),
                    "{name} is not ours"
                );
            }
            ClassAction::Conflict { name } => {
                assert!(named(name).iter().any(|c| !classes::ours(cluster, c)))
            }
        }
    }
}

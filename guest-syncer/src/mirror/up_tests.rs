//! Tables for the way up.

use common::api::{LinkState, Vlan, VlanProtocol};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::*;

const UUID: &str = "6f1c1c3e-0d3d-4d4b-9a57-8a3a0f4f6a01";

fn guest() -> GuestId {
    GuestId {
        cluster: "blue".into(),
        cluster_uid: "c-1".into(),
        claim_namespace: "claims-blue".into(),
    }
}

fn node() -> NodeIdentity {
    NodeIdentity {
        name: "w1".into(),
        system_uuid: UUID.into(),
        provider_id: None,
        internal_ip: Some("10.0.0.7".into()),
    }
}

fn claim() -> VFClaim {
    let mut claim = VFClaim::new(
        "fast",
        VFClaimSpec {
            class_name: Some("gold".into()),
            node_name: Some("w1".into()),
            network: Some(NetworkRequest {
                vlan: Some(Vlan {
                    id: 7,
                    qos: Some(1),
                    protocol: Some(VlanProtocol::Ieee8021Ad),
                }),
                link_state: Some(LinkState::Disable),
                max_tx_rate_mbps: Some(500),
                ..NetworkRequest::default()
            }),
            ..VFClaimSpec::default()
        },
    );
    claim.metadata.namespace = Some("team".into());
    claim.metadata.uid = Some("u-1".into());
    claim.metadata.generation = Some(3);
    claim
}

fn copy() -> VFClaim {
    desired_copy(&claim(), &node(), &guest())
}

fn refusal(up: Up) -> (&'static str, String) {
    match up {
        Up::Refuse { reason, message } => (reason, message),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_claim_without_a_copy_gets_one_named_by_its_uid() {
    let Up::Create(made) = plan(&claim(), &Ok(node()), &guest(), None) else {
        panic!("no create")
    };
    assert_eq!(made.name_any(), "vfc-u-1");
    assert_eq!(made.namespace().as_deref(), Some("claims-blue"));
    assert_eq!(mirrored_generation(&made), Some(3));
    assert_eq!(made.spec.node_name, None);
    assert_eq!(made.spec.vm_ip.as_deref(), Some("10.0.0.7"));
    let block = made.spec.guest.clone().unwrap();
    assert_eq!(
        (block.cluster.as_str(), block.cluster_uid.as_str()),
        ("blue", "c-1")
    );
    assert_eq!(
        (block.namespace.as_str(), block.name.as_str()),
        ("team", "fast")
    );
    assert_eq!(
        (block.uid.as_str(), block.system_uuid.as_str()),
        ("u-1", UUID)
    );
}

#[test]
fn a_copy_that_says_it_all_is_kept() {
    assert_eq!(
        plan(&claim(), &Ok(node()), &guest(), Some(&copy())),
        Up::Keep
    );
}

#[test]
fn an_edit_and_a_new_address_are_written_whole() {
    let mut edited = claim();
    edited.metadata.generation = Some(4);
    edited.spec.network = None;
    let mut moved = node();
    moved.internal_ip = None;
    assert_eq!(
        plan(&edited, &Ok(moved), &guest(), Some(&copy())),
        Up::Update(Edit {
            network: None,
            vm_ip: None,
            guest_generation: 4
        })
    );
}

#[test]
fn a_generation_alone_is_written_too() {
    let mut edited = claim();
    edited.metadata.generation = Some(9);
    assert!(matches!(
        plan(&edited, &Ok(node()), &guest(), Some(&copy())),
        Up::Update(Edit {
            guest_generation: 9,
            ..
        })
    ));
}

#[test]
fn a_foreign_object_of_our_name_is_a_conflict_whatever_differs() {
    type Change = fn(&mut VFClaim);
    let changes: [Change; 6] = [
        |c| c.spec.guest = None,
        |c| c.spec.guest.as_mut().unwrap().cluster = "red".into(),
        |c| c.spec.guest.as_mut().unwrap().cluster_uid = "c-2".into(),
        |c| c.spec.guest.as_mut().unwrap().namespace = "other".into(),
        |c| c.spec.guest.as_mut().unwrap().name = "other".into(),
        |c| c.spec.guest.as_mut().unwrap().uid = "u-2".into(),
    ];
    for (n, change) in changes.into_iter().enumerate() {
        let mut foreign = copy();
        change(&mut foreign);
        // On its way out it is foreign still.
        for deleted in [None, Some(Time(Default::default()))] {
            foreign.metadata.deletion_timestamp = deleted;
            let up = plan(&claim(), &Ok(node()), &guest(), Some(&foreign));
            assert_eq!(refusal(up).0, "Conflict", "change {n}");
        }
    }
}

#[test]
fn an_unknown_node_refuses_a_new_copy_and_leaves_an_old_one_be() {
    let unknown = Err(NodeProblem::NotFound("w1".into()));
    let (reason, message) = refusal(plan(&claim(), &unknown, &guest(), None));
    assert_eq!(reason, "NodeNotFound");
    assert!(message.contains("w1"), "{message}");
    assert_eq!(plan(&claim(), &unknown, &guest(), Some(&copy())), Up::Keep);
}

#[test]
fn another_machine_under_the_nodes_name_is_refused() {
    let mut other = node();
    other.system_uuid = "11111111-2222-3333-4444-555555555555".into();
    let (reason, message) = refusal(plan(&claim(), &Ok(other), &guest(), Some(&copy())));
    assert_eq!(reason, "GuestIdentityMismatch");
    assert!(
        message.contains(UUID) && message.contains("1111"),
        "{message}"
    );
}

#[test]
fn a_provider_id_that_comes_later_changes_nothing() {
    let mut later = node();
    later.provider_id = Some("harvester://vms/w1".into());
    assert_eq!(
        plan(&claim(), &Ok(later), &guest(), Some(&copy())),
        Up::Keep
    );
}

#[test]
fn a_copy_on_its_way_out_is_waited_for() {
    let mut going = copy();
    going.metadata.deletion_timestamp = Some(Time(Default::default()));
    assert_eq!(
        plan(&claim(), &Ok(node()), &guest(), Some(&going)),
        Up::AwaitGone
    );
}

#[test]
fn a_claim_that_names_no_node_is_refused() {
    let mut lost = claim();
    lost.spec.node_name = None;
    assert_eq!(target(&lost, |_| None), Err(NodeProblem::NoTarget));
    assert_eq!(
        target(&claim(), |_| None),
        Err(NodeProblem::NotFound("w1".into()))
    );
}

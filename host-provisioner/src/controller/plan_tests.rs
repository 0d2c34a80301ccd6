use common::api::{
    AttachmentStatus, DeviceStatus, GuestClusterSpec, GuestClusterStatus, GuestRef, Transport,
    VFClaimSpec, VFClassSpec, host_claim_name,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::*;

const UUID: &str = "6d1a3a5e-4e5f-4b7a-9a43-0a7c1f2e3d4c";

fn cluster() -> GuestCluster {
    let mut cluster = GuestCluster::new(
        "blue",
        GuestClusterSpec {
            claim_namespace: "claims-blue".into(),
            vm_namespace: "vms".into(),
            classes: vec!["gold".into()],
            ..GuestClusterSpec::default()
        },
    );
    cluster.metadata.uid = Some("gc".into());
    cluster.status = Some(GuestClusterStatus {
        cluster_uid: Some("kube-system".into()),
        ..GuestClusterStatus::default()
    });
    cluster
}

fn claim() -> VFClaim {
    let guest = GuestRef {
        cluster: "blue".into(),
        cluster_uid: "kube-system".into(),
        namespace: "default".into(),
        name: "mine".into(),
        uid: "u1".into(),
        node_name: "worker".into(),
        system_uuid: UUID.into(),
        provider_id: None,
    };
    let mut claim = VFClaim::new(
        &host_claim_name("u1"),
        VFClaimSpec {
            class_name: Some("gold".into()),
            guest: Some(guest),
            ..VFClaimSpec::default()
        },
    );
    claim.metadata.namespace = Some("claims-blue".into());
    claim.metadata.uid = Some("h1".into());
    claim.metadata.generation = Some(1);
    claim
}

fn vmi() -> Vmi {
    Vmi {
        namespace: "vms".into(),
        name: "a".into(),
        uid: "vmi-a".into(),
        firmware_uuid: Some(UUID.into()),
        phase: "Running".into(),
        node: Some("host1".into()),
        active_pods: [("pod-1".to_owned(), "host1".to_owned())].into(),
        ..Vmi::default()
    }
}

fn run(claim: &VFClaim, clusters: &[&GuestCluster], vmis: &[Vmi]) -> Plan {
    let class = VFClass::new("gold", VFClassSpec::default());
    plan(
        claim,
        &Known {
            clusters,
            classes: &[&class],
            vmis,
            admitted_others: 0,
            pf: None,
        },
    )
}

/// The claim after the plan's decision and finalizer are written.
fn after(claim: &VFClaim, plan: &Plan) -> VFClaim {
    let mut next = claim.clone();
    if plan.finalizer {
        next.metadata.finalizers = Some(vec![HOST_FINALIZER.into()]);
    }
    if let Some(patch) = &plan.decision {
        let mut status = serde_json::to_value(next.status.unwrap_or_default()).unwrap();
        merge(&mut status, patch);
        next.status = Some(serde_json::from_value(status).unwrap());
    }
    next
}

fn merge(into: &mut Value, patch: &Value) {
    let (Value::Object(map), Value::Object(changes)) = (&mut *into, patch) else {
        *into = patch.clone();
        return;
    };
    for (key, change) in changes {
        if change.is_null() {
            map.remove(key);
        } else {
            merge(map.entry(key.clone()).or_insert(Value::Null), change);
        }
    }
}

fn reason_of(plan: &Plan, type_: &str) -> String {
    let conditions = plan.conditions.as_ref().unwrap();
    let found = conditions.iter().find(|c| c.type_ == type_).unwrap();
    found.reason.clone()
}

fn with_device(mut claim: VFClaim) -> VFClaim {
    let status = claim.status.get_or_insert_default();
    status.device = Some(DeviceStatus {
        node_name: "host1".into(),
        physical_function: "p".into(),
        vf_index: 0,
        namespace_id: None,
        pci_address: None,
        vendor_id: None,
        device_id: None,
        iommu_group: None,
    });
    claim
}

#[test]
fn all_that_is_known_at_once_is_one_decision_and_then_nothing_is_due() {
    let blue = cluster();
    let first = run(&claim(), &[&blue], &[vmi()]);
    assert!(first.finalizer);
    let decided = first.decision.clone().unwrap();
    for field in ["admitted", "vm", "hostNode", "launcher"] {
        assert!(decided.get(field).is_some(), "{field}");
    }
    let bound = after(&claim(), &first);
    let second = run(&bound, &[&blue], &[vmi()]);
    assert_eq!((second.finalizer, second.decision), (false, None));
}

#[test]
fn a_guest_is_pinned_before_anything_is_granted() {
    let mut blue = cluster();
    blue.status = None;
    let first = run(&claim(), &[&blue], &[vmi()]);
    assert_eq!(first.pin, Some(("blue".into(), "kube-system".into())));
    assert_eq!((first.decision, first.finalizer), (None, false));
}

#[test]
fn a_claim_that_is_not_its_guests_own_gets_a_condition_and_nothing_else() {
    let blue = cluster();
    let mut older = cluster();
    older.metadata.name = Some("red".into());
    older.metadata.creation_timestamp = Some(Time(Timestamp::from_second(1).unwrap()));
    let mut younger = blue.clone();
    younger.metadata.creation_timestamp = Some(Time(Timestamp::from_second(2).unwrap()));
    let edit = |f: fn(&mut VFClaim)| {
        let mut claim = claim();
        f(&mut claim);
        claim
    };
    let mismatch = reason::GUEST_IDENTITY_MISMATCH;
    let unknown = reason::GUEST_CLUSTER_NOT_FOUND;
    for (what, claim, clusters, expected) in [
        ("unknown cluster", claim(), vec![], unknown),
        (
            "namespace",
            edit(|c| c.metadata.namespace = Some("claims-red".into())),
            vec![&blue],
            mismatch,
        ),
        ("taken namespace", claim(), vec![&younger, &older], mismatch),
        (
            "name",
            edit(|c| c.metadata.name = Some("mine".into())),
            vec![&blue],
            mismatch,
        ),
        (
            "cluster UID",
            edit(|c| c.spec.guest.as_mut().unwrap().cluster_uid = "other".into()),
            vec![&blue],
            mismatch,
        ),
        (
            "node name",
            edit(|c| {
                c.spec.guest = None;
                c.spec.node_name = Some("n".into());
            }),
            vec![&blue],
            mismatch,
        ),
    ] {
        let due = run(&claim, &clusters, &[vmi()]);
        assert_eq!(reason_of(&due, type_::ADMITTED), expected, "{what}");
        assert_eq!(
            (due.finalizer, due.decision, due.pin),
            (false, None, None),
            "{what}"
        );
        assert!(due.refusal.is_some(), "{what}");
    }
}

#[test]
fn a_node_that_holds_a_device_keeps_the_claim_whatever_the_vm_does() {
    let blue = cluster();
    let bound = after(&claim(), &run(&claim(), &[&blue], &[vmi()]));
    let held = with_device(bound.clone());
    let stopped = Vmi {
        phase: "Succeeded".into(),
        ..vmi()
    };
    let moved = Vmi {
        node: Some("host2".into()),
        active_pods: [("pod-2".to_owned(), "host2".to_owned())].into(),
        ..vmi()
    };
    for (vmis, reason) in [
        (vec![stopped.clone()], reason::VM_NOT_RUNNING),
        (vec![moved.clone()], reason::VM_MOVED),
        (vec![], reason::VM_NOT_FOUND),
    ] {
        let due = run(&held, &[&blue], &vmis);
        assert_eq!(due.decision, None, "{reason}");
        assert_eq!(reason_of(&due, type_::RESOLVED), reason);
    }
    // Without a device the claim leaves the node and follows.
    let left = after(&bound, &run(&bound, &[&blue], &[stopped]));
    assert_eq!(left.status.as_ref().unwrap().host_node, None);
    assert_eq!(left.status.as_ref().unwrap().launcher, None);
    let followed = after(&left, &run(&left, &[&blue], &[moved]));
    assert_eq!(followed.status.unwrap().host_node.as_deref(), Some("host2"));
}

#[test]
fn a_vm_started_again_on_the_same_node_gets_its_new_launcher() {
    let blue = cluster();
    let held = with_device(after(&claim(), &run(&claim(), &[&blue], &[vmi()])));
    let again = Vmi {
        uid: "vmi-b".into(),
        active_pods: [("pod-2".to_owned(), "host1".to_owned())].into(),
        ..vmi()
    };
    let next = after(&held, &run(&held, &[&blue], &[again]));
    let launcher = next.status.unwrap().launcher.unwrap();
    assert_eq!(
        (launcher.vmi_uid, launcher.pod_uid),
        ("vmi-b".into(), "pod-2".into())
    );
}

#[test]
fn the_finalizer_goes_when_the_agent_has_cleared_device_and_attachment() {
    let blue = cluster();
    let mut going = after(&claim(), &run(&claim(), &[&blue], &[vmi()]));
    going.metadata.deletion_timestamp = Some(Time(Timestamp::from_second(1).unwrap()));
    assert_eq!(
        run(&going, &[&blue], &[vmi()]),
        Plan {
            release: true,
            ..Plan::default()
        }
    );
    let mut held = with_device(going.clone());
    assert_eq!(run(&held, &[&blue], &[]), Plan::default());
    held.status.as_mut().unwrap().device = None;
    held.status.as_mut().unwrap().attachment = Some(AttachmentStatus {
        vmi_uid: "v".into(),
        pod_uid: "p".into(),
        qemu_device_id: "q".into(),
        port: "r".into(),
        transport: Transport::QmpSocket,
        boot_id: "b".into(),
        qemu_start_time: 1,
    });
    assert_eq!(run(&held, &[&blue], &[]), Plan::default());
    // Never granted: nothing of ours is on it.
    let mut unknown = claim();
    unknown.metadata.deletion_timestamp = going.metadata.deletion_timestamp;
    assert_eq!(run(&unknown, &[], &[]), Plan::default());
}

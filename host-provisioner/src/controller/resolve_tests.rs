use common::api::GuestClusterSpec;
use kube::api::DynamicObject;
use serde_json::json;

use super::*;
use crate::controller::vmi;

const UUID: &str = "6d1a3a5e-4e5f-4b7a-9a43-0a7c1f2e3d4c";

/// A VMI as virt-controller writes it.
fn object(name: &str, uuid: &str) -> DynamicObject {
    serde_json::from_value(json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {
            "name": name, "namespace": "vms", "uid": format!("uid-{name}"),
            "labels": {"guest": "blue"}, "annotations": {"big": "one"},
        },
        "spec": {
            "domain": {
                "firmware": {"uuid": uuid},
                "devices": {"interfaces": [{"name": "default", "bridge": {}}], "disks": []},
                "resources": {"requests": {"memory": "2Gi"}},
            },
            "networks": [{"name": "default", "pod": {}}],
        },
        "status": {
            "phase": "Running", "nodeName": "host1", "activePods": {"pod-1": "host1"},
            "interfaces": [{"name": "default", "ipAddress": "10.0.0.5", "ipAddresses": ["10.0.0.5", "fd00::5/64"]}],
            "guestOSInfo": {},
        },
    }))
    .unwrap()
}

fn vm(name: &str, uuid: &str) -> Vmi {
    let mut object = object(name, uuid);
    vmi::strip(&mut object);
    Vmi::read(&object)
}

fn cluster(name: &str) -> GuestCluster {
    let mut spec = GuestClusterSpec {
        vm_namespace: "vms".into(),
        ..GuestClusterSpec::default()
    };
    spec.vm_selector.match_labels = Some([("guest".to_owned(), name.to_owned())].into());
    GuestCluster::new(name, spec)
}

fn guest() -> GuestRef {
    GuestRef {
        cluster: "blue".into(),
        node_name: "worker".into(),
        system_uuid: UUID.to_ascii_uppercase(),
        ..GuestRef::default()
    }
}

fn run(vmis: &[Vmi], ip: Option<&str>) -> Resolution {
    let blue = cluster("blue");
    let green = cluster("green");
    resolve(&guest(), ip, &blue, &[&blue, &green], vmis)
}

fn refusal(resolution: Resolution) -> &'static str {
    match resolution {
        Resolution::Refused(refusal) => refusal.reason,
        Resolution::Waiting { why, .. } => why.reason,
        Resolution::Running { .. } => "running",
    }
}

#[test]
fn the_uuid_alone_selects_and_all_is_read_from_the_vmi() {
    let found = run(&[vm("other", "x"), vm("a", UUID)], Some("10.0.0.5"));
    assert_eq!(
        found,
        Resolution::Running {
            vm: VmRef {
                namespace: "vms".into(),
                name: "a".into(),
                uid: "uid-a".into(),
                ip: Some("10.0.0.5".into()),
            },
            node: "host1".into(),
            launcher: Launcher {
                vmi_uid: "uid-a".into(),
                pod_uid: "pod-1".into(),
            },
        }
    );
}

#[test]
fn a_vm_outside_the_selection_is_not_found() {
    let mut elsewhere = vm("a", UUID);
    elsewhere.namespace = "other".into();
    let mut foreign = vm("a", UUID);
    foreign.labels = [("guest".to_owned(), "green".to_owned())].into();
    for vmis in [vec![], vec![elsewhere], vec![foreign]] {
        assert_eq!(refusal(run(&vmis, None)), reason::VM_NOT_FOUND);
    }
}

#[test]
fn two_vms_of_one_uuid_or_two_guests_of_one_vm_are_refused() {
    let twice = [vm("a", UUID), vm("b", UUID)];
    assert_eq!(refusal(run(&twice, None)), reason::VM_AMBIGUOUS);
    let blue = cluster("blue");
    let mut green = cluster("green");
    green.spec.vm_selector = LabelSelector::default();
    let both = resolve(&guest(), None, &blue, &[&blue, &green], &[vm("a", UUID)]);
    assert_eq!(refusal(both), reason::VM_AMBIGUOUS);
}

#[test]
fn an_address_contradicts_only_when_the_vm_reports_its_own() {
    let plain = vm("a", UUID);
    let mut silent = plain.clone();
    silent.addresses.clear();
    let mut masqueraded = plain.clone();
    masqueraded.masqueraded = true;
    for (vmi, ip, expected) in [
        (&plain, "10.0.0.5", "running"),
        (&plain, "fd00:0::5", "running"),
        (&plain, "10.0.0.6", reason::IP_CONTRADICTS),
        (&plain, "nonsense", reason::IP_CONTRADICTS),
        (&silent, "10.0.0.6", "running"),
        (&masqueraded, "10.0.0.6", "running"),
    ] {
        let found = run(std::slice::from_ref(vmi), Some(ip));
        assert_eq!(refusal(found), expected, "{ip}");
    }
}

#[test]
fn a_vm_that_cannot_take_a_vf_now_is_waited_for() {
    let edit = |f: fn(&mut Vmi)| {
        let mut vmi = vm("a", UUID);
        f(&mut vmi);
        vmi
    };
    for vmi in [
        edit(|v| v.phase = "Scheduling".into()),
        edit(|v| v.phase.clear()),
        edit(|v| v.deleting = true),
        edit(|v| v.migrating = true),
        edit(|v| v.node = None),
        edit(|v| v.active_pods.clear()),
        edit(|v| v.active_pods = [("p".into(), "host2".into())].into()),
        edit(|v| {
            v.active_pods = [("p".into(), "host1".into()), ("q".into(), "host1".into())].into()
        }),
    ] {
        assert_eq!(refusal(run(&[vmi], None)), reason::VM_NOT_RUNNING);
    }
    // The pod of a migration's target on another node does not confuse.
    let ended = edit(|v| {
        v.active_pods = [("p".into(), "host1".into()), ("q".into(), "host2".into())].into();
    });
    assert_eq!(refusal(run(&[ended], None)), "running");
}

#[test]
fn a_migration_is_read_from_its_state() {
    for (state, migrating) in [
        (json!({"startTimestamp": "x"}), true),
        (json!({"completed": true}), false),
        (json!({"failed": true, "completed": false}), false),
    ] {
        let mut object = object("a", UUID);
        object.data["status"]["migrationState"] = state;
        vmi::strip(&mut object);
        assert_eq!(Vmi::read(&object).migrating, migrating);
    }
}

#[test]
fn a_vmi_with_nothing_or_nonsense_in_it_is_read_too() {
    for data in [
        json!({}),
        json!({"spec": 3, "status": []}),
        json!({"status": {"activePods": 1, "interfaces": {}}}),
    ] {
        let mut object = object("a", UUID);
        object.data = data;
        vmi::strip(&mut object);
        assert_eq!(Vmi::read(&object).firmware_uuid, None);
    }
}

//! Tables for the way down.

use common::api::{
    Admitted, DeviceStatus, GUEST_GENERATION_ANNOTATION, GrantedNetwork, GuestDevice, Launcher,
    LinkState, PfSelector, ReclaimPolicy, VFClaimSpec,
};
use serde_json::json;

use super::*;

fn at(second: i64) -> Time {
    serde_json::from_value(json!(format!("2026-01-01T00:00:{second:02}Z"))).unwrap()
}

fn claim() -> VFClaim {
    let mut claim = VFClaim::new("fast", VFClaimSpec::default());
    claim.metadata.generation = Some(3);
    claim
}

/// A copy at host generation 8 that carries the guest's generation 3.
fn copy(conditions: &[(&str, &str, &str, i64)]) -> VFClaim {
    let mut copy = VFClaim::new("vfc-u", VFClaimSpec::default());
    copy.metadata.generation = Some(8);
    copy.metadata.annotations = Some([(GUEST_GENERATION_ANNOTATION.into(), "3".into())].into());
    let conditions = conditions
        .iter()
        .map(|(t, status, reason, about)| Condition {
            type_: (*t).into(),
            status: (*status).into(),
            reason: (*reason).into(),
            message: format!("{reason} it is"),
            observed_generation: Some(*about),
            last_transition_time: at(1),
        })
        .collect();
    copy.status = Some(VFClaimStatus {
        conditions,
        ..VFClaimStatus::default()
    });
    copy
}

fn synced() -> NewCondition {
    NewCondition::new(type_::SYNCED, ConditionStatus::True, "Synced", "it is")
}

fn unsynced(reason: &str) -> NewCondition {
    NewCondition::new(type_::SYNCED, ConditionStatus::False, reason, "do this")
}

fn ready_of(status: &VFClaimStatus) -> (&str, &str, Option<i64>) {
    let c = condition(&status.conditions, type_::READY).unwrap();
    (&c.status, &c.reason, c.observed_generation)
}

fn device(index: u16, address: Option<&str>) -> DeviceStatus {
    DeviceStatus {
        node_name: "h1".into(),
        physical_function: "h1-0a".into(),
        vf_index: index,
        namespace_id: None,
        pci_address: address.map(Into::into),
        vendor_id: None,
        device_id: None,
        iommu_group: None,
    }
}

#[test]
fn ready_says_what_the_host_says() {
    /// Type, status, reason and observed generation of a host condition.
    type Said = (&'static str, &'static str, &'static str, i64);
    let cases: [(&[Said], (&str, &str)); 7] = [
        (&[], ("False", "Pending")),
        (&[("Admitted", "True", "Admitted", 8)], ("False", "Pending")),
        (
            &[("Admitted", "False", "ClassNotFound", 8)],
            ("False", "ClassNotFound"),
        ),
        (
            &[
                ("Admitted", "True", "Admitted", 8),
                ("Resolved", "False", "VMNotFound", 8),
            ],
            ("False", "VMNotFound"),
        ),
        (
            &[
                ("Resolved", "True", "Resolved", 8),
                ("Ready", "False", "NoFreeVF", 8),
            ],
            ("False", "NoFreeVF"),
        ),
        // An edit that is refused does not make what is attached unusable.
        (
            &[
                ("Admitted", "False", "OverrideNotAllowed", 8),
                ("Ready", "True", "Ready", 8),
            ],
            ("True", "Ready"),
        ),
        // A Ready of an earlier node does not hide that the VM is gone.
        (
            &[
                ("Resolved", "False", "VMNotRunning", 8),
                ("Ready", "False", "Detaching", 8),
            ],
            ("False", "VMNotRunning"),
        ),
    ];
    for (said, (status, reason)) in cases {
        let copy = copy(said);
        let found = wanted_status(&claim(), HostView::Copy(&copy), &synced(), &at(9));
        assert_eq!(
            (ready_of(&found).0, ready_of(&found).1),
            (status, reason),
            "{said:?}"
        );
        assert_eq!(
            condition(&found.conditions, "Synced").unwrap().status,
            "True"
        );
    }
}

#[test]
fn a_condition_about_another_spec_is_not_passed_off_as_about_this_one() {
    let said = copy(&[
        ("Admitted", "True", "Admitted", 8),
        ("Ready", "True", "Ready", 7),
    ]);
    let found = wanted_status(&claim(), HostView::Copy(&said), &synced(), &at(9));
    let admitted = condition(&found.conditions, "Admitted").unwrap();
    assert_eq!(admitted.observed_generation, Some(3));
    assert_eq!(ready_of(&found).2, None);

    // Nor is what was known forgotten.
    let mut earlier = claim();
    earlier.status = Some(wanted_status(
        &claim(),
        HostView::Copy(&copy(&[("Ready", "True", "Ready", 8)])),
        &synced(),
        &at(9),
    ));
    let found = wanted_status(&earlier, HostView::Copy(&said), &synced(), &at(9));
    assert_eq!(ready_of(&found).2, Some(3));
}

#[test]
fn a_copy_ahead_of_the_claim_that_was_read_maps_to_nothing() {
    let mut said = copy(&[("Ready", "True", "Ready", 8)]);
    said.metadata.annotations = Some([(GUEST_GENERATION_ANNOTATION.into(), "99".into())].into());
    let found = wanted_status(&claim(), HostView::Copy(&said), &synced(), &at(9));
    assert_eq!(ready_of(&found).2, None);
}

#[test]
fn an_unchanged_report_is_the_same_value_whatever_the_time() {
    let said = copy(&[
        ("Admitted", "True", "Admitted", 8),
        ("Ready", "True", "Ready", 8),
    ]);
    let mut claim = claim();
    let first = wanted_status(&claim, HostView::Copy(&said), &synced(), &at(9));
    assert_eq!(writes(None, first.clone()), vec![first.clone()]);
    claim.status = Some(first);
    let second = wanted_status(&claim, HostView::Copy(&said), &synced(), &at(30));
    assert_eq!(writes(claim.status.as_ref(), second), vec![]);
}

#[test]
fn conditions_in_whatever_order_are_reported_once() {
    let ready = || Condition {
        type_: type_::READY.into(),
        status: "False".into(),
        reason: "Pending".into(),
        message: String::new(),
        observed_generation: None,
        last_transition_time: at(1),
    };
    let said = copy(&[("Admitted", "True", "Admitted", 8)]);
    for host in [HostView::Absent, HostView::Unknown, HostView::Copy(&said)] {
        let mut claim = claim();
        claim.status = Some(VFClaimStatus {
            conditions: vec![ready()],
            ..VFClaimStatus::default()
        });
        let first = wanted_status(&claim, host, &synced(), &at(9));
        claim.status = Some(first);
        let second = wanted_status(&claim, host, &synced(), &at(30));
        assert_eq!(writes(claim.status.as_ref(), second), vec![], "{host:?}");
    }
}

#[test]
fn the_tenant_sees_its_vf_and_not_the_hosts_inside() {
    let mut said = copy(&[]);
    said.status = Some(VFClaimStatus {
        host_node: Some("h1".into()),
        launcher: Some(Launcher {
            vmi_uid: "v".into(),
            pod_uid: "p".into(),
        }),
        admitted: Some(Admitted {
            observed_generation: 8,
            class_name: "gold".into(),
            class_uid: "k".into(),
            pf_selector: PfSelector {
                drivers: vec!["igb".into()],
                ..PfSelector::default()
            },
            num_vfs: Some(4),
            reclaim_policy: ReclaimPolicy::Retain,
            placement: Default::default(),
            network: Some(GrantedNetwork {
                mac_address: "02:00:00:00:00:01".into(),
                vlan: None,
                spoof_check: true,
                trust: false,
                link_state: LinkState::Auto,
                min_tx_rate_mbps: None,
                max_tx_rate_mbps: None,
            }),
            storage: None,
        }),
        device: Some(device(1, Some("0000:03:10.2"))),
        guest_device: Some(GuestDevice {
            pci_address: "0000:06:00.0".into(),
            mac_address: Some("02:00:00:00:00:01".into()),
        }),
        ..VFClaimStatus::default()
    });
    let found = wanted_status(&claim(), HostView::Copy(&said), &synced(), &at(9));
    let host = said.status.unwrap();
    assert_eq!(
        (&found.host_node, &found.device, &found.guest_device),
        (&host.host_node, &host.device, &host.guest_device)
    );
    assert_eq!((found.launcher, found.attachment), (None, None));
    let admitted = found.admitted.unwrap();
    assert_eq!(
        (
            admitted.observed_generation,
            admitted.pf_selector,
            admitted.num_vfs
        ),
        (3, PfSelector::default(), None)
    );
    assert_eq!(admitted.network, host.admitted.unwrap().network);
}

#[test]
fn without_a_copy_ready_repeats_why() {
    let found = wanted_status(
        &claim(),
        HostView::Absent,
        &unsynced("NodeNotFound"),
        &at(9),
    );
    assert_eq!(ready_of(&found), ("False", "NodeNotFound", Some(3)));
    assert_eq!(found.device, None);
}

#[test]
fn an_unreachable_host_changes_nothing_but_synced() {
    let mut claim = claim();
    let mut said = copy(&[("Ready", "True", "Ready", 8)]);
    said.status.as_mut().unwrap().host_node = Some("h1".into());
    let before = wanted_status(&claim, HostView::Copy(&said), &synced(), &at(9));
    claim.status = Some(before.clone());
    let down = unsynced("HostUnreachable");
    let found = wanted_status(&claim, HostView::Unknown, &down, &at(10));
    assert_eq!(found.host_node, before.host_node);
    assert_eq!(ready_of(&found), ready_of(&before));
    assert_eq!(
        condition(&found.conditions, "Synced").unwrap().reason,
        "HostUnreachable"
    );

    claim.status = None;
    let found = wanted_status(&claim, HostView::Unknown, &down, &at(10));
    assert_eq!(ready_of(&found).0, "Unknown");
}

#[test]
fn a_release_says_what_it_waits_for() {
    let mut claim = claim();
    claim.metadata.deletion_timestamp = Some(at(5));
    let said = copy(&[("Ready", "False", "UnplugPending", 8)]);
    let found = wanted_status(&claim, HostView::Copy(&said), &synced(), &at(9));
    assert_eq!(ready_of(&found).1, "Releasing");
    let message = &condition(&found.conditions, "Ready").unwrap().message;
    assert!(message.contains("UnplugPending"), "{message}");
}

#[test]
fn a_device_that_changed_unseen_is_cleared_first() {
    let with = |host: Option<&str>, device: Option<DeviceStatus>| VFClaimStatus {
        host_node: host.map(Into::into),
        device,
        ..VFClaimStatus::default()
    };
    let old = with(Some("h1"), Some(device(1, Some("0000:03:10.2"))));
    let cleared = with(Some("h1"), None);
    let two = [
        with(Some("h1"), Some(device(2, None))),
        with(Some("h1"), Some(device(1, None))),
        with(Some("h2"), None),
        with(None, None),
    ];
    for wanted in two {
        assert_eq!(
            writes(Some(&old), wanted.clone()),
            vec![cleared.clone(), wanted]
        );
    }
    assert_eq!(writes(Some(&old), cleared.clone()), vec![cleared]);
    let chosen = with(Some("h1"), Some(device(1, None)));
    assert_eq!(writes(Some(&chosen), old.clone()), vec![old]);
}

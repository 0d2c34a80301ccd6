use common::api::{PhysicalFunctionSpec, PhysicalFunctionStatus, ResizeStatus, WithheldReason};
use serde_json::json;

use super::*;

fn claim(policy: &str, deleting: bool) -> VFClaim {
    let mut claim: VFClaim = serde_json::from_value(json!({
        "apiVersion": "sriov.harvesterhci.io/v1alpha1", "kind": "VFClaim",
        "metadata": {"name": "vfc-1", "namespace": "blue", "uid": "u1"},
        "spec": {},
        "status": {
            "hostNode": "host1",
            "admitted": {
                "observedGeneration": 1, "className": "gold", "classUID": "g",
                "reclaimPolicy": policy,
                "network": {"macAddress": "02:00:00:00:00:01", "spoofCheck": true, "trust": false},
            },
            "device": {"nodeName": "host1", "physicalFunction": "pf", "vfIndex": 3},
        },
    }))
    .unwrap();
    if deleting {
        claim.metadata.deletion_timestamp =
            serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
    }
    claim
}

fn entry(vf_index: u16, reason: WithheldReason, uid: &str) -> WithheldVf {
    WithheldVf {
        vf_index,
        reason,
        claim: ClaimRef {
            namespace: "blue".into(),
            name: "vfc-1".into(),
            uid: uid.into(),
        },
    }
}

fn pf(withheld: Vec<WithheldVf>) -> PhysicalFunction {
    let spec = PhysicalFunctionSpec {
        withheld,
        ..PhysicalFunctionSpec::default()
    };
    PhysicalFunction::new("pf", spec)
}

#[test]
fn a_claim_needs_an_entry_when_it_goes_and_its_vf_does_not_go_back() {
    use WithheldReason::{Destroyed, Retained};
    for (policy, reason) in [("Destroy", Destroyed), ("Retain", Retained)] {
        assert_eq!(due(&claim(policy, false)), None, "it may go on for years");
        let due = due(&claim(policy, true)).unwrap();
        assert_eq!(due.physical_function, "pf");
        assert_eq!(due.entry, entry(3, reason, "u1"));
    }
    assert_eq!(due(&claim("Return", true)), None);
    let mut without = claim("Destroy", true);
    without.status.as_mut().unwrap().device = None;
    assert_eq!(due(&without), None);
    without.status = None;
    assert_eq!(due(&without), None);
}

#[test]
fn an_index_is_withheld_once() {
    use WithheldReason::{Destroyed, Retained};
    let destroyed = entry(3, Destroyed, "u1");
    let retained = entry(3, Retained, "u1");
    let others = vec![entry(1, Retained, "a"), entry(5, Destroyed, "b")];
    let all = entered(&pf(others.clone()), &destroyed).unwrap();
    assert_eq!(
        all,
        [others[0].clone(), destroyed.clone(), others[1].clone()]
    );
    assert_eq!(entered(&pf(all), &destroyed), None);
    // Of two claims that named one VF, the one that keeps it from more counts.
    let of_another = pf(vec![entry(3, Destroyed, "c")]);
    assert_eq!(entered(&of_another, &destroyed), None);
    assert_eq!(
        entered(&of_another, &retained),
        Some(vec![retained.clone()])
    );
    let of_another = pf(vec![entry(3, Retained, "c")]);
    assert_eq!(entered(&of_another, &destroyed), None);
    assert_eq!(entered(&of_another, &retained), None);
}

#[test]
fn entries_go_when_the_agent_says_that_their_vfs_are_gone() {
    use WithheldReason::{Destroyed, Retained};
    let all = vec![
        entry(1, Destroyed, "a"),
        entry(2, Retained, "a"),
        entry(3, Destroyed, "b"),
    ];
    let mut pf = pf(all.clone());
    assert_eq!(settled(&pf), None);
    let mut resize = ResizeStatus {
        destroyed: vec!["a".into(), "long-gone".into()],
        ..ResizeStatus::default()
    };
    let mut says = |resize: &ResizeStatus| {
        pf.status = Some(PhysicalFunctionStatus {
            resize: Some(resize.clone()),
            ..PhysicalFunctionStatus::default()
        });
        pf.clone()
    };
    assert_eq!(settled(&says(&resize)), None, "begun only");
    resize.complete = true;
    let pf = says(&resize);
    assert_eq!(entered(&pf, &entry(1, Destroyed, "a")), None, "it has gone");
    assert_eq!(settled(&pf), Some(all[1..].to_vec()));
    // The index is another VF's by now: its claim has an entry of its own, in the same write.
    let new = entry(1, Destroyed, "c");
    let mut with = vec![new.clone()];
    with.extend_from_slice(&all[1..]);
    assert_eq!(entered(&pf, &new), Some(with));
}

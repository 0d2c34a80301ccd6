//! Edits of a claim that was granted, and of its class.

use super::*;

fn granted_claim(fields: &[NetworkField], request: NetworkRequest) -> (VFClaim, VFClass) {
    let gold = class("gold", fields);
    let mut granted = claim(Some("gold"), request);
    let admitted = ask(&granted, &cluster(&["gold"]), &[&gold], 0).unwrap();
    granted.status = Some(VFClaimStatus {
        admitted: Some(admitted),
        ..VFClaimStatus::default()
    });
    granted.metadata.generation = Some(2);
    (granted, gold)
}

#[test]
fn a_class_edited_or_deleted_later_does_not_reach_a_granted_claim() {
    let (claim, mut gold) = granted_claim(&[NetworkField::MacAddress], wish());
    let before = claim.status.as_ref().unwrap().admitted.clone().unwrap();
    gold.spec.network.vlan = Some(Vlan {
        id: 99,
        ..Vlan::default()
    });
    gold.spec.pf_selector.drivers = vec!["ice".into()];
    gold.spec.num_vfs = Some(2);
    gold.spec.reclaim_policy = api::ReclaimPolicy::Retain;
    gold.spec.placement = api::Placement::Spread;
    for classes in [vec![&gold], vec![]] {
        let after = ask(&claim, &cluster(&["gold"]), &classes, 0).unwrap();
        let same = Admitted {
            observed_generation: 2,
            ..before.clone()
        };
        assert_eq!(after, same);
    }
    let new = self::claim(Some("gold"), wish());
    let new = ask(&new, &cluster(&["gold"]), &[&gold], 0).unwrap();
    assert_eq!(new.placement, api::Placement::Spread, "a new one gets it");
}

#[test]
fn a_changed_network_is_granted_but_a_mac_in_use_stays() {
    let fields = [NetworkField::MacAddress, NetworkField::Vlan];
    let (mut claim, gold) = granted_claim(&fields, wish());
    let blue = cluster(&["gold"]);
    claim.spec.network = Some(NetworkRequest {
        vlan: Some(Vlan {
            id: 9,
            ..Vlan::default()
        }),
        ..wish()
    });
    let granted = ask(&claim, &blue, &[&gold], 0).unwrap();
    assert_eq!(granted.network.unwrap().vlan.unwrap().id, 9);
    claim.spec.network = Some(NetworkRequest {
        mac_address: Some("02:00:00:00:00:01".into()),
        ..wish()
    });
    assert!(ask(&claim, &blue, &[&gold], 0).is_ok());
    give_device(&mut claim);
    let refused = ask(&claim, &blue, &[&gold], 0).unwrap_err();
    assert_eq!(refused.reason, reason::OVERRIDE_NOT_ALLOWED);
    assert!(
        refused
            .message
            .contains("delete the claim and make another"),
        "{}",
        refused.message
    );
}

fn give_device(claim: &mut VFClaim) {
    let device = serde_json::json!({"nodeName": "n", "physicalFunction": "p", "vfIndex": 0});
    claim.status.as_mut().unwrap().device = Some(serde_json::from_value(device).unwrap());
}

fn igb_pf(can: Option<VfCapabilities>) -> PhysicalFunction {
    let mut pf = PhysicalFunction::new("p", PhysicalFunctionSpec::default());
    pf.status = Some(PhysicalFunctionStatus {
        driver: Some("igb".to_owned()),
        capabilities: can,
        ..PhysicalFunctionStatus::default()
    });
    pf
}

#[test]
fn a_vf_in_use_is_not_changed_to_what_its_driver_cannot_do() {
    let fields = [
        NetworkField::LinkState,
        NetworkField::MinTxRateMbps,
        NetworkField::MaxTxRateMbps,
    ];
    let (mut claim, gold) = granted_claim(&fields, wish());
    let blue = cluster(&["gold"]);
    let can = VfCapabilities {
        vlan: true,
        spoof_check: true,
        max_tx_rate_from_mbps: Some(1),
        ..VfCapabilities::default()
    };
    let limited = NetworkRequest {
        max_tx_rate_mbps: Some(500),
        ..wish()
    };
    let assured = NetworkRequest {
        min_tx_rate_mbps: Some(10),
        ..wish()
    };
    let down = NetworkRequest {
        link_state: Some(LinkState::Disable),
        ..wish()
    };
    let known = igb_pf(Some(can));
    for (request, cannot) in [
        (limited, None),
        (
            assured,
            Some("driver igb cannot set a minimum transmit rate"),
        ),
        (
            down,
            Some("driver igb cannot set link state Disable; it can set"),
        ),
    ] {
        claim.spec.network = Some(request);
        // Without a device it is the agent's to refuse: another PF may be able to.
        claim.status.as_mut().unwrap().device = None;
        assert!(ask_of(&claim, &blue, &[&gold], 0, Some(&known)).is_ok());
        give_device(&mut claim);
        let asked = ask_of(&claim, &blue, &[&gold], 0, Some(&known));
        match cannot {
            None => assert_eq!(asked.unwrap().network.unwrap().max_tx_rate_mbps, Some(500)),
            Some(words) => {
                let refused = asked.unwrap_err();
                assert_eq!(refused.reason, reason::UNSUPPORTED_SETTING);
                assert!(refused.message.contains(words), "{}", refused.message);
                assert!(refused.message.contains("ask for less"));
            }
        }
        // A PF that says nothing of it refuses nothing here.
        for pf in [None, Some(&igb_pf(None))] {
            assert!(ask_of(&claim, &blue, &[&gold], 0, pf).is_ok());
        }
    }
}

use common::api::{
    ClaimQuota, GuestClusterSpec, LinkState, PhysicalFunctionSpec, PhysicalFunctionStatus,
    VFClaimSpec, VFClaimStatus, VFClassSpec, VfCapabilities, Vlan, VlanProtocol,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use proptest::prelude::*;

use super::*;
use common::api;

#[path = "regrant_tests.rs"]
mod regrant;

fn class(name: &str, overrides: &[NetworkField]) -> VFClass {
    let mut class = VFClass::new(
        name,
        VFClassSpec {
            allowed_overrides: overrides.to_vec(),
            network: ClassNetwork {
                vlan: Some(Vlan {
                    id: 7,
                    ..Vlan::default()
                }),
                ..ClassNetwork::default()
            },
            ..VFClassSpec::default()
        },
    );
    class.metadata.uid = Some(format!("uid-{name}"));
    class
}

fn default_since(mut class: VFClass, second: i64) -> VFClass {
    let mark = (DEFAULT_CLASS_ANNOTATION.to_owned(), "true".to_owned());
    class.metadata.annotations = Some([mark].into());
    class.metadata.creation_timestamp = Some(Time(Timestamp::from_second(second).unwrap()));
    class
}

fn cluster(classes: &[&str]) -> GuestCluster {
    GuestCluster::new(
        "blue",
        GuestClusterSpec {
            classes: classes.iter().map(|c| (*c).to_owned()).collect(),
            ..GuestClusterSpec::default()
        },
    )
}

fn claim(class_name: Option<&str>, network: NetworkRequest) -> VFClaim {
    let mut claim = VFClaim::new(
        "vfc-1",
        VFClaimSpec {
            class_name: class_name.map(str::to_owned),
            network: Some(network),
            ..VFClaimSpec::default()
        },
    );
    claim.metadata.generation = Some(1);
    claim
}

fn wish() -> NetworkRequest {
    NetworkRequest::default()
}

fn ask(
    claim: &VFClaim,
    cluster: &GuestCluster,
    classes: &[&VFClass],
    others: usize,
) -> Result<Admitted, Refusal> {
    ask_of(claim, cluster, classes, others, None)
}

fn ask_of(
    claim: &VFClaim,
    cluster: &GuestCluster,
    classes: &[&VFClass],
    others: usize,
    pf: Option<&PhysicalFunction>,
) -> Result<Admitted, Refusal> {
    admit(&Ask {
        claim,
        guest_uid: "guest-uid",
        cluster,
        classes,
        admitted_others: others,
        pf,
    })
}

fn reason_of(asked: Result<Admitted, Refusal>) -> &'static str {
    asked.expect_err("admitted").reason
}

#[test]
fn a_claim_gets_the_class_it_names_and_its_defaults() {
    let gold = class("gold", &[]);
    let granted = ask(
        &claim(Some("gold"), wish()),
        &cluster(&["gold"]),
        &[&gold],
        0,
    )
    .unwrap();
    assert_eq!(granted.class_uid, "uid-gold");
    assert_eq!(granted.observed_generation, 1);
    let network = granted.network.unwrap();
    assert_eq!(
        network.vlan,
        Some(Vlan {
            id: 7,
            ..Vlan::default()
        })
    );
    assert!(network.spoof_check && !network.trust);
    assert_eq!(network.mac_address, derived_mac("guest-uid"));
}

#[test]
fn classes_that_are_not_there_not_allowed_or_going_are_refused_by_name() {
    let (gold, silver) = (class("gold", &[]), class("silver", &[]));
    let mut going = class("bronze", &[]);
    going.metadata.deletion_timestamp = Some(Time(Timestamp::from_second(1).unwrap()));
    let all = [&gold, &silver, &going];
    let blue = cluster(&["gold", "bronze"]);
    let refused = ask(&claim(Some("gone"), wish()), &blue, &all, 0).unwrap_err();
    assert_eq!(refused.reason, reason::CLASS_NOT_FOUND);
    assert!(
        refused.message.contains("may use gold"),
        "{}",
        refused.message
    );
    for (name, why) in [
        ("silver", reason::CLASS_NOT_ALLOWED),
        ("bronze", reason::CLASS_NOT_ALLOWED),
    ] {
        assert_eq!(
            reason_of(ask(&claim(Some(name), wish()), &blue, &all, 0)),
            why,
            "{name}"
        );
    }
    let none = ask(&claim(None, wish()), &cluster(&[]), &all, 0).unwrap_err();
    assert_eq!(none.reason, reason::CLASS_NOT_FOUND);
    assert!(none.message.contains("ask the host's administrator"));
}

#[test]
fn the_default_class_is_the_newest_of_the_allowed_ones() {
    let old = default_since(class("old", &[]), 1);
    let new = default_since(class("new", &[]), 2);
    let foreign = default_since(class("foreign", &[]), 3);
    let all = [&old, &new, &foreign];
    let granted = ask(&claim(None, wish()), &cluster(&["old", "new"]), &all, 0).unwrap();
    assert_eq!(granted.class_name, "new");
}

#[test]
fn cordon_and_quota_stop_new_claims_only() {
    let gold = class("gold", &[]);
    let mut blue = cluster(&["gold"]);
    blue.spec.quota = ClaimQuota { claims: Some(2) };
    let asked = claim(Some("gold"), wish());
    assert!(ask(&asked, &blue, &[&gold], 1).is_ok());
    assert_eq!(
        reason_of(ask(&asked, &blue, &[&gold], 2)),
        reason::QUOTA_EXCEEDED
    );
    let granted = ask(&asked, &blue, &[&gold], 1).unwrap();
    blue.spec.cordoned = true;
    assert_eq!(reason_of(ask(&asked, &blue, &[&gold], 0)), reason::CORDONED);
    let mut attached = asked;
    attached.status = Some(VFClaimStatus {
        admitted: Some(granted.clone()),
        ..VFClaimStatus::default()
    });
    assert_eq!(ask(&attached, &blue, &[&gold], 9), Ok(granted));
}

#[test]
fn a_tenant_chooses_only_what_the_class_lets_it() {
    let blue = cluster(&["gold"]);
    let trusting = NetworkRequest {
        trust: Some(true),
        ..wish()
    };
    let tagged = NetworkRequest {
        vlan: Some(Vlan {
            id: 9,
            qos: Some(1),
            protocol: Some(VlanProtocol::Ieee8021Ad),
        }),
        ..wish()
    };
    let unchecked = NetworkRequest {
        spoof_check: Some(false),
        ..wish()
    };
    let named = NetworkRequest {
        mac_address: Some("02:00:00:00:00:0A".into()),
        ..wish()
    };
    let down = NetworkRequest {
        link_state: Some(api::LinkState::Disable),
        ..wish()
    };
    let assured = NetworkRequest {
        min_tx_rate_mbps: Some(10),
        ..wish()
    };
    let limited = NetworkRequest {
        max_tx_rate_mbps: Some(500),
        ..wish()
    };
    use NetworkField::{
        LinkState, MacAddress, MaxTxRateMbps, MinTxRateMbps, SpoofCheck, Trust, Vlan as Tag,
    };
    for (request, field) in [
        (down, LinkState),
        (assured, MinTxRateMbps),
        (limited, MaxTxRateMbps),
        (trusting, Trust),
        (tagged, Tag),
        (unchecked, SpoofCheck),
        (named, MacAddress),
    ] {
        let asked = claim(Some("gold"), request);
        let (strict, lenient) = (class("gold", &[]), class("gold", &[field]));
        assert_eq!(
            reason_of(ask(&asked, &blue, &[&strict], 0)),
            reason::OVERRIDE_NOT_ALLOWED
        );
        let network = ask(&asked, &blue, &[&lenient], 0).unwrap().network.unwrap();
        match field {
            Trust => assert!(network.trust),
            Tag => {
                let tag = network.vlan.unwrap();
                assert_eq!((tag.id, tag.protocol), (9, Some(VlanProtocol::Ieee8021Ad)));
            }
            SpoofCheck => assert!(!network.spoof_check),
            MacAddress => assert_eq!(network.mac_address, "02:00:00:00:00:0a"),
            LinkState => assert_eq!(network.link_state, api::LinkState::Disable),
            MinTxRateMbps => assert_eq!(network.min_tx_rate_mbps, Some(10)),
            MaxTxRateMbps => assert_eq!(network.max_tx_rate_mbps, Some(500)),
        }
    }
    // Asking for what the class gives anyway is no override, in whatever words.
    for (qos, protocol, same) in [
        (None, None, true),
        (Some(0), Some(VlanProtocol::Ieee8021Q), true),
        (Some(1), None, false),
        (None, Some(VlanProtocol::Ieee8021Ad), false),
    ] {
        let (id, trust) = (7, Some(false));
        let vlan = Some(Vlan { id, qos, protocol });
        let request = NetworkRequest {
            trust,
            vlan,
            ..wish()
        };
        let asked = ask(
            &claim(Some("gold"), request),
            &blue,
            &[&class("gold", &[])],
            0,
        );
        let as_given =
            asked.map(|a| a.network.unwrap().vlan == class("gold", &[]).spec.network.vlan);
        assert_eq!(as_given.unwrap_or(false), same, "{qos:?} {protocol:?}");
    }
}

#[test]
fn vlans_that_the_kernel_does_not_report_again_are_refused() {
    let lenient = class("gold", &[NetworkField::Vlan]);
    let asked = |id: u16, qos: Option<u8>| {
        let vlan = Some(Vlan {
            id,
            qos,
            ..Vlan::default()
        });
        let asked = claim(Some("gold"), NetworkRequest { vlan, ..wish() });
        ask(&asked, &cluster(&["gold"]), &[&lenient], 0)
    };
    for (id, qos) in [(0, None), (0, Some(5)), (4095, None), (100, Some(8))] {
        let refused = reason_of(asked(id, qos));
        assert_eq!(refused, reason::OVERRIDE_NOT_ALLOWED, "{id} {qos:?}");
    }
    for (id, qos) in [(1, None), (4094, Some(7))] {
        assert!(asked(id, qos).is_ok(), "{id} {qos:?}");
    }
}

#[test]
fn a_claims_rate_must_fit_the_other_one_of_its_class() {
    let mut gold = class("gold", &[NetworkField::MinTxRateMbps]);
    gold.spec.network.max_tx_rate_mbps = Some(100);
    let asked = |min| {
        let request = NetworkRequest {
            min_tx_rate_mbps: Some(min),
            ..wish()
        };
        ask(
            &claim(Some("gold"), request),
            &cluster(&["gold"]),
            &[&gold],
            0,
        )
    };
    let network = asked(100).unwrap().network.unwrap();
    assert_eq!(
        (network.min_tx_rate_mbps, network.max_tx_rate_mbps),
        (Some(100), Some(100))
    );
    let refused = asked(101).unwrap_err();
    assert_eq!(refused.reason, reason::OVERRIDE_NOT_ALLOWED);
    assert!(
        refused.message.contains("would be 101"),
        "{}",
        refused.message
    );
}

#[test]
fn mac_addresses_that_no_vf_can_have_are_refused() {
    let lenient = class("gold", &[NetworkField::MacAddress]);
    for mac in [
        "01:00:00:00:00:01",
        "00:00:00:00:00:00",
        "02:00:00:00:00",
        "zz:00:00:00:00:01",
        "2:0:0:0:0:1",
        "+2:00:00:00:00:01",
    ] {
        let asked = claim(
            Some("gold"),
            NetworkRequest {
                mac_address: Some(mac.into()),
                ..wish()
            },
        );
        let asked = ask(&asked, &cluster(&["gold"]), &[&lenient], 0);
        assert_eq!(reason_of(asked), reason::OVERRIDE_NOT_ALLOWED, "{mac}");
    }
}

proptest! {
    #[test]
    fn derived_macs_are_local_unicast_and_stable(uid in ".{0,64}") {
        let mac = derived_mac(&uid);
        prop_assert_eq!(normal_mac(&mac), Ok(mac.clone()));
        let first = u8::from_str_radix(&mac[..2], 16).unwrap();
        prop_assert_eq!(first & 3, 2);
        prop_assert_eq!(derived_mac(&uid), mac);
    }

    /// Whatever is asked for, what the class does not open stays at its default.
    #[test]
    fn no_wish_passes_a_closed_class(
        mac in proptest::option::of("[0-9a-f]{2}(:[0-9a-f]{2}){5}"),
        id in proptest::option::of(0_u16..5000),
        spoof in proptest::option::of(any::<bool>()),
        trust in proptest::option::of(any::<bool>()),
        rate in proptest::option::of(1_u32..1000),
    ) {
        let gold = class("gold", &[]);
        let request = NetworkRequest {
            mac_address: mac,
            vlan: id.map(|id| Vlan { id, ..Vlan::default() }),
            spoof_check: spoof,
            trust,
            link_state: spoof.map(|on| if on { LinkState::Auto } else { LinkState::Enable }),
            min_tx_rate_mbps: rate,
            max_tx_rate_mbps: rate,
        };
        let asked = ask(&claim(Some("gold"), request), &cluster(&["gold"]), &[&gold], 0);
        if let Ok(granted) = asked {
            prop_assert_eq!(granted.network, Some(defaults(&gold.spec.network, "guest-uid")));
        }
    }
}

#[path = "admit_storage_tests.rs"]
mod storage;

//! What is granted of a class's storage.

use super::*;

/// A class of the namespaces 3, 4 and 5.
fn storage_class() -> VFClass {
    let mut class = class("fast-disks", &[NetworkField::MacAddress]);
    class.spec.network = ClassNetwork::default();
    class.spec.storage = Some(ClassStorage {
        namespaces: vec![3, 4, 5],
    });
    class
}

/// A claim of that class that asks for this namespace.
fn storage_claim(nsid: Option<u32>) -> VFClaim {
    let mut claim = claim(Some("fast-disks"), wish());
    claim.spec.network = None;
    claim.spec.storage = nsid.map(|namespace_id| api::StorageRequest { namespace_id });
    claim
}

#[test]
fn a_storage_class_grants_its_namespaces_or_the_one_that_is_asked_for() {
    let (disks, blue) = (storage_class(), cluster(&["fast-disks"]));
    for (nsid, namespaces) in [(None, vec![3, 4, 5]), (Some(4), vec![4])] {
        let granted = ask(&storage_claim(nsid), &blue, &[&disks], 0).unwrap();
        assert_eq!(granted.storage, Some(GrantedStorage { namespaces }));
        assert_eq!(granted.network, None);
    }
    let refused = ask(&storage_claim(Some(6)), &blue, &[&disks], 0).unwrap_err();
    assert_eq!(refused.reason, reason::OVERRIDE_NOT_ALLOWED);
    assert!(
        refused.message.contains("one of 3, 4, 5"),
        "{}",
        refused.message
    );
}

#[test]
fn network_and_storage_do_not_mix() {
    let (disks, gold) = (storage_class(), class("gold", &[]));
    let blue = cluster(&["fast-disks", "gold"]);
    // Also an empty wish is one: the class has nothing for it.
    let wished = claim(Some("fast-disks"), wish());
    let refused = ask(&wished, &blue, &[&disks, &gold], 0).unwrap_err();
    assert!(
        refused.message.contains("have no network settings"),
        "{}",
        refused.message
    );
    let mut wished = storage_claim(Some(3));
    wished.spec.class_name = Some("gold".into());
    let refused = ask(&wished, &blue, &[&disks, &gold], 0).unwrap_err();
    assert!(
        refused.message.contains("no namespaces"),
        "{}",
        refused.message
    );
}

#[test]
fn a_storage_grant_stays_as_it_is() {
    let (mut disks, blue) = (storage_class(), cluster(&["fast-disks"]));
    let mut claim = storage_claim(None);
    let admitted = ask(&claim, &blue, &[&disks], 0).unwrap();
    claim.status = Some(VFClaimStatus {
        admitted: Some(admitted.clone()),
        ..VFClaimStatus::default()
    });
    claim.metadata.generation = Some(2);
    disks.spec.storage = None;
    let again = ask(&claim, &blue, &[&disks], 0).unwrap();
    assert_eq!((again.storage, again.network), (admitted.storage, None));
    assert_eq!(again.observed_generation, 2);
    claim.spec.network = Some(wish());
    let refused = ask(&claim, &blue, &[&disks], 0).unwrap_err();
    assert_eq!(refused.reason, reason::OVERRIDE_NOT_ALLOWED);
}

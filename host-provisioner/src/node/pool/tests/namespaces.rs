//! Which namespace a claim gets, and that nobody gets one of somebody else.

use super::*;
use crate::driver::{NamespaceUser, Namespaces};
use crate::kernel::Storage;
use crate::kernel::fake::nvme_pf;

const PF: &str = "0000:04:00.0";

fn disks(vfs: u16, namespaces: &[(u32, &[NamespaceUser])]) -> PfInput {
    let facts = nvme_pf(PF.parse().unwrap());
    let kernel = FakeKernel::new([facts.clone()]);
    kernel.set_num_vfs(facts.address, vfs).unwrap();
    let namespaces: Namespaces = namespaces
        .iter()
        .map(|(nsid, users)| (*nsid, users.to_vec()))
        .collect();
    PfInput {
        name: "node-4".to_owned(),
        facts: kernel.physical_function(facts.address).unwrap(),
        vfs: kernel.virtual_functions(facts.address).unwrap(),
        namespaces,
        ..input(PF1, 0)
    }
}

fn asks_for(name: &str, namespaces: &[u32]) -> Wish {
    Wish {
        config: VfConfig::of_storage(Storage::Nothing),
        namespaces: Some(namespaces.to_vec()),
        ..wish(name)
    }
}

fn has(name: &str, vf_index: u16, namespace: u32) -> Holder {
    Holder {
        mac: None,
        namespace: Some(namespace),
        ..holder(name, vf_index)
    }
}

#[test]
fn the_first_free_one_of_those_that_it_may_have_is_taken() {
    let mut pool = disks(4, &[(1, &[]), (2, &[]), (3, &[]), (4, &[])]);
    let choice = choose(&[PfView::new(pool.clone())], &asks_for("a", &[2, 3])).unwrap();
    assert_eq!((choice.namespace, choice.vf_index), (Some(2), 0));
    // By claim, not by what the kernel shows: that one is not attached yet.
    pool.holders = vec![has("a", 0, 2)];
    let again = choose(&[PfView::new(pool.clone())], &asks_for("a", &[2, 3])).unwrap();
    assert_eq!((again.namespace, again.vf_index), (Some(2), 0));
    let next = choose(&[PfView::new(pool.clone())], &asks_for("b", &[2, 3])).unwrap();
    assert_eq!((next.namespace, next.vf_index), (Some(3), 1));
    // So also while the VFs are still to be made.
    let none = disks(0, &[(2, &[])]);
    let made = choose(&[PfView::new(none)], &asks_for("a", &[2])).unwrap();
    assert_eq!((made.namespace, made.create), (Some(2), Some(4)));
}

#[test]
fn one_of_somebody_else_is_refused_with_its_reason() {
    let mut pool = disks(
        4,
        &[
            (1, &[]),
            (2, &[NamespaceUser::Vf(3)]),
            (3, &[NamespaceUser::Controller(0)]),
        ],
    );
    pool.holders = vec![has("b", 0, 1)];
    let (why, words) = refused(pool, &asks_for("a", &[1, 2, 3, 9]));
    assert_eq!(why, reason::NO_FREE_NAMESPACE);
    for expected in [
        "1 held by guest-a/b",
        "2, 3 attached to a controller without a claim",
        "9 not there",
    ] {
        assert!(words.contains(expected), "{words}");
    }
}

#[test]
fn a_vf_whose_controller_still_has_a_namespace_is_nobodys() {
    let pool = disks(4, &[(1, &[NamespaceUser::Vf(0)]), (2, &[])]);
    let view = PfView::new(pool);
    assert_eq!(view.vfs[0].foreign, Some(ForeignReason::Namespace(1)));
    let choice = choose(&[view], &asks_for("a", &[2])).unwrap();
    assert_eq!(choice.vf_index, 1);
}

#[test]
fn network_claims_get_no_disk_and_storage_claims_no_network_card() {
    let (why, words) = refused(disks(4, &[(1, &[])]), &wish("a"));
    assert_eq!(why, reason::UNSUPPORTED_SETTING);
    assert!(
        words.contains("driver nvme cannot set what a network"),
        "{words}"
    );
    let (why, words) = refused(input(PF1, 7), &asks_for("a", &[1]));
    assert_eq!(why, reason::UNSUPPORTED_SETTING);
    assert!(
        words.contains("driver igb cannot set a namespace"),
        "{words}"
    );
}

#[test]
fn a_grant_is_of_one_kind() {
    let network = GrantedNetwork {
        mac_address: "02:00:00:00:00:01".into(),
        vlan: None,
        spoof_check: true,
        trust: false,
        link_state: LinkState::Auto,
        min_tx_rate_mbps: None,
        max_tx_rate_mbps: None,
    };
    let storage = GrantedStorage {
        namespaces: vec![1],
    };
    let granted = |network: Option<&GrantedNetwork>, storage: Option<&GrantedStorage>, nsid| {
        let admitted = Admitted {
            observed_generation: 1,
            class_name: "c".into(),
            class_uid: "u".into(),
            pf_selector: PfSelector::default(),
            num_vfs: None,
            reclaim_policy: ReclaimPolicy::Return,
            placement: Placement::Pack,
            network: network.cloned(),
            storage: storage.cloned(),
        };
        granted_config(&admitted, nsid).map(|config| config.storage)
    };
    assert_eq!(granted(Some(&network), None, None), Ok(Storage::Foreign));
    assert_eq!(granted(None, Some(&storage), None), Ok(Storage::Nothing));
    assert_eq!(
        granted(None, Some(&storage), Some(1)),
        Ok(Storage::Namespace(1))
    );
    for (network, storage, nsid) in [
        (None, None, None),
        (Some(&network), Some(&storage), None),
        (Some(&network), None, Some(1)),
    ] {
        assert_eq!(granted(network, storage, nsid), Err(GrantError::Kind));
    }
}

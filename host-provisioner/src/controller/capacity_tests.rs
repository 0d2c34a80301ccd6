use common::api::{
    ClaimRef, ClassNetwork, ClassStorage, NewCondition, PfSelector, PhysicalFunctionSpec,
    VfCapabilities, Vlan, WithheldReason, WithheldVf, set_condition,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use proptest::prelude::*;

use super::*;

/// A managed igb PF that serves, with seven VFs of which so many are free.
fn pf(node: &str, free: u16) -> PhysicalFunction {
    let spec = PhysicalFunctionSpec {
        node_name: node.to_owned(),
        managed: true,
        ..PhysicalFunctionSpec::default()
    };
    let mut pf = PhysicalFunction::new(&format!("{node}-1"), spec);
    let mut status = PhysicalFunctionStatus {
        pci_address: Some("0000:01:00.0".into()),
        vendor_id: Some("8086".into()),
        device_id: Some("10c9".into()),
        driver: Some("igb".into()),
        interface_name: Some("ens1f0".into()),
        total_vfs: 7,
        num_vfs: 7,
        capabilities: Some(VfCapabilities {
            vlan: true,
            spoof_check: true,
            ..VfCapabilities::default()
        }),
        counts: VfCounts {
            free,
            attached: 7 - free.min(7),
            ..VfCounts::default()
        },
        ..PhysicalFunctionStatus::default()
    };
    let ready = NewCondition::new(type_::READY, ConditionStatus::True, "Ready", "words");
    let now = Time(Timestamp::UNIX_EPOCH);
    set_condition(&mut status.conditions, &ready, Some(1), &now);
    pf.status = Some(status);
    pf
}

/// A managed PF without VFs, of which so many are promised.
fn unmade(node: &str, promised: u16) -> PhysicalFunction {
    edited(pf(node, 0), |status| {
        status.num_vfs = 0;
        status.counts = VfCounts {
            allocated: promised,
            ..VfCounts::default()
        };
    })
}

fn edited(
    mut pf: PhysicalFunction,
    edit: impl FnOnce(&mut PhysicalFunctionStatus),
) -> PhysicalFunction {
    edit(pf.status.as_mut().unwrap());
    pf
}

fn class(edit: impl FnOnce(&mut VFClassSpec)) -> VFClass {
    let mut class = VFClass::new("gold", VFClassSpec::default());
    edit(&mut class.spec);
    class.metadata.uid = Some("uid-gold".to_owned());
    class.metadata.generation = Some(3);
    class
}

fn nodes() -> Nodes {
    let label = |rack: &str| BTreeMap::from([("rack".to_owned(), rack.to_owned())]);
    [("a".to_owned(), label("1")), ("b".to_owned(), label("2"))].into()
}

/// The total, and each node's.
fn left_of(class: &VFClass, pfs: &[PhysicalFunction]) -> (u32, Vec<(String, u32)>) {
    let status = capacity(class, &pfs.iter().collect::<Vec<_>>(), &nodes());
    assert_eq!(status.observed_generation, Some(3));
    let each = status.nodes.into_iter().map(|n| (n.name, n.free));
    (status.free.unwrap(), each.collect())
}

fn free_of(class: &VFClass, pf: PhysicalFunction) -> u32 {
    left_of(class, &[pf]).0
}

#[test]
fn free_vfs_are_added_up_by_node() {
    let any = class(|_| {});
    let pfs = [pf("a", 3), pf("a", 2), pf("b", 0)];
    let each = vec![("a".to_owned(), 5), ("b".to_owned(), 0)];
    // A full node is told from one that has nothing for the class.
    assert_eq!(left_of(&any, &pfs), (5, each));
    assert_eq!(left_of(&any, &[]), (0, vec![]));
}

#[test]
fn of_namespaces_there_are_no_more_than_the_class_has() {
    let nvme = |free, attached| {
        edited(pf("a", 0), |status| {
            status.driver = Some("nvme".into());
            status.capabilities = Some(VfCapabilities {
                namespaces: true,
                ..VfCapabilities::default()
            });
            status.counts = VfCounts {
                free,
                attached,
                ..VfCounts::default()
            };
        })
    };
    let storage = class(|spec| {
        let namespaces = vec![1, 2, 3];
        spec.storage = Some(ClassStorage { namespaces });
    });
    assert_eq!(free_of(&storage, nvme(2, 0)), 2, "VFs");
    assert_eq!(free_of(&storage, nvme(5, 1)), 2, "namespaces");
    assert_eq!(free_of(&storage, nvme(5, 4)), 0);
    // A class is of one kind, and so is a PF.
    assert_eq!(free_of(&class(|_| {}), nvme(5, 0)), 0);
    assert_eq!(free_of(&storage, pf("a", 3)), 0);
}

#[test]
fn a_pf_that_serves_nobody_counts_for_nothing() {
    let any = class(|_| {});
    let mut unmanaged = pf("a", 3);
    unmanaged.spec.managed = false;
    let mut going = pf("a", 3);
    going.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    let mut silent = pf("a", 3);
    silent.status = None;
    for pf in [
        unmanaged,
        going,
        silent,
        // Its node is not of this cluster any more.
        pf("gone", 3),
        edited(pf("a", 3), |status| {
            status.conditions[0].status = "False".into()
        }),
        edited(pf("a", 3), |status| status.conditions.clear()),
        edited(pf("a", 3), |status| status.capabilities = None),
    ] {
        assert_eq!(
            left_of(&any, std::slice::from_ref(&pf)),
            (0, vec![]),
            "{pf:?}"
        );
    }
}

#[test]
fn the_selector_and_the_class_s_own_defaults_choose_the_pfs() {
    let pfs = [pf("a", 3), pf("b", 2)];
    let selects = |selector: PfSelector| left_of(&class(|c| c.pf_selector = selector), &pfs).0;
    let text = |text: &str| vec![text.to_owned()];
    assert_eq!(
        selects(PfSelector {
            drivers: text("igb"),
            ..PfSelector::default()
        }),
        5
    );
    assert_eq!(
        selects(PfSelector {
            drivers: text("ice"),
            ..PfSelector::default()
        }),
        0
    );
    assert_eq!(
        selects(PfSelector {
            vendor_ids: text("15b3"),
            ..PfSelector::default()
        }),
        0
    );
    assert_eq!(
        selects(PfSelector {
            device_ids: text("10c9"),
            ..PfSelector::default()
        }),
        5
    );
    let address = text("0000:02:00.0");
    assert_eq!(
        selects(PfSelector {
            pci_addresses: address,
            ..PfSelector::default()
        }),
        0
    );
    let interface_names = text("ens1f0");
    assert_eq!(
        selects(PfSelector {
            interface_names,
            ..PfSelector::default()
        }),
        5
    );
    let node_selector = BTreeMap::from([("rack".to_owned(), "2".to_owned())]);
    assert_eq!(
        selects(PfSelector {
            node_selector,
            ..PfSelector::default()
        }),
        2
    );

    let vlan = Some(Vlan {
        id: 5,
        ..Vlan::default()
    });
    let tagged = class(|c| {
        c.network = ClassNetwork {
            vlan,
            ..ClassNetwork::default()
        }
    });
    assert_eq!(free_of(&tagged, pf("a", 3)), 3);
    let plain = edited(pf("a", 3), |status| {
        status.capabilities = Some(VfCapabilities {
            spoof_check: true,
            ..VfCapabilities::default()
        });
    });
    assert_eq!(left_of(&tagged, &[plain]), (0, vec![]));
}

#[test]
fn an_idle_pf_counts_with_what_it_would_be_given() {
    let any = class(|_| {});
    assert_eq!(free_of(&any, unmade("a", 0)), 7);
    assert_eq!(free_of(&any, unmade("a", 2)), 5);
    let few = class(|c| c.num_vfs = Some(4));
    assert_eq!(free_of(&few, unmade("a", 1)), 3);
    let mut own = unmade("a", 0);
    own.spec.num_vfs = Some(2);
    assert_eq!(free_of(&few, own.clone()), 2);
    own.spec.num_vfs = Some(64);
    assert_eq!(free_of(&few, own.clone()), 7);
    own.spec.withheld = vec![WithheldVf {
        vf_index: 0,
        reason: WithheldReason::Retained,
        claim: ClaimRef {
            namespace: "n".into(),
            name: "c".into(),
            uid: "u".into(),
        },
    }];
    assert_eq!(free_of(&few, own), 6);
    // Once there are some, it is what there is.
    assert_eq!(free_of(&few, pf("a", 6)), 6);
}

#[test]
fn of_many_nodes_those_with_the_most_are_named_and_all_are_counted() {
    let many: Vec<String> = (0..1030).map(|n| format!("n{n:04}")).collect();
    let pfs: Vec<PhysicalFunction> = many
        .iter()
        .enumerate()
        .map(|(n, name)| pf(name, if n < 6 { 0 } else { 1 }))
        .collect();
    let nodes: Nodes = many
        .iter()
        .map(|name| (name.clone(), BTreeMap::new()))
        .collect();
    let status = capacity(&class(|_| {}), &pfs.iter().collect::<Vec<_>>(), &nodes);
    assert_eq!((status.free, status.nodes.len()), (Some(1024), 1024));
    assert_eq!(status.nodes[0].name, "n0006");
    assert!(status.nodes.is_sorted_by(|a, b| a.name < b.name));
}

#[test]
fn a_class_that_is_going_is_not_counted() {
    let gold = class(|_| {});
    let mut going = class(|_| {});
    going.metadata.uid = Some("uid-going".to_owned());
    going.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    let counted = capacities(&[&gold, &going], &[&pf("a", 3)], &nodes());
    assert_eq!(totals(&counted), [("uid-gold".to_owned(), 3)].into());
}

proptest! {
    /// In whatever order the objects come the answer is the same, and the nodes' numbers add up.
    #[test]
    fn the_numbers_add_up(
        frees in proptest::collection::vec((any::<bool>(), 0_u16..=7, any::<bool>()), 0..12),
        turn in 0_usize..12,
    ) {
        let pfs: Vec<PhysicalFunction> = frees
            .iter()
            .map(|(first, free, made)| {
                let node = if *first { "a" } else { "b" };
                if *made { pf(node, *free) } else { unmade(node, *free) }
            })
            .collect();
        let any = class(|_| {});
        let (total, each) = left_of(&any, &pfs);
        prop_assert_eq!(each.iter().map(|(_, n)| n).sum::<u32>(), total);
        let expected: u32 = frees
            .iter()
            .map(|(_, free, made)| u32::from(if *made { *free } else { 7 - *free }))
            .sum();
        prop_assert_eq!(total, expected);
        let mut turned = pfs.clone();
        turned.rotate_left(turn.min(pfs.len()));
        prop_assert_eq!(left_of(&any, &turned), (total, each));
    }
}

//! Names, reports and their words.

use common::api::{ClaimRef, VfState, condition};

use super::*;
use crate::kernel::fake::{FakeKernel, igb_pf};
use crate::kernel::{Eswitch, Kernel as _, MacAddr};
use crate::node::pool::{Holder, PfInput};

fn now() -> Time {
    Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH)
}

fn facts() -> PfFacts {
    igb_pf("0000:01:00.0".parse().unwrap())
}

fn input(vfs: u16) -> PfInput {
    let kernel = FakeKernel::new([facts()]);
    kernel.set_num_vfs(facts().address, vfs).unwrap();
    PfInput {
        name: "node-1".to_owned(),
        facts: kernel.physical_function(facts().address).unwrap(),
        vfs: kernel.virtual_functions(facts().address).unwrap(),
        managed: true,
        desired: None,
        withheld: Vec::new(),
        resize: None,
        resizing: false,
        holders: Vec::new(),
        probes: BTreeMap::new(),
        macs: BTreeMap::new(),
        namespaces: BTreeMap::new(),
        stuck: BTreeMap::new(),
    }
}

fn report(input: PfInput) -> PhysicalFunctionStatus {
    function_status(&PfView::new(input), about(&[]), &now())
}

fn about(conditions: &[Condition]) -> About<'_> {
    About {
        conditions,
        generation: Some(1),
        resize_failed: None,
    }
}

fn ready_of(status: &PhysicalFunctionStatus) -> (&str, &str, &str) {
    let ready = condition(&status.conditions, type_::READY).unwrap();
    (&ready.status, &ready.reason, &ready.message)
}

#[test]
fn a_name_is_the_nodes_and_the_identitys() {
    let name = physical_function_name("node-a", "8086:10c9 mac 52:54:00:00:01:01");
    assert_eq!(name.len(), "node-a-".len() + 8);
    assert!(name.starts_with("node-a-"), "{name}");
    assert_eq!(
        name,
        physical_function_name("node-a", "8086:10c9 mac 52:54:00:00:01:01")
    );
    assert_ne!(
        name,
        physical_function_name("node-a", "8086:10c9 mac 52:54:00:00:01:02")
    );
    // Known once and for all: administrators' consent hangs on it.
    assert_eq!(physical_function_name("n", ""), "n-e3b0c442");
    let long = physical_function_name(&format!("{}.{}", "a".repeat(243), "b".repeat(9)), "x");
    assert!(long.len() <= 253 && !long.contains(".-"), "{long}");
}

#[test]
fn an_identity_outlives_renumbering() {
    let moved = |facts: &PfFacts| PfFacts {
        address: "0000:05:00.0".parse().unwrap(),
        ..facts.clone()
    };
    let serial = PfFacts {
        serial: Some("525400ffff000101".to_owned()),
        ..facts()
    };
    assert_eq!(serial.identify(), moved(&serial).identify());
    assert_eq!(facts().identify(), moved(&facts()).identify());
    let bare = PfFacts {
        permanent_mac: None,
        slot: Some("3-1".to_owned()),
        ..facts()
    };
    assert_eq!(bare.identify(), moved(&bare).identify());
    // Two ports of one card share its serial number.
    let second = PfFacts {
        address: "0000:01:00.1".parse().unwrap(),
        ..serial.clone()
    };
    assert_ne!(serial.identify(), second.identify());
    assert_ne!(serial.identify(), facts().identify());
}

#[test]
fn each_function_gets_an_object_and_twins_get_none() {
    let other = igb_pf("0000:02:00.0".parse().unwrap());
    let found = inventory("node-a", &[facts(), other.clone()]);
    assert_eq!((found.functions.len(), found.left_out.len()), (2, 0));
    let twin = PfFacts {
        address: "0000:03:00.0".parse().unwrap(),
        ..facts()
    };
    let found = inventory("node-a", &[facts(), other.clone(), twin]);
    let kept: Vec<&PfFacts> = found.functions.values().collect();
    assert_eq!(kept, [&other]);
    let words = found.left_out.join("");
    assert!(words.contains("0000:01:00.0 and 0000:03:00.0"), "{words}");
}

#[test]
fn a_card_that_cannot_say_who_it_is_waits_for_its_driver() {
    let bare = PfFacts {
        driver: None,
        mac: None,
        permanent_mac: None,
        interface: None,
        serial: None,
        ..igb_pf("0000:01:00.0".parse().unwrap())
    };
    let found = inventory("node-a", std::slice::from_ref(&bare));
    assert!(found.functions.is_empty());
    let words = found.left_out.join("");
    assert!(
        words.contains("0000:01:00.0 (8086:10c9)") && words.contains("HostDriver"),
        "{words}"
    );
    // A serial number is one with any driver or none.
    let serial = PfFacts {
        serial: Some("525400ffff000101".into()),
        ..bare.clone()
    };
    assert_eq!(
        inventory("node-a", std::slice::from_ref(&serial))
            .functions
            .len(),
        1
    );
    // A node with other cards is no worse for it.
    let found = inventory("node-a", &[serial, bare]);
    assert_eq!((found.functions.len(), found.left_out.len()), (1, 0));
}

#[test]
fn a_new_object_is_not_managed() {
    let spec = new_spec("node-a", &facts());
    assert!(!spec.managed && spec.num_vfs.is_none());
    assert_eq!(
        (spec.node_name.as_str(), spec.identity),
        ("node-a", facts().identity)
    );
}

#[test]
fn what_can_be_set_is_not_said_of_a_driver_that_nobody_knows() {
    let mut pool = input(0);
    pool.facts.driver = Some("sfc".to_owned());
    assert_eq!(report(pool).capabilities, None);
}

#[test]
fn a_report_shows_the_pool() {
    let mut pool = input(7);
    pool.vfs[1].driver = Some("igbvf".to_owned());
    pool.facts.numa_node = Some(1);
    pool.holders = vec![Holder {
        claim: ClaimRef {
            namespace: "guest-a".to_owned(),
            name: "c".to_owned(),
            uid: "u".to_owned(),
        },
        vm_uid: "vm-1".to_owned(),
        vf_index: 0,
        mac: Some(MacAddr([2, 0, 0, 0, 0, 1])),
        namespace: None,
        attached: true,
    }];
    let status = report(pool);
    assert_eq!(status.pci_address.as_deref(), Some("0000:01:00.0"));
    assert_eq!(status.vendor_id.as_deref(), Some("8086"));
    assert_eq!(status.mac_address.as_deref(), Some("52:54:00:00:01:01"));
    assert_eq!((status.total_vfs, status.num_vfs), (7, 7));
    assert_eq!(status.numa_node, Some(1));
    assert_eq!(
        (
            status.counts.free,
            status.counts.attached,
            status.counts.foreign
        ),
        (5, 1, 1)
    );
    let can = status.capabilities.unwrap();
    assert!(can.vlan && can.trust && !can.link_disable && !can.vlan_8021ad);
    assert_eq!(can.max_tx_rate_from_mbps, Some(1));
    assert_eq!(status.vfs.len(), 7);
    assert_eq!(status.vfs[0].state, VfState::Attached);
    assert_eq!(status.vfs[0].claim_ref.as_ref().unwrap().name, "c");
    assert_eq!(status.vfs[1].state, VfState::Foreign);
    let (is, reason, words) = ready_of(&status);
    assert_eq!((is, reason), ("True", reason::READY));
    assert!(words.contains("7 of 7 VFs exist: 5 free"), "{words}");
}

#[test]
fn readiness_gives_the_reason() {
    let in_use = |pool: &mut PfInput| {
        pool.facts.in_use_by_host = Some("default route via ens1f0".to_owned());
    };
    type Edit = fn(&mut PfInput);
    let edits: [(Edit, &str, &str); 7] = [
        (
            |pool| pool.facts.eswitch = Some(Eswitch::Switchdev),
            reason::UNSUPPORTED_DRIVER,
            "mode legacy",
        ),
        (
            |pool| pool.managed = false,
            reason::NOT_MANAGED,
            "spec.managed",
        ),
        (in_use, reason::IN_USE_BY_HOST, "managed is set and refused"),
        (
            |pool| pool.facts.driver = None,
            reason::UNSUPPORTED_DRIVER,
            "driver is none",
        ),
        (
            |pool| pool.facts.iommu_group = None,
            reason::NOT_ISOLATED,
            "intel_iommu=on",
        ),
        (
            |pool| {
                let port = "0000:00:1c.0".parse().unwrap();
                pool.vfs
                    .iter_mut()
                    .for_each(|vf| vf.group_members.push(port));
            },
            reason::NOT_ISOLATED,
            "0000:00:1c.0",
        ),
        (|pool| pool.desired = Some(99), reason::READY, "can have 7"),
    ];
    for (edit, reason, words) in edits {
        let mut pool = input(3);
        edit(&mut pool);
        let status = report(pool);
        let (_, found, message) = ready_of(&status);
        assert_eq!(found, reason);
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn an_unchanged_report_is_equal() {
    let first = report(input(7));
    let later = Time(k8s_openapi::jiff::Timestamp::from_second(60).unwrap());
    let view = PfView::new(input(7));
    assert_eq!(
        function_status(&view, about(&first.conditions), &later),
        first
    );
}

#[test]
fn an_object_without_hardware_says_so() {
    let gone = absent_status(&report(input(7)), Some(1), &now());
    assert_eq!((gone.num_vfs, gone.vfs.len(), gone.counts.free), (0, 0, 0));
    assert_eq!(ready_of(&gone).1, reason::NOT_PRESENT);
    assert_eq!(gone.pci_address.as_deref(), Some("0000:01:00.0"));
}

#[test]
fn a_node_says_what_it_lacks() {
    let able = NodeFacts {
        kernel_release: "6.12.0".to_owned(),
        boot_id: "boot".to_owned(),
        iommu_groups: 12,
        lockdown: None,
        vfio_pci: true,
        vfio_container: true,
    };
    let found = inventory("node-a", &[facts()]);
    assert_eq!(missing(&able, &found), Vec::<String>::new());
    let status = node_status(&able, &found, "0.1.0", &[], &now());
    assert_eq!(
        condition(&status.conditions, type_::READY).unwrap().status,
        "True"
    );
    assert!(status.iommu.enabled && status.iommu.groups == 12);

    let unable = NodeFacts::default();
    let lacks = missing(&unable, &Inventory::default());
    for words in [
        "intel_iommu=on",
        "modprobe vfio-pci",
        "vfio_iommu_type1",
        "SR-IOV",
    ] {
        assert!(
            lacks.iter().any(|lack| lack.contains(words)),
            "{words}: {lacks:?}"
        );
    }
    let status = node_status(&unable, &Inventory::default(), "0.1.0", &[], &now());
    let ready = condition(&status.conditions, type_::READY).unwrap();
    assert_eq!(ready.reason, reason::PREREQUISITES_MISSING);
}

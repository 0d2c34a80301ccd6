//! What is done to a VF, on a kernel that remembers every write and every device that was
//! pulled from under its user.

use common::api::DeviceStatus;

use super::*;
use crate::kernel::fake::{FakeKernel, Write, igb_pf, nvme_pf};
use crate::kernel::{MacAddr, Storage, TxRate, VlanTag};

const MAC: MacAddr = MacAddr([2, 0x5f, 0, 0, 0, 1]);

fn stage() -> (FakeKernel, PfFacts) {
    let pf = igb_pf("0000:01:00.0".parse().unwrap());
    let kernel = FakeKernel::new([pf.clone()]);
    (kernel, pf)
}

/// A PF with its seven VFs.
fn filled() -> (FakeKernel, PfFacts, VfFacts) {
    let (kernel, pf) = stage();
    create(&kernel, &pf, 7).unwrap();
    let vf = find(&kernel, &pf, 2).unwrap().unwrap();
    (kernel, pf, vf)
}

fn wanted() -> VfConfig {
    VfConfig {
        mac: MAC,
        vlan: Some(VlanTag::new(100, 0)),
        spoof_check: true,
        trust: true,
        ..VfConfig::CLEAN
    }
}

fn device(index: u16) -> DeviceStatus {
    serde_json::from_value(serde_json::json!({
        "nodeName": "n", "physicalFunction": "pf", "vfIndex": index,
    }))
    .unwrap()
}

#[test]
fn a_vf_goes_up_and_comes_back_as_it_was() {
    let (kernel, pf, vf) = filled();
    let before = look(&kernel, &pf, 2, &wanted()).unwrap();
    assert_eq!((before.vf, before.configured), (Vf::Driverless, false));

    let done = prepare(&kernel, &pf, &device(2), &wanted()).unwrap();
    assert_eq!(done.pci_address.as_deref(), Some(&*vf.address.to_string()));
    assert_eq!(done.iommu_group, vf.iommu_group);
    let up = look(&kernel, &pf, 2, &wanted()).unwrap();
    assert_eq!(
        (up.vf, up.configured, up.clean),
        (Vf::VfioFree, true, false)
    );
    assert_eq!(
        kernel.guest_mac(vf.address),
        Some(MAC),
        "set with the PF up"
    );

    clean(&kernel, &pf, 2, None).unwrap();
    let down = look(&kernel, &pf, 2, &wanted()).unwrap();
    assert_eq!((down.vf, down.clean), (Vf::Driverless, true));
    assert_eq!(kernel.violations(), Vec::<String>::new());
}

#[test]
fn a_vf_that_somebody_took_before_it_could_be_unbound_is_nobodys_until_he_lets_go() {
    let (kernel, pf, vf) = filled();
    prepare(&kernel, &pf, &device(2), &wanted()).unwrap();
    kernel.stick_next("unbind");
    let cleaned = clean(&kernel, &pf, 2, None);
    assert!(unless_stuck(cleaned).unwrap().is_none());
    let seen = look(&kernel, &pf, 2, &wanted()).unwrap();
    let Vf::Stuck(words) = &seen.vf else {
        panic!("{seen:?}")
    };
    assert!(words.contains(&vf.address.to_string()), "{words}");
    assert!(!seen.clean);
    // The kernel shows it without a driver all the while.
    let shown = find(&kernel, &pf, 2).unwrap().unwrap();
    assert_eq!(shown.driver, None);
    for refused in [
        prepare(&kernel, &pf, &device(2), &wanted()).unwrap_err(),
        clean(&kernel, &pf, 2, None).unwrap_err(),
    ] {
        assert!(
            matches!(refused, VfError::Hold(HoldError::Busy { .. })),
            "{refused}"
        );
    }

    kernel.stick(vf.address, false);
    let seen = look(&kernel, &pf, 2, &wanted()).unwrap();
    assert_eq!((seen.vf, seen.clean), (Vf::Driverless, true));
}

#[test]
fn a_pf_whose_count_does_not_come_back_keeps_its_vfs_from_everybody() {
    let (kernel, pf, _) = filled();
    kernel.stick(pf.address, true);
    for index in [2, 9] {
        let seen = look(&kernel, &pf, index, &wanted()).unwrap();
        assert!(matches!(seen.vf, Vf::Stuck(_)), "{seen:?}");
    }
}

#[test]
fn each_thing_is_written_once_and_the_function_reset_before_it_is_given_up() {
    let (kernel, pf, vf) = filled();
    prepare(&kernel, &pf, &device(2), &wanted()).unwrap();
    let before = kernel.writes().len();
    // What is so already is not written again: a restarted agent may ask twice. Whose the
    // function was meanwhile is not known, though.
    prepare(&kernel, &pf, &device(2), &wanted()).unwrap();
    assert_eq!(kernel.writes()[before..], [Write::Reset(vf.address)]);

    let before = kernel.writes().len();
    clean(&kernel, &pf, 2, None).unwrap();
    let after = kernel.writes().split_off(before);
    let reset = after.iter().position(|w| *w == Write::Reset(vf.address));
    let unbound = after.iter().position(|w| *w == Write::Unbind(vf.address));
    assert!(reset.is_some() && reset < unbound, "{after:?}");
}

#[test]
fn a_vf_that_somebody_holds_is_neither_prepared_nor_cleaned() {
    let (kernel, pf, vf) = filled();
    prepare(&kernel, &pf, &device(2), &wanted()).unwrap();
    let held = kernel.hold_group(vf.iommu_group.unwrap()).unwrap();
    let before = kernel.writes();
    let other = VfConfig {
        vlan: None,
        ..wanted()
    };
    for refused in [
        prepare(&kernel, &pf, &device(2), &other).map(drop),
        clean(&kernel, &pf, 2, None),
    ] {
        assert!(
            matches!(refused, Err(VfError::Hold(HoldError::Busy { .. }))),
            "{refused:?}"
        );
    }
    assert_eq!(look(&kernel, &pf, 2, &wanted()).unwrap().vf, Vf::VfioHeld);
    assert_eq!(kernel.writes(), before);
    drop(held);
    clean(&kernel, &pf, 2, None).unwrap();
    assert_eq!(kernel.violations(), Vec::<String>::new());
}

#[test]
fn another_drivers_vf_is_left_to_it() {
    let (kernel, pf, vf) = filled();
    kernel.give_driver(vf.address, Some("igbvf"));
    let before = kernel.writes();
    let seen = look(&kernel, &pf, 2, &wanted()).unwrap();
    assert_eq!(seen.vf, Vf::OtherDriver("igbvf".into()));
    assert!(prepare(&kernel, &pf, &device(2), &wanted()).is_err());
    assert!(clean(&kernel, &pf, 2, None).is_err());
    assert_eq!(kernel.writes(), before);
}

#[test]
fn a_group_with_a_stranger_is_refused_before_anything_is_written() {
    let (kernel, pf, _) = filled();
    kernel.without_isolation(pf.address);
    let before = kernel.writes();
    let refused = prepare(&kernel, &pf, &device(2), &wanted());
    assert!(
        matches!(refused, Err(VfError::NotIsolated(..))),
        "{refused:?}"
    );
    assert_eq!(kernel.writes(), before);
}

#[test]
fn an_absent_vf_is_seen_as_absent_and_an_error_to_touch() {
    let (kernel, pf) = stage();
    let seen = look(&kernel, &pf, 2, &wanted()).unwrap();
    assert_eq!((seen.vf, seen.clean), (Vf::Absent, true));
    for refused in [
        prepare(&kernel, &pf, &device(2), &wanted()).map(drop),
        clean(&kernel, &pf, 2, None),
    ] {
        assert!(
            matches!(refused, Err(VfError::NoVf { index: 2, .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn fewer_vfs_than_asked_for_are_an_error_though_the_write_succeeded() {
    let (kernel, pf) = stage();
    kernel.make_at_most(pf.address, 3);
    let error = create(&kernel, &pf, 7).unwrap_err();
    assert!(error.to_string().contains('3'), "{error}");
}

#[test]
fn a_cleaning_that_failed_half_way_can_be_done_again() {
    let (kernel, pf, vf) = filled();
    prepare(&kernel, &pf, &device(2), &wanted()).unwrap();
    for call in ["set_vf_config", "reset_function", "unbind"] {
        kernel.fail_next(call, libc::EIO);
        assert!(clean(&kernel, &pf, 2, None).is_err(), "{call}");
        let seen = look(&kernel, &pf, 2, &wanted()).unwrap();
        assert!(!seen.clean, "after {call}: {seen:?}");
    }
    clean(&kernel, &pf, 2, None).unwrap();
    assert!(look(&kernel, &pf, 2, &wanted()).unwrap().clean);
    assert_eq!(find(&kernel, &pf, 2).unwrap().unwrap().driver, None);
    assert_eq!(kernel.guest_mac(vf.address), None);
}

#[test]
fn a_driver_without_a_backend_is_named() {
    let (kernel, pf) = stage();
    let pf = PfFacts {
        driver: Some("tg3".into()),
        ..pf
    };
    let error = create(&kernel, &pf, 1).unwrap_err().to_string();
    assert!(error.contains("tg3"), "{error}");
}

/// What the link's new speed made igb forget is set again; what the new speed does not allow
/// is refused in words.
#[test]
fn a_rate_that_the_link_forgot_is_set_again_as_far_as_it_goes() {
    let (kernel, pf, _) = filled();
    let limited = VfConfig {
        rate: TxRate { min: 0, max: 100 },
        ..wanted()
    };
    prepare(&kernel, &pf, &device(2), &limited).unwrap();
    let up = kernel.physical_function(pf.address).unwrap();
    assert_eq!(drift(&kernel, &up, 2, &limited).unwrap(), None);
    kernel.give_link(pf.address, 100);
    let forgotten = drift(&kernel, &up, 2, &limited).unwrap().unwrap();
    assert_eq!(forgotten.settings, ["transmit rate"]);
    repair(&kernel, &up, 2, &limited).unwrap();
    assert_eq!(drift(&kernel, &up, 2, &limited).unwrap(), None);
    kernel.give_link(pf.address, 10);
    let refused = repair(&kernel, &up, 2, &limited).unwrap_err();
    assert!(
        refused.to_string().contains("up to the link's speed"),
        "{refused}"
    );
}

/// What a guest does to its VF of an ice or i40e, or a change of ours, must not make its claim
/// look disturbed.
#[test]
fn a_vf_that_is_being_reset_is_read_when_it_is_back() {
    let (_, igb) = stage();
    let pf = PfFacts {
        driver: Some("ice".to_owned()),
        ..igb
    };
    let kernel = FakeKernel::new([pf.clone()]);
    create(&kernel, &pf, 2).unwrap();
    let vf = find(&kernel, &pf, 1).unwrap().unwrap();
    kernel.slow_resets(pf.address, 2);
    let up = kernel.physical_function(pf.address).unwrap();
    prepare(&kernel, &pf, &device(1), &wanted()).unwrap();
    kernel.reset_function(vf.address).unwrap();
    assert!(kernel.vf_config(&pf, 1).is_err(), "the kernel says nothing");
    assert_eq!(drift(&kernel, &up, 1, &wanted()).unwrap(), None);
    // One that there is not is said at once.
    let gone = settings(&kernel, &pf, 5).unwrap_err();
    assert!(matches!(
        gone,
        VfError::Kernel(KernelError::NoSuchVf { index: 5, .. })
    ));
}

/// An edit of an attached claim reaches the VF as a repair does: what differs is written and
/// nothing else, and its group is never touched.
#[test]
fn granted_anew_only_what_differs_is_written() {
    let (kernel, pf, vf) = filled();
    let before = VfConfig {
        trust: false,
        ..wanted()
    };
    prepare(&kernel, &pf, &device(2), &before).unwrap();
    let _guest = kernel.hold_group(vf.iommu_group.unwrap()).unwrap();
    let written = kernel.writes().len();
    let after = VfConfig {
        vlan: Some(VlanTag::new(200, 3)),
        trust: true,
        rate: TxRate { min: 0, max: 500 },
        ..before
    };
    let up = kernel.physical_function(pf.address).unwrap();
    assert_eq!(
        drift(&kernel, &up, 2, &after).unwrap().unwrap().settings,
        ["VLAN", "trust", "transmit rate"]
    );
    repair(&kernel, &up, 2, &after).unwrap();
    let settings: Vec<String> = kernel.writes()[written..]
        .iter()
        .map(|write| match write {
            Write::VfSetting { setting, value, .. } => format!("{setting} {value}"),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        settings,
        [
            "VLAN 200 qos 3",
            "trust on",
            "transmit rate min none, max 500 Mbit/s"
        ]
    );
    assert_eq!(kernel.violations(), Vec::<String>::new());
}

#[test]
fn a_namespace_goes_up_and_comes_back_empty() {
    let pf = nvme_pf("0000:04:00.0".parse().unwrap());
    let kernel = FakeKernel::new([pf.clone()]);
    kernel.give_namespaces(pf.address, [1, 2]);
    create(&kernel, &pf, 4).unwrap();
    let want = VfConfig::of_storage(Storage::Namespace(2));
    let before = look(&kernel, &pf, 2, &want).unwrap();
    assert!(before.clean && !before.configured);
    prepare(&kernel, &pf, &device(2), &want).unwrap();
    let up = look(&kernel, &pf, 2, &want).unwrap();
    assert_eq!(
        (up.vf, up.configured, up.clean),
        (Vf::VfioFree, true, false)
    );
    assert_eq!(drift(&kernel, &pf, 2, &want).unwrap(), None);
    kernel.write_namespace(pf.address, 2, 100, b"a guest's");
    // Somebody resets the card: what can be is repaired, with the data as they were.
    kernel.reset_controller(pf.address);
    let drifted = drift(&kernel, &pf, 2, &want).unwrap().unwrap();
    assert_eq!(
        drifted.to_string(),
        "its namespace was not as granted: the kernel had a controller that is offline"
    );
    repair(&kernel, &pf, 2, &want).unwrap();
    assert_eq!(drift(&kernel, &pf, 2, &want).unwrap(), None);
    assert_eq!(kernel.namespace(pf.address, 2)[100..109], *b"a guest's");
    clean(&kernel, &pf, 2, Some(2)).unwrap();
    let down = look(&kernel, &pf, 2, &want).unwrap();
    assert!(down.clean && down.vf == Vf::Driverless, "{down:?}");
    assert!(
        kernel
            .namespace(pf.address, 2)
            .iter()
            .all(|byte| *byte == 0)
    );
    resize(&kernel, &pf, 2).unwrap();
    assert_eq!(kernel.violations(), [""; 0]);
}

#[test]
fn a_namespace_is_erased_also_when_its_vf_has_gone() {
    let pf = nvme_pf("0000:04:00.0".parse().unwrap());
    let kernel = FakeKernel::new([pf.clone()]);
    kernel.give_namespaces(pf.address, [1, 2]);
    create(&kernel, &pf, 4).unwrap();
    let want = VfConfig::of_storage(Storage::Namespace(2));
    prepare(&kernel, &pf, &device(2), &want).unwrap();
    kernel.write_namespace(pf.address, 2, 100, b"a guest's");
    // QEMU forgets the attachment with the VFs; the claim has not forgotten its namespace.
    kernel.reboot();
    let gone = look(&kernel, &pf, 2, &want).unwrap();
    assert_eq!(gone.vf, Vf::Absent);
    clean(&kernel, &pf, 2, Some(2)).unwrap();
    let empty = |nsid| {
        kernel
            .namespace(pf.address, nsid)
            .iter()
            .all(|byte| *byte == 0)
    };
    assert!(empty(2));
    // Nor when the VFs were made anew.
    create(&kernel, &pf, 4).unwrap();
    kernel.write_namespace(pf.address, 1, 100, b"a guest's");
    clean(&kernel, &pf, 0, Some(1)).unwrap();
    assert!(empty(1));
    // One that another controller has by now is another's.
    let other = VfConfig::of_storage(Storage::Namespace(1));
    prepare(&kernel, &pf, &device(3), &other).unwrap();
    kernel.write_namespace(pf.address, 1, 100, b"another's");
    let error = clean(&kernel, &pf, 0, Some(1)).unwrap_err();
    assert!(
        error.to_string().contains("controller 4 as well"),
        "{error}"
    );
    assert!(!empty(1));
}

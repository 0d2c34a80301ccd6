//! Tables and properties of the pool.

mod properties;

use common::api::reason;

use super::*;
use crate::kernel::fake::{FakeKernel, igb_pf};
use crate::kernel::{Kernel as _, MacAddr, VfFacts};

pub(super) const PF1: &str = "0000:01:00.0";
pub(super) const PF2: &str = "0000:02:00.0";

pub(super) fn mac(last: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, last])
}

pub(super) fn claim(name: &str) -> ClaimRef {
    ClaimRef {
        namespace: "guest-a".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-{name}"),
    }
}

pub(super) fn wish(name: &str) -> Wish {
    Wish {
        claim: claim(name),
        vm_uid: "vm-1".to_owned(),
        selector: PfSelector::default(),
        node_labels: BTreeMap::new(),
        config: VfConfig {
            mac: mac(0xaa),
            ..VfConfig::CLEAN
        },
        num_vfs: None,
    }
}

pub(super) fn holder(name: &str, vf_index: u16) -> Holder {
    Holder {
        claim: claim(name),
        vm_uid: "vm-1".to_owned(),
        vf_index,
        mac: Some(mac(u8::try_from(vf_index).unwrap())),
        attached: false,
    }
}

/// What a managed igb PF is made of, with this many VFs existing, driverless.
pub(super) fn input(pf: &str, vfs: u16) -> PfInput {
    let facts = igb_pf(pf.parse().unwrap());
    let kernel = FakeKernel::new([facts.clone()]);
    kernel.set_num_vfs(facts.address, vfs).unwrap();
    PfInput {
        name: format!("node-{}", facts.address.bus()),
        facts: kernel.physical_function(facts.address).unwrap(),
        vfs: kernel.virtual_functions(facts.address).unwrap(),
        managed: true,
        desired: None,
        holders: Vec::new(),
        probes: BTreeMap::new(),
        macs: BTreeMap::new(),
    }
}

fn on(vf: &mut VfFacts, driver: &str) -> u32 {
    vf.driver = Some(driver.to_owned());
    vf.iommu_group.unwrap()
}

/// The reason and message of the refusal by one PF.
fn refused(input: PfInput, wish: &Wish) -> (&'static str, String) {
    let error = choose(&[PfView::new(input)], wish).unwrap_err();
    (error.reason(), error.message())
}

#[test]
fn an_empty_pool_is_made_whole_and_its_first_vf_taken() {
    let choice = choose(&[PfView::new(input(PF1, 0))], &wish("a")).unwrap();
    let expected = Choice {
        physical_function: "node-1".to_owned(),
        pf: PF1.parse().unwrap(),
        vf_index: 0,
        address: None,
        create: Some(7),
    };
    assert_eq!(choice, expected);
}

#[test]
fn the_size_of_a_new_pool_is_the_pfs_wish_then_the_classs() {
    for (pf, class, count) in [
        (None, None, 7),
        (None, Some(4), 4),
        (Some(2), Some(4), 2),
        (Some(64), None, 7),
    ] {
        let mut pool = input(PF1, 0);
        pool.desired = pf;
        let wish = Wish {
            num_vfs: class,
            ..wish("a")
        };
        let choice = choose(&[PfView::new(pool)], &wish).unwrap();
        assert_eq!(choice.create, Some(count), "{pf:?} {class:?}");
    }
}

#[test]
fn an_existing_free_vf_is_taken_as_it_is() {
    let mut pool = input(PF1, 7);
    pool.holders = vec![holder("b", 0), holder("c", 2)];
    let choice = choose(&[PfView::new(pool)], &wish("a")).unwrap();
    assert_eq!((choice.vf_index, choice.create), (1, None));
    assert_eq!(choice.address, Some("0000:01:10.2".parse().unwrap()));
}

#[test]
fn a_vf_that_is_bound_already_goes_first() {
    let mut pool = input(PF1, 7);
    let group = on(&mut pool.vfs[5], VFIO_PCI);
    pool.probes.insert(group, GroupProbe::Free);
    let choice = choose(&[PfView::new(pool)], &wish("a")).unwrap();
    assert_eq!(choice.vf_index, 5);
}

#[test]
fn a_claim_keeps_the_vf_that_it_has() {
    let mut pool = input(PF1, 7);
    pool.holders = vec![holder("b", 0), holder("a", 3)];
    // Even when nothing more may be taken from this PF.
    pool.managed = false;
    let other = PfView::new(input(PF2, 7));
    let choice = choose(&[other, PfView::new(pool)], &wish("a")).unwrap();
    assert_eq!((choice.vf_index, choice.create), (3, None));
}

#[test]
fn a_promised_vf_is_taken_though_none_exists_yet() {
    let mut pool = input(PF1, 0);
    pool.holders = vec![holder("b", 0)];
    let choice = choose(&[PfView::new(pool.clone())], &wish("a")).unwrap();
    assert_eq!((choice.vf_index, choice.create), (1, Some(7)));
    // And the claim that it was promised to is told to make it.
    let choice = choose(&[PfView::new(pool)], &wish("b")).unwrap();
    assert_eq!((choice.vf_index, choice.create), (0, Some(7)));
}

#[test]
fn after_a_restart_of_the_host_enough_vfs_are_made_for_every_claim() {
    let mut pool = input(PF1, 0);
    pool.desired = Some(2);
    pool.holders = vec![holder("a", 5)];
    let choice = choose(&[PfView::new(pool)], &wish("a")).unwrap();
    assert_eq!((choice.vf_index, choice.create), (5, Some(6)));
}

#[test]
fn the_fuller_pf_goes_first_and_making_vfs_is_last() {
    let mut fuller = input(PF2, 7);
    fuller.holders = vec![holder("b", 0)];
    let empty = PfView::new(input(PF1, 7));
    let choice = choose(&[empty, PfView::new(fuller)], &wish("a")).unwrap();
    assert_eq!(choice.physical_function, "node-2");
    let unmade = PfView::new(input(PF1, 0));
    let made = PfView::new(input(PF2, 7));
    let choice = choose(&[unmade, made], &wish("a")).unwrap();
    assert_eq!(choice.physical_function, "node-2");
}

#[test]
fn a_selector_takes_what_all_its_fields_say() {
    let facts = igb_pf(PF1.parse().unwrap());
    let labels = BTreeMap::from([("rack".to_owned(), "1".to_owned())]);
    let list = |text: &str| vec!["other".to_owned(), text.to_owned()];
    let all = PfSelector {
        drivers: list("igb"),
        vendor_ids: list("8086"),
        device_ids: list("10c9"),
        pci_addresses: list(PF1),
        interface_names: list("ens1f0"),
        node_selector: labels.clone(),
    };
    assert!(selects(&PfSelector::default(), &BTreeMap::new(), &facts));
    assert!(selects(&all, &labels, &facts));
    assert!(!selects(&all, &BTreeMap::new(), &facts));
    let wrong = || vec!["other".to_owned()];
    let edits: [fn(&mut PfSelector, Vec<String>); 5] = [
        |selector, wrong| selector.drivers = wrong,
        |selector, wrong| selector.vendor_ids = wrong,
        |selector, wrong| selector.device_ids = wrong,
        |selector, wrong| selector.pci_addresses = wrong,
        |selector, wrong| selector.interface_names = wrong,
    ];
    for edit in edits {
        let mut selector = all.clone();
        edit(&mut selector, wrong());
        assert!(!selects(&selector, &labels, &facts), "{selector:?}");
    }
    let none = igb_pf(PF1.parse().unwrap());
    let none = PfFacts {
        interface: None,
        driver: None,
        ..none
    };
    assert!(!selects(&all, &labels, &none));
}

#[test]
fn no_matching_pf() {
    let selector = PfSelector {
        drivers: vec!["ixgbe".to_owned()],
        ..PfSelector::default()
    };
    let wish = Wish {
        selector,
        ..wish("a")
    };
    let (why, words) = refused(input(PF1, 7), &wish);
    assert_eq!(why, reason::NO_MATCHING_PF);
    assert!(words.contains("none of the 1 SR-IOV devices"), "{words}");
}

#[test]
fn not_managed() {
    let mut pool = input(PF1, 7);
    pool.managed = false;
    let (why, words) = refused(pool, &wish("a"));
    assert_eq!(why, reason::NOT_MANAGED);
    assert!(words.contains("spec.managed to true"), "{words}");
}

#[test]
fn the_nodes_own_pf_is_refused_though_it_is_managed() {
    for vfs in [0, 7] {
        let mut pool = input(PF1, vfs);
        pool.facts.in_use_by_host = Some("default route via ens1f0".to_owned());
        let (why, words) = refused(pool, &wish("a"));
        assert_eq!(why, reason::IN_USE_BY_HOST);
        assert!(words.contains("default route via ens1f0"), "{words}");
    }
}

#[test]
fn a_driver_without_a_backend_is_refused() {
    for driver in [None, Some("bnxt_en".to_owned())] {
        let mut pool = input(PF1, 7);
        pool.facts.driver = driver;
        assert_eq!(refused(pool, &wish("a")).0, reason::UNSUPPORTED_DRIVER);
    }
}

#[test]
fn a_setting_that_the_driver_does_not_have_is_refused() {
    let mut view = PfView::new(input(PF1, 7));
    view.capabilities.as_mut().unwrap().trust = false;
    let mut wish = wish("a");
    wish.config.trust = true;
    let error = choose(&[view], &wish).unwrap_err();
    assert_eq!(error.reason(), reason::UNSUPPORTED_SETTING);
    assert!(error.message().contains("cannot set trust"), "{error:?}");
}

#[test]
fn a_mac_in_use_on_the_pf_is_refused_and_another_pf_serves() {
    let mut claimed = input(PF1, 7);
    claimed.holders = vec![Holder {
        mac: Some(mac(0xaa)),
        ..holder("b", 3)
    }];
    let mut host = input(PF1, 7);
    host.facts.mac = Some(mac(0xaa));
    let mut burnt_in = input(PF1, 7);
    burnt_in.facts.permanent_mac = Some(mac(0xaa));
    let mut foreign = input(PF1, 7);
    on(&mut foreign.vfs[4], "igbvf");
    foreign.macs.insert(4, mac(0xaa));
    for (pool, by) in [
        (claimed.clone(), "guest-a/b"),
        (host, "the host itself"),
        (burnt_in, "the host itself"),
        (foreign, "VF 4"),
    ] {
        let (why, words) = refused(pool, &wish("a"));
        assert_eq!(why, reason::MAC_IN_USE);
        assert!(words.contains("02:00:00:00:00:aa"), "{words}");
        assert!(words.contains(by), "{words}");
    }
    let pfs = [PfView::new(claimed), PfView::new(input(PF2, 7))];
    assert_eq!(
        choose(&pfs, &wish("a")).unwrap().physical_function,
        "node-2"
    );
}

#[test]
fn an_exhausted_pool_says_who_has_it_but_not_to_other_tenants() {
    let mut pool = input(PF1, 7);
    pool.holders = (0..6).map(|i| holder(&format!("c{i}"), i)).collect();
    pool.holders[0].claim.namespace = "guest-b".to_owned();
    on(&mut pool.vfs[6], "igbvf");
    let error = choose(&[PfView::new(pool)], &wish("a")).unwrap_err();
    assert_eq!(error.reason(), reason::NO_FREE_VF);
    let words = error.message();
    assert!(words.contains("7 of at most 7 exist"), "{words}");
    assert!(words.contains("guest-a/c1"), "{words}");
    assert!(words.contains("1 claim of another cluster"), "{words}");
    assert!(words.contains("1 in use by something else"), "{words}");
    assert!(!words.contains("guest-b"), "{words}");
    assert!(!words.contains("c0"), "{words}");
    let full = error.message_for_administrator();
    assert!(full.contains("guest-b/c0"), "{full}");
}

#[test]
fn a_busy_pool_that_could_be_larger_says_when() {
    let mut pool = input(PF1, 1);
    pool.holders = vec![holder("b", 0)];
    let (why, words) = refused(pool, &wish("a"));
    assert_eq!(why, reason::NO_FREE_VF);
    assert!(
        words.contains("only while none of them is in use"),
        "{words}"
    );
}

#[test]
fn what_is_not_isolated_is_refused_before_and_after_vfs_are_made() {
    let kernel = FakeKernel::new([igb_pf(PF1.parse().unwrap())]);
    let pf = PF1.parse().unwrap();
    kernel.without_isolation(pf);
    for count in [0, 7] {
        kernel.set_num_vfs(pf, count).unwrap();
        let mut pool = input(PF1, 0);
        pool.facts = kernel.physical_function(pf).unwrap();
        pool.vfs = kernel.virtual_functions(pf).unwrap();
        let (why, words) = refused(pool, &wish("a"));
        assert_eq!(why, reason::NOT_ISOLATED, "{words}");
        assert!(words.contains("0000:00:1c.0"), "{words}");
    }
}

#[test]
fn without_an_iommu_nothing_is_given() {
    for count in [0, 7] {
        let mut pool = input(PF1, count);
        pool.facts.iommu_group = None;
        for vf in &mut pool.vfs {
            vf.iommu_group = None;
        }
        let (why, words) = refused(pool, &wish("a"));
        assert_eq!(why, reason::NOT_ISOLATED);
        assert!(words.contains("intel_iommu=on"), "{words}");
    }
}

#[test]
fn a_group_is_shared_within_one_vm_only() {
    let mut pool = input(PF1, 2);
    let group = pool.vfs[0].iommu_group;
    let both: Vec<PciAddress> = pool.vfs.iter().map(|vf| vf.address).collect();
    for vf in &mut pool.vfs {
        vf.iommu_group = group;
        vf.group_members.clone_from(&both);
        vf.driver = Some(VFIO_PCI.to_owned());
    }
    pool.holders = vec![holder("b", 0)];
    assert_eq!(groups_to_probe(&pool.vfs, &pool.holders), []);
    let same = choose(&[PfView::new(pool.clone())], &wish("a")).unwrap();
    assert_eq!(same.vf_index, 1);
    pool.holders[0].vm_uid = "vm-2".to_owned();
    assert_eq!(refused(pool, &wish("a")).0, reason::NOT_ISOLATED);
}

#[test]
fn free_is_proven_or_it_is_foreign() {
    let mut pool = input(PF1, 7);
    let groups: Vec<u32> = (1..4).map(|i| on(&mut pool.vfs[i], VFIO_PCI)).collect();
    on(&mut pool.vfs[4], "igbvf");
    pool.holders = vec![
        holder("b", 5),
        Holder {
            attached: true,
            ..holder("c", 6)
        },
    ];
    on(&mut pool.vfs[6], VFIO_PCI);
    assert_eq!(groups_to_probe(&pool.vfs, &pool.holders), groups);
    pool.probes.insert(groups[0], GroupProbe::Free);
    pool.probes.insert(groups[1], GroupProbe::Busy);
    let view = PfView::new(pool);
    let states: Vec<VfState> = view.vfs.iter().map(|vf| vf.state).collect();
    use VfState::{Allocated, Attached, Foreign, Free};
    assert_eq!(
        states,
        [Free, Free, Foreign, Foreign, Foreign, Allocated, Attached]
    );
    let held = Some(ForeignReason::HeldOpen(groups[1]));
    assert_eq!(view.vfs[2].foreign, held);
    let unproven = Some(ForeignReason::NotProven("not probed".to_owned()));
    assert_eq!(view.vfs[3].foreign, unproven);
    let counts = view.counts();
    assert_eq!(
        (
            counts.free,
            counts.allocated,
            counts.attached,
            counts.foreign
        ),
        (2, 1, 1, 3)
    );
}

#[test]
fn a_backend_that_makes_single_vfs_grows_beside_used_ones() {
    let mut pool = input(PF1, 2);
    pool.holders = vec![holder("b", 0), holder("c", 1)];
    pool.desired = Some(3);
    let mut view = PfView::new(pool);
    view.capabilities.as_mut().unwrap().growth = Growth::OneByOne;
    let choice = choose(std::slice::from_ref(&view), &wish("a")).unwrap();
    assert_eq!((choice.vf_index, choice.create), (2, Some(3)));
    view.desired = Some(2);
    let error = choose(&[view], &wish("a")).unwrap_err();
    assert_eq!(error.reason(), reason::NO_FREE_VF);
}

#[test]
fn the_nearest_refusal_gives_the_reason_and_all_are_told() {
    let mut unmanaged = input(PF1, 7);
    unmanaged.managed = false;
    let mut full = input(PF2, 1);
    full.holders = vec![holder("b", 0)];
    let error = choose(&[PfView::new(unmanaged), PfView::new(full)], &wish("a")).unwrap_err();
    assert_eq!(error.reason(), reason::NO_FREE_VF);
    let words = error.message();
    assert!(words.starts_with("node-2 has no free VF"), "{words}");
    assert!(words.contains("node-1 is not managed"), "{words}");
}

#[test]
fn a_resize_is_applied_when_idle_and_waits_else() {
    let view = |edit: fn(&mut PfInput)| {
        let mut pool = input(PF1, 3);
        pool.desired = Some(5);
        edit(&mut pool);
        resize(&PfView::new(pool))
    };
    assert_eq!(view(|_| {}), Resize::Apply { from: 3, to: 5 });
    assert_eq!(
        view(|pool| pool.desired = Some(99)),
        Resize::Apply { from: 3, to: 7 }
    );
    for keep in [
        |pool: &mut PfInput| pool.desired = None,
        |pool: &mut PfInput| pool.desired = Some(3),
        |pool: &mut PfInput| pool.managed = false,
        |pool: &mut PfInput| pool.facts.in_use_by_host = Some("bond".to_owned()),
        |pool: &mut PfInput| pool.facts.driver = None,
    ] {
        assert_eq!(view(keep), Resize::Keep);
    }
    for busy in [
        |pool: &mut PfInput| pool.holders = vec![holder("b", 0)],
        |pool: &mut PfInput| pool.holders = vec![holder("b", 6)],
        |pool: &mut PfInput| pool.vfs[1].driver = Some("igbvf".to_owned()),
        |pool: &mut PfInput| pool.vfs[1].driver = Some(VFIO_PCI.to_owned()),
        |pool: &mut PfInput| drop(pool.vfs.pop()),
    ] {
        assert!(
            matches!(view(busy), Resize::Pending { from: 3, to: 5, .. }),
            "{:?}",
            view(busy)
        );
    }
}

#[test]
fn granted_settings_become_the_kernels() {
    let granted = GrantedNetwork {
        mac_address: "02:00:00:00:00:AA".to_owned(),
        vlan: Some(common::api::Vlan { id: 100, qos: None }),
        spoof_check: true,
        trust: true,
    };
    let config = wanted_config(&granted).unwrap();
    assert_eq!(config.mac, mac(0xaa));
    assert_eq!(config.vlan, Some(VlanTag { id: 100, qos: 0 }));
    assert!(config.spoof_check && config.trust);
    let bad = GrantedNetwork {
        mac_address: "02:00:00:00:00".to_owned(),
        ..granted
    };
    assert!(wanted_config(&bad).is_err());
}

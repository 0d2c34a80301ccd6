//! Each refusal has its reason and says what to do.

use super::*;
use crate::kernel::Eswitch;

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
    for driver in [None, Some("sfc".to_owned())] {
        let mut pool = input(PF1, 7);
        pool.facts.driver = driver;
        assert_eq!(refused(pool, &wish("a")).0, reason::UNSUPPORTED_DRIVER);
    }
}

#[test]
fn an_eswitch_in_switchdev_mode_serves_nobody() {
    let mut pool = input(PF1, 7);
    pool.facts.driver = Some("mlx5_core".to_owned());
    pool.facts.eswitch = Some(Eswitch::Switchdev);
    let (why, words) = refused(pool.clone(), &wish("a"));
    assert_eq!(why, reason::UNSUPPORTED_DRIVER);
    assert!(
        words.contains("eswitch set pci/ADDRESS mode legacy"),
        "{words}"
    );
    // Nor is its number of VFs changed.
    pool.desired = Some(3);
    assert_eq!(resize(&PfView::new(pool.clone())), Resize::Keep);
    pool.facts.eswitch = Some(Eswitch::Legacy);
    assert!(choose(&[PfView::new(pool)], &wish("a")).is_ok());
}

#[test]
fn a_setting_that_the_driver_does_not_have_is_refused() {
    let mut view = PfView::new(input(PF1, 7));
    view.capabilities.as_mut().unwrap().settings.trust = false;
    let mut wish = wish("a");
    wish.config.trust = true;
    let error = choose(&[view], &wish).unwrap_err();
    assert_eq!(error.reason(), reason::UNSUPPORTED_SETTING);
    let words = error.message();
    assert!(
        words.contains("driver igb cannot set trust; it can set a MAC address, a VLAN"),
        "{words}"
    );
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

//! Tables and properties of the pool.

mod namespaces;
mod placement;
mod properties;
mod refusals;
mod resize;
mod withheld;

use common::api::{
    Admitted, ClaimRef, GrantedNetwork, GrantedStorage, LinkState, Placement, ReclaimPolicy,
    VFClaim, VlanProtocol, reason,
};

use super::*;
use crate::kernel::fake::{FakeKernel, igb_pf};
use crate::kernel::{Kernel as _, MacAddr, Stuck, TxRate, VfConfig, VfFacts, VlanTag};

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
        namespaces: None,
        num_vfs: None,
        placement: Placement::Pack,
        near: Default::default(),
    }
}

pub(super) fn holder(name: &str, vf_index: u16) -> Holder {
    Holder {
        claim: claim(name),
        vm_uid: "vm-1".to_owned(),
        vf_index,
        mac: Some(mac(u8::try_from(vf_index).unwrap())),
        namespace: None,
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

pub(super) fn on(vf: &mut VfFacts, driver: &str) -> u32 {
    vf.driver = Some(driver.to_owned());
    vf.iommu_group.unwrap()
}

/// The reason and message of the refusal by one PF.
pub(super) fn refused(input: PfInput, wish: &Wish) -> (&'static str, String) {
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
        namespace: None,
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
fn vfs_that_do_not_exist_yet_are_promised_to_one_vm_alone() {
    let mut pool = input(PF1, 0);
    pool.holders = vec![holder("b", 0)];
    let same = choose(&[PfView::new(pool.clone())], &wish("a")).unwrap();
    assert_eq!(same.vf_index, 1);
    pool.holders[0].vm_uid = "vm-2".to_owned();
    let (reason, words) = refused(pool, &wish("a"));
    assert_eq!(reason, reason::PENDING);
    assert!(words.contains("another VM"), "{words}");
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
    assert_eq!(groups_to_probe(&pool.vfs, &pool.holders), Vec::<u32>::new());
    let same = choose(&[PfView::new(pool.clone())], &wish("a")).unwrap();
    assert_eq!(same.vf_index, 1);
    pool.holders[0].vm_uid = "vm-2".to_owned();
    assert_eq!(refused(pool, &wish("a")).0, reason::NOT_ISOLATED);
}

#[test]
fn a_vf_beside_an_attached_one_is_not_proven_free() {
    let mut pool = input(PF1, 3);
    let group = pool.vfs[0].iommu_group;
    let both: Vec<PciAddress> = pool.vfs.iter().take(2).map(|vf| vf.address).collect();
    for vf in pool.vfs.iter_mut().take(2) {
        vf.iommu_group = group;
        vf.group_members.clone_from(&both);
        vf.driver = Some(VFIO_PCI.to_owned());
    }
    pool.holders = vec![Holder {
        attached: true,
        ..holder("b", 0)
    }];
    let view = PfView::new(pool.clone());
    let states: Vec<VfState> = view.vfs.iter().map(|vf| vf.state).collect();
    assert_eq!(states, [VfState::Attached, VfState::Foreign, VfState::Free]);
    assert_eq!(choose(&[view], &wish("a")).unwrap().vf_index, 2);
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
    let driverless = pool.vfs[0].iommu_group.unwrap();
    let mut asked = vec![driverless];
    asked.extend(&groups);
    assert_eq!(groups_to_probe(&pool.vfs, &pool.holders), asked);
    pool.probes.insert(driverless, GroupProbe::NoDevice);
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
fn a_vf_about_which_the_kernel_has_not_come_back_is_nobodys() {
    let mut pool = input(PF1, 3);
    let stuck = Stuck { pid: 17 };
    pool.stuck = [(pool.vfs[0].address, stuck), (pool.vfs[1].address, stuck)].into();
    pool.holders = vec![holder("b", 1)];
    let view = PfView::new(pool.clone());
    let states: Vec<VfState> = view.vfs.iter().map(|vf| vf.state).collect();
    assert_eq!(states, [VfState::Broken, VfState::Broken, VfState::Free]);
    assert_eq!((view.counts().broken, view.counts().free), (2, 1));
    let choice = choose(std::slice::from_ref(&view), &wish("a")).unwrap();
    assert_eq!(choice.vf_index, 2);
    // Nor is the number changed under it, nor its MAC given to another.
    pool.holders.clear();
    pool.desired = Some(7);
    pool.macs = [(0, mac(0xaa))].into();
    let view = PfView::new(pool.clone());
    assert!(matches!(resize(&view), Resize::Pending { foreign: 2, .. }));
    assert_eq!(refused(pool, &wish("a")).0, reason::MAC_IN_USE);
}

#[test]
fn a_pf_about_which_the_kernel_has_not_come_back_is_left_alone() {
    let mut pool = input(PF1, 0);
    pool.stuck = [(pool.facts.address, Stuck { pid: 17 })].into();
    let (reason, words) = refused(pool, &wish("a"));
    assert_eq!(reason, reason::BROKEN);
    assert!(words.contains("process 17"), "{words}");
}

#[test]
fn a_vf_that_is_being_taken_from_its_user_is_not_free() {
    let mut pool = input(PF1, 2);
    let groups = groups_to_probe(&pool.vfs, &pool.holders);
    assert_eq!(groups.len(), 2, "driverless ones are probed too");
    pool.probes = [
        (groups[0], GroupProbe::Busy),
        (groups[1], GroupProbe::NoDevice),
    ]
    .into();
    let view = PfView::new(pool.clone());
    let states: Vec<VfState> = view.vfs.iter().map(|vf| vf.state).collect();
    assert_eq!(states, [VfState::Foreign, VfState::Free]);
    // On vfio-pci a group without a node proves nothing.
    on(&mut pool.vfs[1], VFIO_PCI);
    assert_eq!(PfView::new(pool).vfs[1].state, VfState::Foreign);
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
fn granted_settings_become_the_kernels() {
    let granted = GrantedNetwork {
        mac_address: "02:00:00:00:00:AA".to_owned(),
        vlan: Some(common::api::Vlan {
            id: 100,
            ..Default::default()
        }),
        spoof_check: true,
        trust: true,
        link_state: LinkState::Disable,
        min_tx_rate_mbps: None,
        max_tx_rate_mbps: Some(500),
    };
    let config = wanted_config(&granted).unwrap();
    let expected = VfConfig {
        mac: mac(0xaa),
        vlan: Some(VlanTag::new(100, 0)),
        spoof_check: true,
        trust: true,
        link_state: LinkState::Disable,
        rate: TxRate { min: 0, max: 500 },
        ..VfConfig::CLEAN
    };
    assert_eq!(config, expected);
    let service = GrantedNetwork {
        vlan: Some(common::api::Vlan {
            id: 100,
            qos: Some(3),
            protocol: Some(VlanProtocol::Ieee8021Ad),
        }),
        ..granted.clone()
    };
    let tag = wanted_config(&service).unwrap().vlan.unwrap();
    assert_eq!(tag.to_string(), "100 qos 3 802.1ad");
    let bad = GrantedNetwork {
        mac_address: "02:00:00:00:00".to_owned(),
        ..granted
    };
    assert!(wanted_config(&bad).is_err());
}

#[test]
fn a_claim_speaks_by_its_grant_and_its_device() {
    let text = r#"{"apiVersion":"sriov.harvesterhci.io/v1alpha1","kind":"VFClaim",
        "metadata":{"name":"vfc-1","namespace":"guest-a","uid":"u1"},
        "spec":{"className":"other","network":{"macAddress":"02:ff:ff:ff:ff:ff","trust":true}},
        "status":{
          "admitted":{"observedGeneration":1,"className":"fast","classUID":"c1","numVFs":4,
            "pfSelector":{"drivers":["igb"]},"placement":"Spread",
            "network":{"macAddress":"02:00:00:00:00:aa","spoofCheck":true,"trust":false}},
          "vm":{"namespace":"vms","name":"vm","uid":"vm-1"},
          "hostNode":"node-a",
          "device":{"nodeName":"node-a","physicalFunction":"node-a-1","vfIndex":3}}}"#;
    let mut claim: VFClaim = serde_json::from_str(text).unwrap();
    let wish = Wish::of(&claim, &BTreeMap::new()).unwrap();
    assert_eq!((wish.config.mac, wish.config.trust), (mac(0xaa), false));
    assert_eq!((wish.vm_uid.as_str(), wish.num_vfs), ("vm-1", Some(4)));
    assert_eq!(wish.selector.drivers, ["igb"]);
    assert_eq!(wish.placement, Placement::Spread);
    let (pf, holder) = Holder::of(&claim).unwrap();
    assert_eq!((pf.as_str(), holder.vf_index), ("node-a-1", 3));
    assert_eq!((holder.mac, holder.attached), (Some(mac(0xaa)), false));
    assert_eq!(holder.claim.uid, "u1");

    let status = claim.status.as_mut().unwrap();
    status.device = None;
    status.vm = None;
    assert_eq!(Holder::of(&claim), None);
    let early = Wish::of(&claim, &BTreeMap::new());
    assert_eq!(early.unwrap_err(), WishError::NoVm);
    claim.status = None;
    let early = Wish::of(&claim, &BTreeMap::new());
    assert_eq!(early.unwrap_err(), WishError::NotAdmitted);
}

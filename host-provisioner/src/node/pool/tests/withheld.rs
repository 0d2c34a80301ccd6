//! VFs that nobody gets though no claim has them.

use common::api::{WithheldReason, WithheldVf};

use super::*;

pub(super) fn withheld(vf_index: u16, reason: WithheldReason) -> WithheldVf {
    WithheldVf {
        vf_index,
        reason,
        claim: claim(&format!("gone-{vf_index}")),
    }
}

#[test]
fn a_withheld_vf_is_nobodys_until_its_entry_is_taken_out() {
    for reason in [WithheldReason::Destroyed, WithheldReason::Retained] {
        let mut pool = input(PF1, 2);
        pool.holders = vec![holder("b", 1)];
        pool.withheld = vec![withheld(0, reason)];
        let view = PfView::new(pool.clone());
        assert_eq!(view.vfs[0].state, VfState::Retired);
        assert_eq!((view.counts().retired, view.counts().free), (1, 0));
        let (why, words) = refused(pool.clone(), &wish("a"));
        assert_eq!(why, reason::NO_FREE_VF);
        assert!(words.contains("1 withheld"), "{words}");
        pool.withheld.clear();
        assert_eq!(
            choose(&[PfView::new(pool)], &wish("a")).unwrap().vf_index,
            0
        );
    }
}

#[test]
fn a_claim_that_has_the_vf_still_keeps_it() {
    let mut pool = input(PF1, 2);
    pool.holders = vec![holder("a", 0)];
    pool.withheld = vec![withheld(0, WithheldReason::Retained)];
    let view = PfView::new(pool);
    assert_eq!(view.vfs[0].state, VfState::Allocated);
    assert_eq!(choose(&[view], &wish("a")).unwrap().vf_index, 0);
}

#[test]
fn what_the_last_holder_left_on_it_is_not_given_twice() {
    let mut pool = input(PF1, 2);
    pool.withheld = vec![withheld(0, WithheldReason::Retained)];
    pool.macs = [(0, mac(0xaa))].into();
    assert_eq!(refused(pool, &wish("a")).0, reason::MAC_IN_USE);
}

#[test]
fn a_vf_in_the_group_of_a_withheld_one_is_not_given_either() {
    let mut pool = input(PF1, 2);
    let group = pool.vfs[0].iommu_group;
    let members: Vec<_> = pool.vfs.iter().map(|vf| vf.address).collect();
    for vf in &mut pool.vfs {
        vf.iommu_group = group;
        vf.group_members.clone_from(&members);
    }
    assert!(choose(&[PfView::new(pool.clone())], &wish("a")).is_ok());
    pool.withheld = vec![withheld(0, WithheldReason::Retained)];
    assert_eq!(refused(pool, &wish("a")).0, reason::NOT_ISOLATED);
}

#[test]
fn no_claim_is_promised_a_withheld_vf_that_does_not_exist() {
    let mut pool = input(PF1, 0);
    pool.withheld = vec![withheld(0, WithheldReason::Retained)];
    let choice = choose(&[PfView::new(pool.clone())], &wish("a")).unwrap();
    assert_eq!((choice.vf_index, choice.create), (1, Some(7)));
    pool.desired = Some(1);
    assert_eq!(refused(pool, &wish("a")).0, reason::NO_FREE_VF);
}

#[test]
fn a_write_that_has_not_come_back_is_said_before_all() {
    let mut pool = input(PF1, 1);
    pool.withheld = vec![withheld(0, WithheldReason::Destroyed)];
    pool.stuck = [(pool.vfs[0].address, Stuck { pid: 17 })].into();
    let view = PfView::new(pool);
    assert_eq!(view.vfs[0].state, VfState::Broken);
}

//! Which of several PFs a claim's VF comes from.

use common::api::WithheldReason;
use proptest::prelude::*;

use super::properties::any_pf;
use super::withheld::withheld;
use super::*;

const PF3: &str = "0000:03:00.0";

/// A PF with that many VFs of which the first ones are held.
fn pf(address: &str, vfs: u16, held: u16) -> PfInput {
    let mut pool = input(address, vfs);
    pool.holders = (0..held)
        .map(|index| holder(&format!("{address}-{index}"), index))
        .collect();
    pool
}

fn placed(name: &str, placement: Placement) -> Wish {
    Wish {
        placement,
        ..wish(name)
    }
}

/// The PF that gives a claim its VF, by each placement.
fn from(pools: &[PfInput]) -> [String; 2] {
    let views: Vec<PfView> = pools.iter().cloned().map(PfView::new).collect();
    [Placement::Pack, Placement::Spread].map(|placement| {
        let choice = choose(&views, &placed("a", placement)).unwrap();
        choice.physical_function
    })
}

#[test]
fn pack_takes_from_the_fullest_and_spread_from_the_emptiest() {
    let pools = [pf(PF1, 7, 2), pf(PF2, 7, 5), pf(PF3, 7, 3)];
    assert_eq!(from(&pools), ["node-2", "node-1"]);
    // One without a free VF is no choice.
    let pools = [pf(PF1, 7, 2), pf(PF2, 7, 7), pf(PF3, 7, 3)];
    assert_eq!(from(&pools), ["node-3", "node-1"]);
}

#[test]
fn pack_leaves_an_idle_pf_idle_though_it_has_fewer_free_vfs() {
    assert_eq!(from(&[pf(PF1, 2, 0), pf(PF2, 7, 3)]), ["node-2", "node-2"]);
    // Somebody else's use is a use as well: its number cannot change either.
    let mut foreign = pf(PF2, 7, 0);
    on(&mut foreign.vfs[0], "igbvf");
    assert_eq!(from(&[pf(PF1, 2, 0), foreign]), ["node-2", "node-2"]);
    // One that is to lose a destroyed VF is as good as idle.
    let mut shrinking = pf(PF1, 3, 0);
    shrinking.withheld = vec![withheld(0, WithheldReason::Destroyed)];
    assert_eq!(from(&[shrinking, pf(PF2, 7, 3)]), ["node-2", "node-2"]);
}

#[test]
fn vfs_are_made_last_by_pack_and_where_there_is_most_room_by_spread() {
    assert_eq!(from(&[pf(PF1, 0, 0), pf(PF2, 7, 0)]), ["node-2", "node-2"]);
    assert_eq!(from(&[pf(PF1, 0, 0), pf(PF2, 7, 1)]), ["node-2", "node-1"]);
    // Of two that have none the one that is to be given fewer keeps the other idle.
    let mut few = pf(PF2, 0, 0);
    few.desired = Some(2);
    assert_eq!(from(&[pf(PF1, 0, 0), few]), ["node-2", "node-1"]);
    // VFs that are being made for this VM's other claims are promised, and their PF is in use.
    assert_eq!(from(&[pf(PF1, 0, 0), pf(PF2, 0, 2)]), ["node-2", "node-1"]);
    // What is withheld will not be had.
    let mut retained = pf(PF1, 0, 0);
    retained.withheld = vec![withheld(3, WithheldReason::Retained)];
    assert_eq!(from(&[retained, pf(PF2, 0, 0)])[1], "node-2");
}

#[test]
fn a_near_pf_goes_first_and_a_far_one_when_there_is_no_other() {
    let on_node = |pool: PfInput, node: Option<u16>| {
        let mut pool = pool;
        pool.facts.numa_node = node;
        pool
    };
    let from = |pools: &[PfInput], near: &[u16]| {
        let views: Vec<PfView> = pools.iter().cloned().map(PfView::new).collect();
        [Placement::Pack, Placement::Spread].map(|placement| {
            let near = near.iter().copied().collect();
            let wish = Wish {
                near,
                ..placed("a", placement)
            };
            choose(&views, &wish).unwrap().physical_function
        })
    };
    // Pack would take node-1 and spread node-3.
    let pools = [
        on_node(pf(PF1, 7, 5), Some(0)),
        on_node(pf(PF2, 7, 3), Some(1)),
        on_node(pf(PF3, 7, 0), None),
    ];
    assert_eq!(from(&pools, &[]), ["node-1", "node-3"]);
    assert_eq!(from(&pools, &[1]), ["node-2", "node-2"]);
    assert_eq!(from(&pools, &[0, 1]), ["node-1", "node-2"]);
    // On a node without a PF nothing is near, and nothing is refused for it.
    assert_eq!(from(&pools, &[2]), ["node-1", "node-3"]);
    let full = on_node(pf(PF2, 7, 7), Some(1));
    let pools = [pools[0].clone(), full, pools[2].clone()];
    assert_eq!(from(&pools, &[1]), ["node-1", "node-3"]);
    // Where the PFs say nothing, where the VM is says nothing either.
    let pools = pools.map(|pool| on_node(pool, None));
    assert_eq!(from(&pools, &[1]), from(&pools, &[]));
}

#[test]
fn claims_spread_one_by_one_over_idle_pfs_and_pack_into_one() {
    for (placement, counts) in [(Placement::Spread, [2, 2, 1]), (Placement::Pack, [5, 0, 0])] {
        let mut pools = [pf(PF1, 0, 0), pf(PF2, 0, 0), pf(PF3, 0, 0)];
        for number in 0..5 {
            let views: Vec<PfView> = pools.iter().cloned().map(PfView::new).collect();
            let mut wish = placed(&format!("new-{number}"), placement);
            wish.config.mac = mac(0xa0 + number);
            let choice = choose(&views, &wish).unwrap();
            let taken = pools
                .iter_mut()
                .find(|pool| pool.name == choice.physical_function)
                .unwrap();
            taken.holders.push(Holder {
                mac: Some(wish.config.mac),
                ..holder(&wish.claim.name, choice.vf_index)
            });
        }
        let held = pools.map(|pool| pool.holders.len());
        assert_eq!(held, counts, "{placement:?}");
    }
}

/// VFs that nobody has, said otherwise than by the rank: of a PF without VFs those that it is
/// to have and that nobody was promised.
fn left(pool: &PfInput) -> usize {
    let view = PfView::new(pool.clone());
    if pool.vfs.is_empty() {
        let promised = pool.holders.iter().map(|holder| holder.vf_index + 1);
        let size = pool.desired.unwrap_or(7).min(7);
        let size = size.max(promised.max().unwrap_or(0));
        return usize::from(size) - pool.holders.len();
    }
    let free = |vf: &&VfView| vf.state == VfState::Free;
    view.existing().filter(free).count()
}

fn in_use(pool: &PfInput) -> bool {
    let view = PfView::new(pool.clone());
    !pool.holders.is_empty() || view.vfs.iter().any(|vf| vf.state != VfState::Free)
}

proptest! {
    /// In whatever order the PFs come, the choice is the same, is a free VF or one to be made,
    /// and is from the PF that the placement names.
    #[test]
    fn the_placement_alone_decides(
        pools in (any_pf(PF1), any_pf(PF2), any_pf(PF3)),
        turn in 0_usize..3,
        spread in any::<bool>(),
    ) {
        let pools = [pools.0, pools.1, pools.2];
        let views: Vec<PfView> = pools.iter().cloned().map(PfView::new).collect();
        let wish = placed("new", if spread { Placement::Spread } else { Placement::Pack });
        let chosen = choose(&views, &wish);
        let mut turned = views.clone();
        turned.rotate_left(turn);
        turned.swap(0, 1);
        let same = choose(&turned, &wish);
        prop_assert_eq!(chosen.as_ref().ok(), same.as_ref().ok());

        let offers = |view: &&PfView| choose(std::slice::from_ref(*view), &wish).is_ok();
        let offering: Vec<&str> = views.iter().filter(offers).map(|v| v.name.as_str()).collect();
        prop_assert_eq!(chosen.is_ok(), !offering.is_empty());
        let Ok(choice) = chosen else { return Ok(()) };
        let pool = pools.iter().find(|pool| pool.name == choice.physical_function).unwrap();
        let view = views.iter().find(|view| view.name == choice.physical_function).unwrap();
        match view.vfs.iter().find(|vf| vf.index == choice.vf_index) {
            Some(vf) => prop_assert_eq!((vf.state, vf.address), (VfState::Free, choice.address)),
            None => prop_assert!(choice.create.is_some() && pool.vfs.is_empty()),
        }
        for other in pools.iter().filter(|other| offering.contains(&other.name.as_str())) {
            if spread {
                prop_assert!(left(pool) >= left(other), "{} and {}", pool.name, other.name);
            } else if in_use(pool) == in_use(other) && pool.vfs.is_empty() == other.vfs.is_empty() {
                prop_assert!(left(pool) <= left(other), "{} and {}", pool.name, other.name);
            } else {
                prop_assert!(in_use(pool) || !in_use(other), "{} and {}", pool.name, other.name);
            }
        }
    }
}

//! Which of several PFs that have a VF for a claim gives it. Pure.

use std::cmp::Reverse;

use common::api::{Placement, VfState};

use super::resize::is_idle;
use super::{Choice, PfView, Wish, pool_size};

/// The place of a PF among those that have a VF for a claim: the least goes first. No two are
/// equal, whatever order the PFs come in, because names are not.
///
/// Being near goes before the placement: after it, it would count only between PFs with equally
/// many free VFs, that is hardly ever, and a VF on the far side costs its VM with each packet
/// for as long as it has it. Within the near ones, and within the others, the placement holds.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank<'a> {
    /// It is known where the VM runs, and not that the PF is there.
    far: bool,
    placed: Placed,
    name: &'a str,
}

/// What the placement says of a PF. Of one claim all are of one kind.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Placed {
    Pack {
        /// Its number of VFs could change, and could not any more.
        idle: bool,
        /// VFs have to be made first.
        create: bool,
        room: u16,
    },
    Spread {
        room: Reverse<u16>,
        /// VFs have to be made first.
        create: bool,
    },
}

impl<'a> Rank<'a> {
    /// The rank of a PF that has `choice` for the claim.
    pub(super) fn of(pf: &'a PfView, wish: &Wish, choice: &Choice) -> Self {
        let (create, room) = (choice.create.is_some(), room(pf, wish, choice));
        let placed = match wish.placement {
            Placement::Pack => Placed::Pack {
                idle: is_idle(pf),
                create,
                room,
            },
            Placement::Spread => Placed::Spread {
                room: Reverse(room),
                create,
            },
        };
        let near = |node: u16| wish.near.contains(&node);
        Self {
            far: !wish.near.is_empty() && !pf.facts.numa_node.is_some_and(near),
            placed,
            name: &pf.name,
        }
    }
}

/// VFs of the PF that nobody has: the free ones; where VFs are to be made first, those that
/// there will be and that are promised to nobody and not withheld.
fn room(pf: &PfView, wish: &Wish, choice: &Choice) -> u16 {
    let Some(count) = choice.create else {
        return pf.counts().free;
    };
    let taken = pf.vfs.iter().filter(|vf| vf.state != VfState::Free).count();
    let seen = |index: u16| pf.vfs.iter().any(|vf| vf.index == index);
    let withheld = pf.withheld.iter().filter(|entry| !seen(entry.vf_index));
    let taken = u16::try_from(taken + withheld.count()).unwrap_or(u16::MAX);
    count.max(pool_size(pf, wish)).saturating_sub(taken)
}

//! When the number of VFs changes, and to which.

use common::api::{ResizeStatus, WithheldReason, WithheldVf};

use super::super::resize;
use super::withheld::withheld;
use super::*;

fn applied(pool: &PfInput) -> Option<(u16, u16)> {
    match resize(&PfView::new(pool.clone())) {
        Resize::Apply(change) => Some((change.from, change.to)),
        _ => None,
    }
}

/// What the object records once the change is made.
fn done(pool: &mut PfInput, complete: bool) {
    match resize(&PfView::new(pool.clone())) {
        Resize::Apply(change) | Resize::Settle(change) => {
            pool.resize = Some(change.status(complete));
        }
        other => panic!("{other:?}"),
    }
}

fn record(num_vfs: u16, desired_vfs: Option<u16>, complete: bool) -> Option<ResizeStatus> {
    Some(ResizeStatus {
        num_vfs,
        desired_vfs,
        destroyed: Vec::new(),
        complete,
    })
}

#[test]
fn a_number_is_applied_when_idle_and_waits_else() {
    let view = |edit: fn(&mut PfInput)| {
        let mut pool = input(PF1, 3);
        pool.desired = Some(5);
        edit(&mut pool);
        pool
    };
    assert_eq!(applied(&view(|_| {})), Some((3, 5)));
    assert_eq!(applied(&view(|pool| pool.desired = Some(99))), Some((3, 7)));
    for keep in [
        |pool: &mut PfInput| pool.desired = None,
        |pool: &mut PfInput| pool.managed = false,
        |pool: &mut PfInput| pool.facts.in_use_by_host = Some("bond".to_owned()),
        |pool: &mut PfInput| pool.facts.driver = None,
        |pool: &mut PfInput| {
            pool.stuck = [(pool.facts.address, Stuck { pid: 17 })].into();
        },
        |pool: &mut PfInput| pool.resize = record(3, Some(5), true),
    ] {
        assert_eq!(resize(&PfView::new(view(keep))), Resize::Keep);
    }
    for busy in [
        |pool: &mut PfInput| pool.holders = vec![holder("b", 0)],
        |pool: &mut PfInput| pool.holders = vec![holder("b", 6)],
        |pool: &mut PfInput| pool.vfs[1].driver = Some("igbvf".to_owned()),
        |pool: &mut PfInput| pool.vfs[1].driver = Some(VFIO_PCI.to_owned()),
        |pool: &mut PfInput| drop(pool.vfs.pop()),
        |pool: &mut PfInput| pool.withheld = vec![withheld(2, WithheldReason::Retained)],
    ] {
        let found = resize(&PfView::new(view(busy)));
        let Resize::Pending { change, .. } = &found else {
            panic!("{found:?}")
        };
        assert_eq!((change.from, change.to), (3, 5), "{found:?}");
    }
}

#[test]
fn what_is_so_already_is_recorded_and_not_asked_for_again() {
    let mut pool = input(PF1, 3);
    pool.desired = Some(3);
    // Also while they are in use: the kernel is not written.
    pool.holders = vec![holder("b", 0)];
    assert!(matches!(
        resize(&PfView::new(pool.clone())),
        Resize::Settle(_)
    ));
    done(&mut pool, true);
    assert_eq!(pool.resize, record(3, Some(3), true));
    assert_eq!(resize(&PfView::new(pool.clone())), Resize::Keep);
    // No VFs: they are made when a claim needs them.
    let mut none = input(PF1, 0);
    none.desired = Some(4);
    done(&mut none, true);
    assert_eq!(none.resize, record(0, Some(4), true));
    let choice = choose(&[PfView::new(none)], &wish("a")).unwrap();
    assert_eq!(choice.create, Some(4));
    // After a restart of the host claims may have needed more than are asked for.
    let mut more = input(PF1, 6);
    (more.desired, more.resize) = (Some(2), record(2, Some(2), true));
    assert_eq!(applied(&more), Some((6, 2)));
}

#[test]
fn each_destroyed_vf_is_one_less_until_another_number_is_asked_for() {
    for desired in [None, Some(7)] {
        let mut pool = input(PF1, 7);
        pool.desired = desired;
        if desired.is_some() {
            pool.resize = record(7, desired, true);
        }
        pool.withheld = vec![withheld(3, WithheldReason::Destroyed)];
        let mut busy = pool.clone();
        busy.holders = vec![holder("b", 0)];
        let waits = resize(&PfView::new(busy));
        assert!(matches!(waits, Resize::Pending { change, .. } if change.to == 6));
        assert_eq!(applied(&pool), Some((7, 6)));
        done(&mut pool, true);

        // Its entry is there until the controller takes it out, and keeps nothing from anybody.
        let after = |pool: &PfInput, count| PfInput {
            resize: pool.resize.clone(),
            withheld: pool.withheld.clone(),
            desired,
            ..input(PF1, count)
        };
        let mut pool = after(&pool, 6);
        let view = PfView::new(pool.clone());
        assert_eq!((resize(&view), view.counts().free), (Resize::Keep, 6));
        assert_eq!(view.resize.unwrap().destroyed, ["uid-gone-3"]);
        // Another one of the same index meanwhile.
        let mut second = withheld(3, WithheldReason::Destroyed);
        second.claim.uid = "second".to_owned();
        pool.withheld.push(second);
        assert_eq!(applied(&pool), Some((6, 5)));
        done(&mut pool, true);
        let mut pool = after(&pool, 5);
        assert_eq!(resize(&PfView::new(pool.clone())), Resize::Keep);
        pool.withheld.clear();
        let view = PfView::new(pool.clone());
        assert_eq!(resize(&view), Resize::Keep);
        assert_eq!(view.resize.unwrap().destroyed, Vec::<String>::new());

        pool.desired = Some(6);
        assert_eq!(applied(&pool), Some((5, 6)));
    }
}

#[test]
fn the_last_one_destroyed_leaves_none_and_the_next_claim_makes_as_many_as_asked_for() {
    let mut pool = input(PF1, 1);
    (pool.desired, pool.resize) = (Some(1), record(1, Some(1), true));
    pool.withheld = vec![withheld(0, WithheldReason::Destroyed)];
    assert_eq!(applied(&pool), Some((1, 0)));
    done(&mut pool, true);
    let mut none = input(PF1, 0);
    (none.desired, none.resize) = (Some(1), pool.resize);
    none.withheld = pool.withheld;
    let choice = choose(&[PfView::new(none.clone())], &wish("a")).unwrap();
    assert_eq!((choice.vf_index, choice.create), (0, Some(1)));
    // With the host's restart they went too: nothing is taken from those that will be made.
    none.resize = record(1, Some(1), true);
    assert!(matches!(
        resize(&PfView::new(none.clone())),
        Resize::Settle(_)
    ));
}

#[test]
fn nothing_is_settled_that_its_claim_waits_for() {
    for count in [0, 3] {
        let mut pool = input(PF1, count);
        pool.withheld = vec![withheld(1, WithheldReason::Destroyed)];
        pool.holders = vec![holder("gone-1", 1)];
        assert_eq!(resize(&PfView::new(pool.clone())), Resize::Keep);
        pool.holders.clear();
        assert_ne!(resize(&PfView::new(pool)), Resize::Keep);
    }
}

#[test]
fn a_change_that_was_begun_is_finished_from_where_it_stands() {
    let begun = Some(ResizeStatus {
        destroyed: vec!["uid-gone-3".to_owned()],
        ..record(6, None, false).unwrap()
    });
    let at = |count| PfInput {
        resize: begun.clone(),
        withheld: vec![withheld(3, WithheldReason::Destroyed)],
        ..input(PF1, count)
    };
    assert_eq!(applied(&at(7)), Some((7, 6)), "killed before it wrote");
    assert_eq!(
        applied(&at(0)),
        Some((0, 6)),
        "killed between the two writes"
    );
    // Killed after both: not one less again.
    let mut written = at(6);
    assert!(matches!(
        resize(&PfView::new(written.clone())),
        Resize::Settle(_)
    ));
    done(&mut written, true);
    assert_eq!(resize(&PfView::new(written)), Resize::Keep);
    // Claims came before the successor: it waits for them.
    let mut busy = at(7);
    busy.holders = vec![holder("b", 0)];
    assert!(matches!(resize(&PfView::new(busy)), Resize::Pending { .. }));
}

#[test]
fn no_claim_gets_a_vf_of_a_pf_whose_number_is_being_changed() {
    let mut pool = input(PF1, 3);
    pool.resizing = true;
    let (why, words) = refused(pool.clone(), &wish("a"));
    assert_eq!(why, reason::PENDING);
    assert!(words.contains("is being changed"), "{words}");
    pool.holders = vec![holder("a", 1)];
    assert_eq!(
        choose(&[PfView::new(pool)], &wish("a")).unwrap().vf_index,
        1
    );
}

mod any_history {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Event {
        Claim(u8),
        /// The claim in this place goes.
        Release(usize, Option<WithheldReason>),
        Ask(Option<u16>),
        /// The agent looks, and is killed after so many of its writes: the record, 0, the number,
        /// the record.
        Look(u8),
        /// The controller takes out what is settled.
        Settle,
        /// An administrator gives the retained VFs back.
        GiveBack,
        Reboot,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => any::<u8>().prop_map(Event::Claim),
            4 => (0_usize..7, prop_oneof![
                Just(None),
                Just(Some(WithheldReason::Destroyed)),
                Just(Some(WithheldReason::Retained)),
            ]).prop_map(|(which, reason)| Event::Release(which, reason)),
            1 => proptest::option::of(1_u16..9).prop_map(Event::Ask),
            4 => (0_u8..8).prop_map(Event::Look),
            2 => Just(Event::Settle),
            1 => Just(Event::GiveBack),
            1 => Just(Event::Reboot),
        ]
    }

    /// A PF whose VFs are in groups of their own; each is free that no claim has.
    struct World {
        pool: PfInput,
        claims: u32,
    }

    impl World {
        fn count(&mut self, count: u16) {
            let made = input(PF1, count);
            (self.pool.facts, self.pool.vfs) = (made.facts, made.vfs);
        }

        fn claim(&mut self, vm: u8) -> Result<(), TestCaseError> {
            self.claims += 1;
            let name = format!("claim-{}", self.claims);
            let mut wish = wish(&name);
            wish.vm_uid = format!("vm-{}", vm % 2);
            wish.config.mac = MacAddr([2, 1, 0, 0, 0, u8::try_from(self.claims).unwrap()]);
            let view = PfView::new(self.pool.clone());
            let Ok(choice) = choose(std::slice::from_ref(&view), &wish) else {
                return Ok(());
            };
            let index = choice.vf_index;
            let in_force = view.withheld.iter().any(|vf| vf.vf_index == index);
            prop_assert!(!in_force, "VF {} is withheld", index);
            prop_assert!(
                self.pool
                    .holders
                    .iter()
                    .all(|holder| holder.vf_index != index)
            );
            if let Some(count) = choice.create {
                prop_assert_eq!(self.pool.facts.num_vfs, 0);
                self.count(count);
            }
            self.pool.holders.push(Holder {
                vm_uid: wish.vm_uid,
                mac: Some(wish.config.mac),
                ..holder(&name, index)
            });
            Ok(())
        }

        /// The controller's entry comes before the claim lets go.
        fn release(&mut self, which: usize, reason: Option<WithheldReason>) {
            if which >= self.pool.holders.len() {
                return;
            }
            let gone = self.pool.holders.remove(which);
            if let Some(reason) = reason {
                // What is settled goes with the same write.
                self.settle();
                self.pool.withheld.push(WithheldVf {
                    vf_index: gone.vf_index,
                    reason,
                    claim: gone.claim,
                });
            }
        }

        fn settle(&mut self) {
            let last = self.pool.resize.as_ref();
            self.pool.withheld = common::api::withheld_in_force(&self.pool.withheld, last);
        }

        fn look(&mut self, killed_after: u8) -> Result<(), TestCaseError> {
            let view = PfView::new(self.pool.clone());
            let change = match resize(&view) {
                Resize::Keep | Resize::Pending { .. } => return Ok(()),
                Resize::Settle(change) => {
                    self.pool.resize = Some(change.status(true));
                    return Ok(());
                }
                Resize::Apply(change) => change,
            };
            prop_assert!(self.pool.holders.is_empty(), "in-use-stays");
            let kept = |vf: &&VfView| vf.withheld == Some(WithheldReason::Retained);
            prop_assert_eq!(view.vfs.iter().find(kept), None, "it was to be looked at");
            prop_assert!(change.to <= self.pool.facts.total_vfs);
            if killed_after == 0 {
                return Ok(());
            }
            self.pool.resize = Some(change.status(false));
            if killed_after > 1 {
                self.count(0);
            }
            if killed_after > 2 {
                self.count(change.to);
            }
            if killed_after > 3 {
                self.pool.resize = Some(change.status(true));
            }
            Ok(())
        }

        fn happens(&mut self, event: Event) -> Result<(), TestCaseError> {
            match event {
                Event::Claim(vm) => self.claim(vm)?,
                Event::Release(which, reason) => self.release(which, reason),
                Event::Ask(number) => self.pool.desired = number,
                Event::Look(killed_after) => self.look(killed_after)?,
                Event::Settle => self.settle(),
                Event::GiveBack => {
                    let kept = |vf: &WithheldVf| vf.reason != WithheldReason::Retained;
                    self.pool.withheld.retain(kept);
                }
                Event::Reboot => self.count(0),
            }
            // The list is a map by index.
            let mut indexes: Vec<u16> = self.pool.withheld.iter().map(|vf| vf.vf_index).collect();
            indexes.sort_unstable();
            let entries = indexes.len();
            indexes.dedup();
            prop_assert_eq!(indexes.len(), entries, "{:?}", self.pool.withheld);
            Ok(())
        }
    }

    proptest! {
        /// Claims, releases, resizes, kills in the middle, restarts of the host: one-to-one and
        /// in-use-stays, and when all is over every destroyed VF has gone, once, and what was
        /// asked for is so.
        #[test]
        fn keeps_what_is_used_and_ends(events in proptest::collection::vec(event(), 1..60)) {
            let mut world = World { pool: input(PF1, 0), claims: 0 };
            for event in events {
                world.happens(event)?;
            }
            world.pool.holders.clear();
            world.happens(Event::GiveBack)?;
            for _ in 0..4 {
                world.look(u8::MAX)?;
                world.settle();
            }
            let view = PfView::new(world.pool.clone());
            prop_assert_eq!(resize(&view), Resize::Keep);
            prop_assert_eq!(view.withheld, []);
            let count = view.facts.num_vfs;
            prop_assert!(view.desired.is_none_or(|asked| count <= asked), "{}", count);
            // Another number is applied at once where there are VFs.
            let asked = if view.desired == Some(3) { 4 } else { 3 };
            world.pool.desired = Some(asked);
            let expected = if count == 0 { 0 } else { asked };
            world.look(u8::MAX)?;
            prop_assert_eq!(world.pool.facts.num_vfs, expected);
        }
    }
}

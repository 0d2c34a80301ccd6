//! Tables and a property for orphans.

use proptest::prelude::*;

use common::api::{GuestRef, VFClaimSpec};

use super::*;

const CLUSTER: &str = "c-1";
const APART: Duration = Duration::from_secs(60);

fn guest() -> GuestId {
    GuestId {
        cluster: "blue".into(),
        cluster_uid: CLUSTER.into(),
        claim_namespace: "claims-blue".into(),
    }
}

fn copy(n: usize) -> HostCopy {
    HostCopy {
        name: format!("vfc-claim-{n}"),
        uid: format!("copy-{n:04}"),
        resource_version: "7".into(),
        going: false,
        claim_namespace: "team".into(),
        claim_name: format!("fast-{n}"),
        claim_uid: format!("claim-{n}"),
    }
}

fn look(begun: Instant, answers: impl IntoIterator<Item = Answer>) -> Look {
    let sights = answers.into_iter().enumerate().map(|(n, answer)| {
        let copy = copy(n);
        (copy.uid.clone(), Sight { copy, answer })
    });
    Look {
        begun,
        ended: begun + Duration::from_secs(1),
        clusters: [CLUSTER.into(), CLUSTER.into()],
        sights: sights.collect(),
    }
}

fn own(n: usize) -> Answer {
    Answer::Claim(format!("claim-{n}"))
}

/// Of `all` copies the first `gone` have no claim.
fn answers(gone: usize, all: usize) -> Vec<Answer> {
    let answer = |n| if n < gone { Answer::NotFound } else { own(n) };
    (0..all).map(answer).collect()
}

/// Two looks that say the same, far enough apart.
fn twice(answers: Vec<Answer>) -> (Look, Look) {
    let begun = Instant::now();
    let second = begun + Duration::from_secs(1) + APART;
    (look(begun, answers.clone()), look(second, answers))
}

fn planned(looks: &(Look, Look)) -> Plan {
    plan(CLUSTER, APART, &looks.0, &looks.1, None)
}

#[test]
fn what_is_gone_twice_goes_and_what_is_there_stays() {
    let other = Answer::Claim("another".into());
    let looks = twice(vec![Answer::NotFound, own(1), other, Answer::Unknown]);
    assert_eq!(planned(&looks), Plan::Delete(vec![copy(0), copy(2)]));
    assert_eq!(planned(&twice(answers(0, 9))), Plan::Keep);
    assert_eq!(looks.0.suspects(), 3);
    assert!(looks.0.saw_alive("copy-0001") && !looks.0.saw_alive("copy-0002"));
}

#[test]
fn a_minute_lies_between_the_looks() {
    let mut looks = twice(answers(1, 9));
    assert_eq!(planned(&looks), Plan::Delete(vec![copy(0)]));
    looks.1.begun -= Duration::from_millis(1);
    assert_eq!(planned(&looks), Plan::Keep);
}

#[test]
fn a_copy_made_between_the_looks_needs_two_of_its_own() {
    let mut looks = twice(answers(2, 9));
    looks.0.sights.remove("copy-0001");
    assert_eq!(planned(&looks), Plan::Delete(vec![copy(0)]));
    // The same name, made anew.
    let mut looks = twice(answers(1, 9));
    let mut sight = looks.1.sights.remove("copy-0000").unwrap();
    sight.copy.uid = "copy-anew".into();
    looks.1.sights.insert("copy-anew".into(), sight);
    assert_eq!(planned(&looks), Plan::Keep);
}

#[test]
fn a_copy_that_is_going_is_left_to_its_host() {
    let mut looks = twice(answers(1, 9));
    looks.1.sights.get_mut("copy-0000").unwrap().copy.going = true;
    assert_eq!(planned(&looks), Plan::Keep);
}

#[test]
fn another_cluster_says_nothing_about_our_claims() {
    for place in 0..4 {
        let mut looks = twice(answers(1, 9));
        let look = if place < 2 {
            &mut looks.0
        } else {
            &mut looks.1
        };
        look.clusters[place % 2] = "c-2".into();
        assert_eq!(planned(&looks), Plan::AnotherCluster, "{place}");
    }
}

#[test]
fn only_what_we_made_is_ours() {
    let found = || {
        let mut found = VFClaim::new(
            "vfc-u-1",
            VFClaimSpec {
                guest: Some(GuestRef {
                    cluster: "blue".into(),
                    cluster_uid: CLUSTER.into(),
                    namespace: "team".into(),
                    name: "fast".into(),
                    uid: "u-1".into(),
                    ..GuestRef::default()
                }),
                ..VFClaimSpec::default()
            },
        );
        found.metadata.uid = Some("copy".into());
        found
    };
    let copy = ours(&found(), &guest()).unwrap();
    assert_eq!(
        (copy.uid.as_str(), copy.claim_namespace.as_str()),
        ("copy", "team")
    );
    assert_eq!(
        (copy.claim_name.as_str(), copy.claim_uid.as_str()),
        ("fast", "u-1")
    );
    type Change = fn(&mut VFClaim);
    let changes: [Change; 4] = [
        |c| c.spec.guest = None,
        |c| c.spec.guest.as_mut().unwrap().cluster = "red".into(),
        |c| c.spec.guest.as_mut().unwrap().cluster_uid = "c-2".into(),
        |c| c.metadata.name = Some("vfc-u-2".into()),
    ];
    for (i, change) in changes.iter().enumerate() {
        let mut foreign = found();
        change(&mut foreign);
        assert_eq!(ours(&foreign, &guest()), None, "{i}");
    }
}

#[test]
fn a_mass_brakes_above_five_and_above_a_fifth() {
    for (copies, most) in [(0, 5), (6, 5), (29, 5), (30, 6), (34, 6), (100, 20)] {
        assert_eq!(limit(copies), most, "{copies}");
    }
    assert!(matches!(planned(&twice(answers(5, 6))), Plan::Delete(all) if all.len() == 5));
    assert!(matches!(planned(&twice(answers(20, 100))), Plan::Delete(all) if all.len() == 20));
    for (gone, all) in [(6, 6), (21, 100)] {
        let Plan::Brake(mass) = planned(&twice(answers(gone, all))) else {
            panic!("{gone} of {all}: no brake")
        };
        assert_eq!((mass.orphans.len(), mass.copies), (gone, all));
    }
}

#[test]
fn what_is_on_its_way_out_makes_no_room_for_more() {
    let mut looks = twice(answers(6, 30));
    assert!(matches!(planned(&looks), Plan::Delete(_)));
    looks.1.sights.get_mut("copy-0029").unwrap().copy.going = true;
    assert!(matches!(planned(&looks), Plan::Brake(_)));
}

#[test]
fn a_mass_that_is_only_half_seen_is_waited_for() {
    let mut some = answers(4, 20);
    some[4] = Answer::Unknown;
    assert!(matches!(planned(&twice(some.clone())), Plan::Delete(_)));
    some[5] = Answer::Unknown;
    let unsure = Plan::Unsure {
        orphans: 4,
        doubtful: 2,
    };
    assert_eq!(planned(&twice(some)), unsure);
    let nobody = vec![Answer::Unknown; 20];
    assert!(matches!(planned(&twice(nobody)), Plan::Unsure { .. }));
    // A cluster that was restored between the looks.
    let mut looks = twice(answers(2, 20));
    looks.1 = look(looks.1.begun, answers(9, 20));
    assert!(matches!(planned(&looks), Plan::Unsure { .. }));
}

#[test]
fn a_word_releases_the_set_it_was_given_for_and_no_other() {
    let braked = |looks: &(Look, Look), word: Option<&str>| match plan(
        CLUSTER, APART, &looks.0, &looks.1, word,
    ) {
        Plan::Brake(mass) => mass.word,
        Plan::DeleteReleased(mass) => format!("released {}", mass.orphans.len()),
        other => panic!("{other:?}"),
    };
    let eight = twice(answers(8, 20));
    let word = braked(&eight, None);
    assert!(word.starts_with("8-"), "{word}");
    assert_eq!(braked(&eight, Some(&word)), "released 8");
    for wrong in ["", "8", "8-", "true", "9-0000000000000000"] {
        assert_eq!(braked(&eight, Some(wrong)), word);
    }
    // More, and as many others.
    assert!(braked(&twice(answers(9, 20)), Some(&word)).starts_with("9-"));
    let mut others = answers(9, 20);
    others[0] = own(0);
    let other = braked(&twice(others), Some(&word));
    assert!(other.starts_with("8-") && other != word, "{other}");
}

#[test]
fn the_message_says_how_to_go_on_and_fits_an_event() {
    let Plan::Brake(mass) = planned(&twice(answers(2100, 10_000))) else {
        panic!("no brake")
    };
    let message = mass.message();
    let annotate = format!(
        "kubectl annotate namespace kube-system --overwrite \
         sriov.harvesterhci.io/delete-orphans={}",
        mass.word
    );
    assert!(message.contains(&annotate), "{message}");
    assert!(message.starts_with("2100 of this cluster's 10000 copies"));
    assert!(message.contains("more than 2000 are not"), "{message}");
    assert!(message.len() < 1024, "{}", message.len());
}

#[test]
fn a_cache_that_says_other_than_the_host_did_meanwhile_is_deaf() {
    let versions = |all: &[(&str, &str)]| -> Versions {
        let own = |(name, version): &(&str, &str)| ((*name).to_owned(), (*version).to_owned());
        all.iter().map(own).collect()
    };
    let (one, two) = (versions(&[("a", "1")]), versions(&[("a", "2")]));
    let none = Versions::new();
    for (before, listed, after, expected) in [
        (&one, &one, &one, false),
        (&one, &two, &one, true),
        (&one, &none, &one, true),
        (&none, &one, &none, true),
        // It hears, a little later or a little earlier.
        (&one, &two, &two, false),
        (&one, &none, &none, false),
        (&none, &one, &one, false),
        (&one, &one, &two, false),
        (&one, &one, &none, false),
    ] {
        assert_eq!(
            deaf(before, listed, after),
            expected,
            "{before:?} {listed:?}"
        );
    }
}

fn answer() -> impl Strategy<Value = u8> {
    prop_oneof![4 => Just(0_u8), 4 => Just(1), 1 => Just(2), 1 => Just(3)]
}

/// A look by dice: for each copy an answer, whether it is listed, and whether it is going.
fn dice() -> impl Strategy<Value = (Vec<(u8, bool, bool)>, u64, bool)> {
    let one = (
        answer(),
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.1),
    );
    let many = prop::collection::vec(one, 0..40);
    (many, 55_u64..70, prop::bool::weighted(0.95))
}

fn thrown(begun: Instant, (copies, _, same): &(Vec<(u8, bool, bool)>, u64, bool)) -> Look {
    let mut thrown = look(
        begun,
        copies
            .iter()
            .enumerate()
            .map(|(n, (answer, ..))| match answer {
                0 => own(n),
                1 => Answer::NotFound,
                2 => Answer::Claim("another".into()),
                _ => Answer::Unknown,
            }),
    );
    for (n, (_, listed, going)) in copies.iter().enumerate() {
        let uid = copy(n).uid;
        if !listed {
            thrown.sights.remove(&uid);
        } else if let Some(sight) = thrown.sights.get_mut(&uid) {
            sight.copy.going = *going;
        }
    }
    if !same {
        thrown.clusters[1] = "c-2".into();
    }
    thrown
}

proptest! {
    /// no-death-by-absence: whatever the answers, a copy goes only if its claim
    /// was said to be gone in both looks, and never many of them unasked.
    #[test]
    fn nothing_dies_that_was_seen_or_not_answered_for(
        dice in prop::collection::vec(dice(), 2..6),
        obey in any::<bool>(),
    ) {
        let mut now = Instant::now();
        let mut looks = Vec::new();
        for one in &dice {
            looks.push(thrown(now, one));
            now += Duration::from_secs(one.1);
        }
        let mut given = None;
        for pair in looks.windows(2) {
            let (first, second) = (&pair[0], &pair[1]);
            let release = given.as_deref().filter(|_| obey);
            let (deleted, asked) = match plan(CLUSTER, APART, first, second, release) {
                Plan::Delete(deleted) => (deleted, false),
                Plan::DeleteReleased(mass) => {
                    prop_assert_eq!(Some(mass.word.as_str()), release);
                    (mass.orphans, true)
                }
                Plan::Brake(mass) => {
                    given = Some(mass.word);
                    continue;
                }
                _ => continue,
            };
            let clusters = first.clusters.iter().chain(&second.clusters);
            prop_assert!(clusters.into_iter().all(|c| c == CLUSTER));
            prop_assert!(second.begun - first.ended >= APART);
            let copies = second.sights.values().filter(|s| !s.copy.going).count();
            prop_assert!(asked || deleted.len() <= 5.max(copies / 5));
            for gone in deleted {
                for look in [first, second] {
                    let sight = look.sights.get(&gone.uid);
                    prop_assert!(sight.is_some(), "unseen: {gone:?}");
                    let answer = &sight.unwrap().answer;
                    prop_assert!(*answer != Answer::Unknown, "unanswered: {gone:?}");
                    prop_assert!(*answer != Answer::Claim(gone.claim_uid.clone()), "alive: {gone:?}");
                }
                prop_assert!(!second.sights[&gone.uid].copy.going, "going: {gone:?}");
            }
        }
    }
}

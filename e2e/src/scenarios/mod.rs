//! The hardware scenarios: what each shows, and the registry the runner reads.
//!
//! A scenario is given a running data centre, leaves it as it found it, and fails with an
//! error that says what was seen.

mod changes;
mod clusters;
mod drivers;
mod gates;
mod guests;
mod holds;
mod hostile;
mod killed;
mod memory;
mod outages;
mod placement;
mod random;
mod real;
mod reclaim;
mod refusals;
mod release;
mod restarts;
mod several;
mod steps;
mod storage;
pub mod support;
mod traffic;

use std::time::Duration;

use futures::future::BoxFuture;

use crate::context::DataCentre;

/// What a scenario runs.
pub type Run = for<'a> fn(&'a DataCentre) -> BoxFuture<'a, anyhow::Result<()>>;

/// How much of the data centre a scenario needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// The two clusters.
    Clusters,
    /// L1, its VM and the deployed charts as well.
    Machines,
    /// The same in a boot of its own, without the driver of L1's one PF.
    BareMachines,
}

/// When a scenario runs that nobody has named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Always,
    /// It takes minutes: with `--long` only.
    Long,
    /// It takes as long as one likes: by its name only.
    Named,
}

impl When {
    /// Longest such a scenario may take.
    #[must_use]
    pub const fn limit(self) -> Duration {
        let minutes = match self {
            Self::Always | Self::Long => 15,
            Self::Named => 24 * 60,
        };
        Duration::from_secs(minutes * 60)
    }
}

/// One scenario.
#[derive(Clone, Copy)]
pub struct Scenario {
    pub needs: Needs,
    pub when: When,
    /// Short, unique, with hyphens.
    pub name: &'static str,
    /// What it shows, in one sentence.
    pub shows: &'static str,
    pub run: Run,
}

/// An entry of the registry for a body that works in a tidied laboratory.
macro_rules! scenario {
    ($name:literal, $shows:literal, $body:expr) => {
        $crate::scenarios::scenario!(Always, $name, $shows, $body)
    };
    ($when:ident, $name:literal, $shows:literal, $body:expr) => {
        Scenario {
            needs: $crate::scenarios::Needs::Machines,
            when: $crate::scenarios::When::$when,
            name: $name,
            shows: $shows,
            run: |dc| $crate::scenarios::support::run(dc, |lab| ($body)(lab).boxed()).boxed(),
        }
    };
}
use scenario;

/// All scenarios in the order they run.
#[must_use]
pub fn all() -> Vec<Scenario> {
    let mut all = Vec::new();
    for theme in [
        clusters::scenarios,
        real::scenarios,
        steps::scenarios,
        traffic::scenarios,
        release::scenarios,
        reclaim::scenarios,
        storage::scenarios,
        refusals::scenarios,
        gates::scenarios,
        guests::scenarios,
        holds::scenarios,
        drivers::scenarios,
        changes::scenarios,
        hostile::scenarios,
        restarts::scenarios,
        several::scenarios,
        placement::scenarios,
        killed::scenarios,
        memory::scenarios,
        outages::scenarios,
        random::scenarios,
    ] {
        all.extend(theme());
    }
    all
}

/// Those whose name is or, if none is, contains one of `words`; if there are no words, all
/// that need no more than `most`, the long ones only if asked for. An error names the word
/// that matches nothing.
pub fn matching(words: &[String], most: Needs, long: bool) -> anyhow::Result<Vec<Scenario>> {
    let all = all();
    for w in words {
        if !all.iter().any(|s| s.name.contains(w.as_str())) {
            let names: Vec<&str> = all.iter().map(|s| s.name).collect();
            anyhow::bail!(
                "no scenario is called like {w:?}; there are: {}",
                names.join(", ")
            );
        }
    }
    let means = |word: &str, name: &str| {
        name == word || (name.contains(word) && !all.iter().any(|s| s.name == word))
    };
    let wanted = |s: &Scenario| match words {
        [] => s.needs <= most && (s.when == When::Always || long && s.when == When::Long),
        words => words.iter().any(|w| means(w, s.name)),
    };
    Ok(all.iter().filter(|s| wanted(s)).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_a_word_that_matches_nothing_is_an_error() {
        let all = all();
        let names: HashSet<&str> = all.iter().map(|s| s.name).collect();
        assert_eq!(names.len(), all.len());
        let every = matching(&[], Needs::BareMachines, true).unwrap();
        let named = all.iter().filter(|s| s.when == When::Named).count();
        assert!(named > 0 && every.len() + named == all.len());
        let ordinary = matching(&[], Needs::Machines, false).unwrap();
        assert!(ordinary.iter().all(|s| s.when == When::Always) && ordinary.len() < all.len());
        let long = matching(&["killed-plugging".into()], Needs::Machines, false).unwrap();
        assert_eq!(long.len(), 1);
        let one = matching(&["packets-flow".into()], Needs::Machines, false).unwrap();
        assert_eq!(one.len(), 1);
        let two = matching(&["packets-".into()], Needs::Machines, false).unwrap();
        assert_eq!(two.len(), 2);
        let few = matching(&[], Needs::Clusters, true).unwrap();
        assert!(!few.is_empty() && few.len() < all.len());
        let Err(e) = matching(&["no-such-thing".into()], Needs::Machines, true) else {
            panic!("matched")
        };
        assert!(e.to_string().contains(all[0].name));
    }
}

//! What the probes answer: named checks, each set by the part it is about. A
//! process is ready when every check says so, and none is good by default.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// All checks of the process.
#[derive(Clone, Default)]
pub struct Health {
    checks: Arc<Mutex<BTreeMap<&'static str, Result<(), String>>>>,
}

/// One part's say.
#[derive(Clone)]
pub struct Check {
    health: Health,
    name: &'static str,
}

impl Health {
    /// A new check, failing with `why` until its owner says otherwise.
    #[must_use]
    pub fn check(&self, name: &'static str, why: &str) -> Check {
        let check = Check {
            health: self.clone(),
            name,
        };
        check.fail(why);
        check
    }

    /// `Err` lists the checks that fail, a line each.
    pub fn ready(&self) -> Result<(), String> {
        let checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
        let failing: Vec<String> = checks
            .iter()
            .filter_map(|(name, state)| state.as_ref().err().map(|why| format!("{name}: {why}\n")))
            .collect();
        if failing.is_empty() {
            Ok(())
        } else {
            Err(failing.concat())
        }
    }
}

impl Check {
    pub fn pass(&self) {
        self.set(Ok(()));
    }

    pub fn fail(&self, why: &str) {
        self.set(Err(why.to_owned()));
    }

    fn set(&self, state: Result<(), String>) {
        let mut checks = self
            .health
            .checks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        checks.insert(self.name, state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_when_every_check_passes() {
        let health = Health::default();
        let (one, two) = (health.check("one", "starting"), health.check("two", "cold"));
        assert_eq!(health.ready(), Err("one: starting\ntwo: cold\n".to_owned()));
        one.pass();
        assert_eq!(health.ready(), Err("two: cold\n".to_owned()));
        two.pass();
        assert_eq!(health.ready(), Ok(()));
        one.fail("lost");
        assert!(health.ready().is_err());
    }
}

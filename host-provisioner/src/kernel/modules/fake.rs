//! Modules in memory, for tests, with kmod's words.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{KmodError, ModuleFacts, ModuleName, ModuleState, Modules};
use crate::kernel::KernelError;

/// [`Modules`] in memory; clones share it.
#[derive(Clone, Debug, Default)]
pub struct FakeModules {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// The host's files: the parameters of each, and what a parameter shows when it is not given.
    files: BTreeMap<String, BTreeMap<String, String>>,
    loaded: BTreeMap<String, ModuleFacts>,
    refusals: BTreeMap<String, String>,
    /// Part of the kernel, without a folder in sysfs.
    built_in: BTreeSet<String>,
    /// Loading it does nothing, as the host's `modprobe.d` says.
    void: BTreeSet<String>,
    /// What was done, in order.
    done: Vec<String>,
}

impl FakeModules {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host has a file of this module, with these parameters and their defaults.
    pub fn file(&self, name: &str, parameters: &[(&str, &str)]) {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let parameters = parameters.iter().map(owned).collect();
        self.lock().files.insert(name.to_owned(), parameters);
    }

    /// The module is as said.
    pub fn give(&self, name: &str, facts: ModuleFacts) {
        self.lock().loaded.insert(name.to_owned(), facts);
    }

    /// Loading it fails with these words of kmod's, until they are taken back.
    pub fn refuse(&self, name: &str, words: Option<&str>) {
        let mut state = self.lock();
        match words {
            Some(words) => state.refusals.insert(name.to_owned(), words.to_owned()),
            None => state.refusals.remove(name),
        };
    }

    /// The module is part of the kernel and shows nothing of itself.
    pub fn build_in(&self, name: &str) {
        self.file(name, &[]);
        self.lock().built_in.insert(name.to_owned());
    }

    /// The host's `modprobe.d` has something else done in its place.
    pub fn replace_by_nothing(&self, name: &str) {
        self.file(name, &[]);
        self.lock().void.insert(name.to_owned());
    }

    /// What was done, in order: `load igb max_vfs=7`, `unload igb`.
    #[must_use]
    pub fn done(&self) -> Vec<String> {
        self.lock().done.clone()
    }
}

fn failed(program: &'static str, words: String) -> KmodError {
    KmodError::Failed { program, words }
}

impl Modules for FakeModules {
    fn module(&self, name: &ModuleName) -> Result<ModuleFacts, KernelError> {
        let state = self.lock();
        Ok(state.loaded.get(name.as_str()).cloned().unwrap_or_default())
    }

    fn parameters(&self, name: &ModuleName) -> Result<BTreeSet<String>, KmodError> {
        match self.lock().files.get(name.as_str()) {
            Some(file) => Ok(file.keys().cloned().collect()),
            None => Err(failed(
                "modinfo",
                format!("modinfo: ERROR: Module {name} not found."),
            )),
        }
    }

    fn built_in(&self, name: &ModuleName) -> Result<bool, KmodError> {
        Ok(self.lock().built_in.contains(name.as_str()))
    }

    fn load(
        &self,
        name: &ModuleName,
        parameters: &BTreeMap<String, String>,
    ) -> Result<(), KmodError> {
        let mut state = self.lock();
        if let Some(words) = state.refusals.get(name.as_str()) {
            return Err(failed("modprobe", words.clone()));
        }
        let Some(mut shown) = state.files.get(name.as_str()).cloned() else {
            let words =
                format!("modprobe: FATAL: Module {name} not found in directory /lib/modules/6");
            return Err(failed("modprobe", words));
        };
        let mut words = format!("load {name}");
        for (key, value) in parameters {
            words += &format!(" {key}={value}");
            shown.insert(key.clone(), value.clone());
        }
        state.done.push(words);
        if state.built_in.contains(name.as_str()) || state.void.contains(name.as_str()) {
            return Ok(());
        }
        // modprobe says nothing when the module is there, and changes nothing.
        let absent = || ModuleFacts {
            state: ModuleState::Live,
            parameters: shown,
            ..ModuleFacts::default()
        };
        let there = state.loaded.entry(name.as_str().to_owned());
        there.or_insert_with(absent);
        Ok(())
    }

    fn unload(&self, name: &ModuleName) -> Result<(), KmodError> {
        let mut state = self.lock();
        state.done.push(format!("unload {name}"));
        match state.loaded.remove(name.as_str()) {
            Some(_) => Ok(()),
            None => Err(failed(
                "modprobe",
                format!("modprobe: FATAL: Module {name} is not currently loaded"),
            )),
        }
    }
}

//! What is due for the modules that this node is to have. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use common::api::{DriverStatus, HostDriver, reason};
use kube::ResourceExt as _;
use serde::{Deserialize, Serialize};

use super::others::Theirs;

use crate::kernel::modules::{KmodError, ModuleFacts, ModuleName, ModuleState};

/// A `HostDriver` of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The object's name.
    pub name: String,
    pub generation: Option<i64>,
    pub module: ModuleName,
    pub parameters: BTreeMap<String, String>,
    /// Another `HostDriver` that is older has this module.
    pub conflict: Option<String>,
    /// The kernel-module operator's object that has it on this node.
    pub handed_over: Option<String>,
}

/// What the agent loaded a module with, and what the kernel showed right after. It is kept for
/// this boot: a module may hide its parameters, or make others of what it was given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    pub given: BTreeMap<String, String>,
    pub shown: BTreeMap<String, String>,
}

/// How a module is, as told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    pub ready: bool,
    pub reason: &'static str,
    pub message: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Due {
    Load,
    /// Unload it, then load it: it has other parameters, and nothing uses it.
    Reload,
    Nothing(Word),
}

/// The `HostDriver`s of a node with these labels, in the order in which they are loaded.
#[must_use]
pub fn wanted<'a>(
    drivers: impl IntoIterator<Item = &'a HostDriver>,
    theirs: &[Theirs],
    labels: &BTreeMap<String, String>,
) -> Vec<Wanted> {
    let selects = |selector: &BTreeMap<String, String>| {
        let mut all = selector.iter();
        all.all(|(key, value)| labels.get(key) == Some(value))
    };
    let mut mine: Vec<&HostDriver> = drivers
        .into_iter()
        .filter(|driver| driver.metadata.deletion_timestamp.is_none())
        .filter(|driver| selects(&driver.spec.node_selector))
        .collect();
    // Who came first has a module, so that a second wish disturbs nobody.
    mine.sort_by_key(|driver| (driver.creation_timestamp(), driver.name_any()));
    let mut first: HashMap<ModuleName, String> = HashMap::new();
    let mut found: Vec<(i32, Wanted)> = mine
        .into_iter()
        .map(|driver| {
            let module = ModuleName::new(&driver.spec.module);
            let name = driver.name_any();
            let owner = first.entry(module.clone()).or_insert_with(|| name.clone());
            let mut rivals = theirs.iter();
            let rival = rivals.find(|one| one.module == module && selects(&one.selector));
            let wanted = Wanted {
                handed_over: rival.map(|one| one.name.clone()),
                conflict: (*owner != name).then(|| owner.clone()),
                generation: driver.metadata.generation,
                module,
                parameters: driver.spec.parameters.clone(),
                name,
            };
            (driver.spec.order, wanted)
        })
        .collect();
    found.sort_by(|(a, one), (b, other)| (a, &one.name).cmp(&(b, &other.name)));
    found.into_iter().map(|(_, wanted)| wanted).collect()
}

/// What is due for one module, as the kernel has it.
#[must_use]
pub fn due(wanted: &Wanted, facts: &ModuleFacts, loaded: Option<&Loaded>) -> Due {
    if let Some(other) = &wanted.conflict {
        return not(
            reason::CONFLICT,
            format!(
                "HostDriver {other}, which is older, has module {}; delete one of them",
                wanted.module
            ),
        );
    }
    if let Some(rival) = &wanted.handed_over {
        let there = matches!(facts.state, ModuleState::Live | ModuleState::BuiltIn);
        let state = if there {
            "is there"
        } else {
            "is not there yet"
        };
        return Due::Nothing(Word {
            ready: there,
            reason: reason::HANDED_OVER,
            message: format!(
                "Module {rival} of the kernel-module operator loads {} on this node, so nothing is done here; the module {state}",
                wanted.module
            ),
        });
    }
    match facts.state {
        ModuleState::Absent => return Due::Load,
        ModuleState::Changing => {
            return not(
                reason::PENDING,
                format!(
                    "somebody is loading or unloading {}; it is looked at again",
                    wanted.module
                ),
            );
        }
        ModuleState::Live | ModuleState::BuiltIn => {}
    }
    let differ = differing(wanted, facts, loaded);
    let built_in = facts.state == ModuleState::BuiltIn;
    match (differ.as_slice(), built_in) {
        ([], true) => Due::Nothing(Word {
            ready: true,
            reason: reason::BUILT_IN,
            message: format!("{} is part of this node's kernel", wanted.module),
        }),
        ([], false) => Due::Nothing(Word {
            ready: true,
            reason: reason::LOADED,
            message: loaded_words(wanted, facts),
        }),
        (differ, true) => not(
            reason::BUILT_IN,
            format!(
                "{} is part of this node's kernel, so its parameters can only be given on the kernel's command line: {}",
                wanted.module,
                differ.join(", ")
            ),
        ),
        (_, false) if facts.users.is_empty() => Due::Reload,
        (differ, false) => not(
            reason::MODULE_IN_USE,
            format!(
                "{} is loaded with other parameters ({}) and in use by {}; it is loaded again when nothing uses it",
                wanted.module,
                differ.join(", "),
                facts.users.join(", ")
            ),
        ),
    }
}

fn not(reason: &'static str, message: String) -> Due {
    Due::Nothing(Word {
        ready: false,
        reason,
        message,
    })
}

/// The parameters that are not as asked for, in words.
fn differing(wanted: &Wanted, facts: &ModuleFacts, loaded: Option<&Loaded>) -> Vec<String> {
    // As we left it: what the module made of what it was given is its own affair.
    let ours = loaded.filter(|loaded| loaded.shown == facts.parameters);
    let differs = |(name, want): (&String, &String)| {
        let given = ours.and_then(|loaded| loaded.given.get(name));
        let have = given.or_else(|| facts.parameters.get(name));
        match have {
            Some(have) if same(want, have) => None,
            Some(have) => Some(format!("{name} is {have}, wanted {want}")),
            None => Some(format!("{name} is hidden, wanted {want}")),
        }
    };
    let mut words: Vec<String> = wanted.parameters.iter().filter_map(differs).collect();
    // Given by us and asked for no more: it is the module's default again when it is reloaded.
    let dropped = ours.into_iter().flat_map(|loaded| &loaded.given);
    let dropped = dropped.filter(|(name, _)| !wanted.parameters.contains_key(*name));
    words.extend(dropped.map(|(name, value)| format!("{name} is {value}, not wanted any more")));
    words
}

/// Whether the kernel shows `have` for a parameter that was given as `want`: it writes truth as
/// Y and N and numbers in tens, and takes more (lib/kstrtox.c, `kstrtobool`).
fn same(want: &str, have: &str) -> bool {
    if want == have {
        return true;
    }
    if let (Some(want), Some(have)) = (number(want), number(have)) {
        return want == have;
    }
    matches!(have, "Y" | "N") && truth(want).is_some_and(|yes| yes == (have == "Y"))
}

fn number(text: &str) -> Option<i128> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text),
    };
    let hex = digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"));
    let value = match hex {
        Some(hex) => i128::from_str_radix(hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => i128::from_str_radix(digits, 8),
        None => digits.parse(),
    };
    value.ok().map(|value| sign * value)
}

fn truth(text: &str) -> Option<bool> {
    match text {
        "" | "1" | "y" | "Y" | "t" | "T" | "on" | "On" | "ON" | "oN" => Some(true),
        "0" | "n" | "N" | "f" | "F" | "of" | "off" | "Off" | "OFF" => Some(false),
        _ => None,
    }
}

fn loaded_words(wanted: &Wanted, facts: &ModuleFacts) -> String {
    let mut words = format!("{} is loaded", wanted.module);
    let other = wanted.parameters.iter().filter_map(|(name, want)| {
        let have = facts.parameters.get(name)?;
        (!same(want, have)).then(|| format!("it was given {name}={want} and shows {have}"))
    });
    for one in other {
        words += "; ";
        words += &one;
    }
    words
}

/// The parameters that the module's file does not have.
#[must_use]
pub fn unknown(wanted: &Wanted, known: &BTreeSet<String>) -> Option<Word> {
    let names = wanted.parameters.keys();
    let strange: Vec<&str> = names
        .filter(|n| !known.contains(*n))
        .map(String::as_str)
        .collect();
    if strange.is_empty() {
        return None;
    }
    let has = match known.is_empty() {
        true => "none".to_owned(),
        false => known
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", "),
    };
    Some(Word {
        ready: false,
        reason: reason::PARAMETER_UNKNOWN,
        message: format!(
            "{} of this node's kernel has no parameter {}, so it is not loaded; it has {has}",
            wanted.module,
            strange.join(", ")
        ),
    })
}

/// What is told when kmod had nothing to say and the kernel shows no such module.
#[must_use]
pub fn nothing_loaded(wanted: &Wanted, built_in: bool) -> Word {
    let module = &wanted.module;
    if built_in {
        return Word {
            ready: true,
            reason: reason::BUILT_IN,
            message: format!("{module} is part of this node's kernel"),
        };
    }
    Word {
        ready: false,
        reason: reason::LOAD_FAILED,
        message: format!(
            "modprobe {module} ended well and loaded nothing; look for an install line or an alias of it in the host's /etc/modprobe.d"
        ),
    }
}

/// What is told when kmod did not do it.
#[must_use]
pub fn failure(wanted: &Wanted, error: &KmodError, kernel: &str, lockdown: Option<&str>) -> Word {
    let module = &wanted.module;
    let said = match error {
        KmodError::Stuck { .. } => {
            return Word {
                ready: false,
                reason: reason::BROKEN,
                message: format!(
                    "{module}: {error}; it is left alone until that ends, or the host is started again"
                ),
            };
        }
        KmodError::Failed { words, .. } => words.as_str(),
    };
    let says = |words: &[&str]| words.iter().any(|w| said.contains(w));
    let (reason, message) = if says(&["not found in directory", "not found."]) {
        (
            reason::MODULE_NOT_FOUND,
            format!(
                "this host has no module {module} for its kernel {kernel}; install it, or leave this node out by nodeSelector"
            ),
        )
    } else if says(&[
        "Key was rejected",
        "Required key not available",
        "Operation not permitted",
    ]) {
        // ENOKEY, EKEYREJECTED and EPERM of finit_module (kernel/module/signing.c).
        (
            reason::MODULE_REFUSED,
            format!(
                "the kernel takes no such module (lockdown: {}); sign it with a key that the machine's owner has enrolled (mokutil --import), or turn Secure Boot off: {said}",
                lockdown.unwrap_or("none")
            ),
        )
    } else {
        (reason::LOAD_FAILED, format!("{module}: {said}"))
    };
    Word {
        ready: false,
        reason,
        message,
    }
}

/// The longest message that the API takes, in characters.
const MOST_WORDS: usize = 1024;

/// A module's line in the node's report.
#[must_use]
pub fn line(wanted: &Wanted, word: Word) -> DriverStatus {
    DriverStatus {
        name: wanted.name.clone(),
        module: wanted.module.to_string(),
        ready: word.ready,
        reason: word.reason.to_owned(),
        message: word.message.chars().take(MOST_WORDS).collect(),
        observed_generation: wanted.generation,
    }
}

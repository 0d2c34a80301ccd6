//! Sets of CPUs as the kernel writes them (`0-3,8`), and what they say of NUMA nodes. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::str::FromStr;

use thiserror::Error;

/// No list of CPUs.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no list of CPUs as in 0-3,8")]
pub struct CpuListError(String);

/// Numbers of CPUs; may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuList(Vec<RangeInclusive<u32>>);

impl CpuList {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those of `other` too.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Whether a CPU is in both.
    #[must_use]
    pub fn meets(&self, other: &Self) -> bool {
        let meet = |a: &RangeInclusive<u32>, b: &RangeInclusive<u32>| {
            a.start() <= b.end() && b.start() <= a.end()
        };
        self.0.iter().any(|a| other.0.iter().any(|b| meet(a, b)))
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    /// As `bitmap_list_string` writes it (lib/bitmap-str.c); the empty text is no CPU.
    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let bad = || CpuListError(text.to_owned());
        let number = |part: &str| {
            let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| part.parse().ok()).flatten().ok_or_else(bad)
        };
        if text.is_empty() {
            return Ok(Self::default());
        }
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = number(first)?..=number(last)?;
            if range.is_empty() {
                Err(bad())
            } else {
                Ok(range)
            }
        };
        text.split(',')
            .map(range)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// The NUMA nodes on which a VM with these CPUs runs, of `nodes` with their CPUs. Empty where
/// that says nothing: its CPUs are not known, or it may run on all of them.
#[must_use]
pub fn nodes_of(cpus: &CpuList, nodes: &BTreeMap<u16, CpuList>) -> BTreeSet<u16> {
    let with_cpus = nodes.iter().filter(|(_, own)| !own.is_empty());
    let with_cpus: Vec<(&u16, &CpuList)> = with_cpus.collect();
    let met = with_cpus.iter().filter(|(_, own)| own.meets(cpus));
    let met: BTreeSet<u16> = met.map(|(node, _)| **node).collect();
    if met.len() == with_cpus.len() {
        return BTreeSet::new();
    }
    met
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    #[test]
    fn a_list_is_what_the_kernel_writes() {
        assert!(list("").is_empty());
        let some = list("0-3,8,10-11");
        for cpu in ["0", "2", "3", "8", "11", "9-10", "0-200"] {
            assert!(some.meets(&list(cpu)), "{cpu}");
        }
        for cpu in ["", "4-7", "9", "12-4294967295"] {
            assert!(!some.meets(&list(cpu)), "{cpu}");
        }
        for text in [
            "-",
            "1-",
            "3-1",
            ",",
            "1,",
            "+1",
            " 1",
            "0-3\n",
            "4294967296",
            "0x1",
        ] {
            assert!(text.parse::<CpuList>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_vm_is_on_the_nodes_of_its_cpus_unless_they_are_all() {
        let nodes = BTreeMap::from([(0, list("0-3,8-11")), (1, list("4-7,12-15"))]);
        assert_eq!(nodes_of(&list("4,12"), &nodes), [1].into());
        assert_eq!(nodes_of(&list("0-3"), &nodes), [0].into());
        for cpus in ["0-15", "3-4", "", "99"] {
            assert!(nodes_of(&list(cpus), &nodes).is_empty(), "{cpus}");
        }
        // Memory without CPUs is no node to be on.
        let mut with_memory = nodes.clone();
        with_memory.insert(2, list(""));
        assert!(nodes_of(&list("0-15"), &with_memory).is_empty());
        assert_eq!(nodes_of(&list("5"), &with_memory), [1].into());
        assert!(nodes_of(&list("0"), &BTreeMap::new()).is_empty());
    }

    proptest! {
        #[test]
        fn any_text_ends_in_an_answer(text in "[0-9,\\-]{0,12}|.{0,12}") {
            if let Ok(list) = text.parse::<CpuList>() {
                prop_assert_eq!(list.is_empty(), text.is_empty());
                prop_assert_eq!(list.meets(&list), !text.is_empty());
            }
        }
    }
}

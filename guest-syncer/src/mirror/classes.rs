//! The mirrored classes, decided: which `VFClass` objects the guest should have.
//!
//! Pure. They are for information: the host never trusts a guest's class.

use std::collections::{BTreeMap, BTreeSet};

use common::api::{
    ClassSummary, DEFAULT_CLASS_ANNOTATION, MIRRORED_LABEL, PfSelector, VFClass, VFClassSpec,
    VFClassStatus,
};
use kube::ResourceExt as _;

/// One thing to do in the guest cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum ClassAction {
    /// With its status, which is a write of its own.
    Create(Box<VFClass>),
    /// Replace ours, read at this UID and resourceVersion, and its status if that differs too.
    Replace(Box<VFClass>),
    /// Replace the status of ours, read at this UID and resourceVersion.
    Report(Box<VFClass>),
    /// Delete ours, if it is still the one with this UID.
    Delete { name: String, uid: String },
    /// A class of that name is not ours: left alone, and said.
    Conflict { name: String },
}

/// What to do so that the guest's classes are those that the host lists.
///
/// `listed` is `None` when the host has not said anything yet, which is no
/// reason to delete what an earlier answer brought.
#[must_use]
pub fn plan(
    cluster: &str,
    listed: Option<&[ClassSummary]>,
    present: &[VFClass],
) -> Vec<ClassAction> {
    let Some(listed) = listed else {
        return Vec::new();
    };
    let by_name: BTreeMap<String, &VFClass> = present.iter().map(|c| (c.name_any(), c)).collect();
    let names: BTreeSet<&str> = listed.iter().map(|c| c.name.as_str()).collect();
    let mut actions = Vec::new();
    for summary in listed {
        let wanted = mirrored(cluster, summary);
        match by_name.get(&summary.name) {
            None => actions.push(ClassAction::Create(Box::new(wanted))),
            Some(found) if !ours(cluster, found) => actions.push(ClassAction::Conflict {
                name: summary.name.clone(),
            }),
            Some(found) => actions.extend(behind(found, wanted)),
        }
    }
    for found in present {
        let name = found.name_any();
        if ours(cluster, found) && !names.contains(name.as_str()) {
            let uid = found.uid().unwrap_or_default();
            actions.push(ClassAction::Delete { name, uid });
        }
    }
    actions
}

/// Whether the syncer of `cluster` made this class.
#[must_use]
pub fn ours(cluster: &str, class: &VFClass) -> bool {
    class
        .labels()
        .get(MIRRORED_LABEL)
        .is_some_and(|l| l == cluster)
}

fn mirrored(cluster: &str, summary: &ClassSummary) -> VFClass {
    let mut class = VFClass::new(
        &summary.name,
        VFClassSpec {
            description: summary.description.clone(),
            pf_selector: PfSelector::default(),
            network: summary.network.clone(),
            storage: summary.storage.clone(),
            allowed_overrides: summary.allowed_overrides.clone(),
            num_vfs: None,
            reclaim_policy: summary.reclaim_policy,
            placement: summary.placement,
        },
    );
    class.status = summary.free.map(|free| VFClassStatus {
        free: Some(free),
        ..VFClassStatus::default()
    });
    class.metadata.labels = Some([(MIRRORED_LABEL.to_owned(), cluster.to_owned())].into());
    if summary.default {
        class
            .annotations_mut()
            .insert(DEFAULT_CLASS_ANNOTATION.to_owned(), "true".to_owned());
    }
    class
}

/// How `found` is brought up to `wanted`; `None` when it says all of it already.
fn behind(found: &VFClass, wanted: VFClass) -> Option<ClassAction> {
    let default = |c: &VFClass| c.annotations().get(DEFAULT_CLASS_ANNOTATION).cloned();
    let same = found.spec == wanted.spec && default(found) == default(&wanted);
    if same && !is_other(found.status.as_ref(), wanted.status.as_ref()) {
        return None;
    }
    let mut next = found.clone();
    next.status.clone_from(&wanted.status);
    if same {
        return Some(ClassAction::Report(Box::new(next)));
    }
    match default(&wanted) {
        Some(yes) => next
            .annotations_mut()
            .insert(DEFAULT_CLASS_ANNOTATION.to_owned(), yes),
        None => next.annotations_mut().remove(DEFAULT_CLASS_ANNOTATION),
    };
    next.spec = wanted.spec;
    Some(ClassAction::Replace(Box::new(next)))
}

/// Whether the status is to be written. One without a word in it is none.
#[must_use]
pub fn is_other(found: Option<&VFClassStatus>, wanted: Option<&VFClassStatus>) -> bool {
    let nothing = VFClassStatus::default();
    found.unwrap_or(&nothing) != wanted.unwrap_or(&nothing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::api::{NetworkField, Placement, ReclaimPolicy};

    fn summary(name: &str) -> ClassSummary {
        ClassSummary {
            name: name.into(),
            uid: "host-uid".into(),
            description: Some("fast".into()),
            network: Default::default(),
            storage: None,
            allowed_overrides: vec![NetworkField::Vlan],
            reclaim_policy: ReclaimPolicy::Retain,
            placement: Placement::Spread,
            free: Some(5),
            default: false,
        }
    }

    fn stored(name: &str) -> VFClass {
        let mut class = mirrored("blue", &summary(name));
        class.metadata.uid = Some(format!("uid-{name}"));
        class.metadata.resource_version = Some("5".into());
        class
    }

    #[test]
    fn what_is_listed_is_made_without_selectors() {
        let actions = plan("blue", Some(&[summary("gold")]), &[]);
        let [ClassAction::Create(class)] = actions.as_slice() else {
            panic!("{actions:?}")
        };
        assert_eq!(class.name_any(), "gold");
        assert_eq!(class.spec.pf_selector, PfSelector::default());
        assert_eq!(class.spec.allowed_overrides, vec![NetworkField::Vlan]);
        assert_eq!(class.spec.placement, Placement::Spread);
        assert_eq!(class.status.as_ref().unwrap().free, Some(5));
        assert!(ours("blue", class));
    }

    #[test]
    fn what_is_there_and_right_is_left() {
        assert_eq!(
            plan("blue", Some(&[summary("gold")]), &[stored("gold")]),
            vec![]
        );
    }

    #[test]
    fn a_change_replaces_the_object_that_was_read() {
        let mut changed = summary("gold");
        changed.default = true;
        changed.free = Some(4);
        let actions = plan("blue", Some(&[changed]), &[stored("gold")]);
        let [ClassAction::Replace(class)] = actions.as_slice() else {
            panic!("{actions:?}")
        };
        assert_eq!(class.metadata.uid.as_deref(), Some("uid-gold"));
        assert_eq!(class.metadata.resource_version.as_deref(), Some("5"));
        assert_eq!(class.annotations()[DEFAULT_CLASS_ANNOTATION], "true");
        assert_eq!(class.status.as_ref().unwrap().free, Some(4));
        // And back again.
        let actions = plan("blue", Some(&[summary("gold")]), &[(**class).clone()]);
        let [ClassAction::Replace(class)] = actions.as_slice() else {
            panic!("{actions:?}")
        };
        assert!(!class.annotations().contains_key(DEFAULT_CLASS_ANNOTATION));
    }

    #[test]
    fn another_number_is_a_report_and_nothing_of_the_host_comes_with_it() {
        let mut changed = summary("gold");
        changed.free = Some(6);
        let actions = plan("blue", Some(&[changed.clone()]), &[stored("gold")]);
        let [ClassAction::Report(class)] = actions.as_slice() else {
            panic!("{actions:?}")
        };
        assert_eq!(class.metadata.resource_version.as_deref(), Some("5"));
        let status = class.status.clone().unwrap();
        assert_eq!(
            (status.free, status.nodes, status.observed_generation),
            (Some(6), vec![], None)
        );
        assert_eq!(plan("blue", Some(&[changed]), &[(**class).clone()]), vec![]);
        // An older host does not say it: what was said is taken back, and only once.
        let mut silent = summary("gold");
        silent.free = None;
        let actions = plan("blue", Some(&[silent.clone()]), &[stored("gold")]);
        let [ClassAction::Report(class)] = actions.as_slice() else {
            panic!("{actions:?}")
        };
        let mut emptied = (**class).clone();
        emptied.status = Some(VFClassStatus::default());
        assert_eq!(plan("blue", Some(&[silent]), &[emptied]), vec![]);
    }

    #[test]
    fn only_ours_go_and_only_when_the_host_has_spoken() {
        let mut tenants = stored("silver");
        tenants.metadata.labels = None;
        let mut others = stored("bronze");
        others
            .labels_mut()
            .insert(MIRRORED_LABEL.into(), "red".into());
        let present = [stored("gold"), tenants, others];
        assert_eq!(plan("blue", None, &present), vec![]);
        assert_eq!(
            plan("blue", Some(&[]), &present),
            vec![ClassAction::Delete {
                name: "gold".into(),
                uid: "uid-gold".into()
            }]
        );
    }

    #[test]
    fn a_foreign_class_of_the_name_is_a_conflict() {
        let mut foreign = stored("gold");
        foreign.metadata.labels = None;
        assert_eq!(
            plan("blue", Some(&[summary("gold")]), &[foreign]),
            vec![ClassAction::Conflict {
                name: "gold".into()
            }]
        );
    }
}

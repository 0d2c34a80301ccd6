//! The two kinds of status write: a decision (compare-and-swap) and a report
//! (server-side applied, one field manager a program, own conditions only).

use std::fmt::Debug;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::core::Status;
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::error::is_conflict;
use crate::api::{NewCondition, condition, set_condition};

/// How often a report is sent when others keep writing to its object.
const REPORT_TRIES: usize = 5;

/// Writes a decision into `/status`: `fields` are merged (a null clears), on the
/// object as it was `seen`.
///
/// The request carries the seen uid and resourceVersion. 409 means that the
/// object has changed or was made anew: read again and plan again
/// ([`super::is_conflict`]).
pub async fn decide<K>(
    api: &Api<K>,
    seen: &K,
    manager: &str,
    fields: &Value,
) -> Result<K, kube::Error>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let patch = json!({
        "metadata": {
            "uid": seen.meta().uid,
            "resourceVersion": seen.meta().resource_version,
        },
        "status": fields,
    });
    let params = PatchParams {
        field_manager: Some(manager.to_owned()),
        ..PatchParams::default()
    };
    api.patch_status(&seen.name_any(), &params, &Patch::Merge(patch))
        .await
}

/// The JSON merge patch (RFC 7396) that makes `from` into `to`: what `to` lacks
/// is nulled, also inside objects. `None` when they are equal.
#[must_use]
pub fn merge_diff(from: &Value, to: &Value) -> Option<Value> {
    if from == to {
        return None;
    }
    let (Value::Object(old), Value::Object(new)) = (from, to) else {
        return Some(to.clone());
    };
    let gone = old
        .keys()
        .filter(|key| !new.contains_key(*key))
        .map(|key| (key.clone(), Value::Null));
    let changed = new.iter().filter_map(|(key, value)| {
        let before = old.get(key).unwrap_or(&Value::Null);
        merge_diff(before, value).map(|patch| (key.clone(), patch))
    });
    Some(Value::Object(gone.chain(changed).collect()))
}

/// What one program says of an object.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The program's field manager, one and the same for all it reports.
    pub manager: &'static str,
    /// Every condition type that the program writes. One that is not in
    /// `conditions` is taken away.
    pub owned: &'static [&'static str],
    pub conditions: Vec<NewCondition>,
    /// `metadata.generation` of the spec that this is about.
    pub observed_generation: Option<i64>,
    /// Other fields of status that the program reports (never decisions). All
    /// of them each time: what is left out is taken away, as server-side apply
    /// does it.
    pub fields: Map<String, Value>,
}

/// The conditions to apply, or `None` when nothing would change. `existing` are
/// all conditions of the object; transition times are kept while a status stays.
#[must_use]
pub fn plan_conditions(
    report: &Report,
    existing: &[Condition],
    now: &Time,
) -> Option<Vec<Condition>> {
    let mut own: Vec<Condition> = existing
        .iter()
        .filter(|c| report.conditions.iter().any(|n| n.type_ == c.type_))
        .cloned()
        .collect();
    let mut changed = report.owned.iter().any(|type_| {
        condition(existing, type_).is_some() && !report.conditions.iter().any(|n| n.type_ == *type_)
    });
    for new in &report.conditions {
        changed |= set_condition(&mut own, new, report.observed_generation, now);
    }
    changed.then_some(own)
}

/// Applies a report to `/status`; `None`, and no request, when the object as
/// `seen` says all of it already (`seen_fields` are the values in it of
/// `report.fields`).
///
/// An object made anew under that name is not written to: 409. The fence is the
/// resourceVersion, because an API server does not compare a uid that is applied
/// to `/status` (its status strategy puts the stored metadata back first; seen
/// on 1.36). A report does not compete with other writers, though: when they
/// were quicker and it is still the same object, it is sent again.
pub async fn report<K>(
    api: &Api<K>,
    seen: &K,
    conditions: &[Condition],
    seen_fields: &Map<String, Value>,
    report: &Report,
) -> Result<Option<K>, kube::Error>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let now = Time(Timestamp::now());
    let planned = plan_conditions(report, conditions, &now);
    if planned.is_none() && *seen_fields == report.fields {
        return Ok(None);
    }
    // Applied in full each time: what is not in an apply is given up.
    let own = planned.unwrap_or_else(|| {
        let owned = |c: &&Condition| report.owned.contains(&c.type_.as_str());
        conditions.iter().filter(owned).cloned().collect()
    });
    let mut status = report.fields.clone();
    // A kind without conditions has no such field.
    if !report.owned.is_empty() {
        status.insert("conditions".to_owned(), json!(own));
    }
    let name = seen.name_any();
    let params = PatchParams::apply(report.manager).force();
    let mut version = seen.resource_version();
    for _ in 0..REPORT_TRIES {
        let patch = json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": {"name": name, "resourceVersion": version},
            "status": status,
        });
        match api.patch_status(&name, &params, &Patch::Apply(patch)).await {
            Err(error) if is_conflict(&error) => {
                let latest = api.get(&name).await?;
                if latest.uid() != seen.uid() {
                    return Err(error);
                }
                version = latest.resource_version();
            }
            done => return done.map(Some),
        }
    }
    Err(kube::Error::Api(Box::new(
        Status::failure("the object kept changing under its report", "Conflict").with_code(409),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ConditionStatus, type_};

    fn report(status: ConditionStatus, message: &str) -> Report {
        Report {
            manager: "test",
            owned: &[type_::ADMITTED, type_::RESOLVED],
            conditions: vec![NewCondition::new(type_::ADMITTED, status, "Why", message)],
            observed_generation: Some(1),
            fields: Map::new(),
        }
    }

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn a_merge_patch_nulls_what_goes_and_leaves_the_rest_out() {
        let from = json!({"a": 1, "b": {"c": 1, "d": 2}, "e": [1]});
        let to = json!({"a": 1, "b": {"c": 3}, "e": [1, 2], "f": {"g": 1}});
        let patch = merge_diff(&from, &to).unwrap();
        assert_eq!(
            patch,
            json!({"b": {"c": 3, "d": null}, "e": [1, 2], "f": {"g": 1}})
        );
        assert_eq!(merge_diff(&to, &to), None);
    }

    #[test]
    fn an_unchanged_report_is_no_write_and_times_move_with_the_status_alone() {
        let first = report(ConditionStatus::False, "no");
        let one = plan_conditions(&first, &[], &at(1)).unwrap();
        assert_eq!(plan_conditions(&first, &one, &at(2)), None);

        let reworded = report(ConditionStatus::False, "still no");
        let two = plan_conditions(&reworded, &one, &at(3)).unwrap();
        assert_eq!(two[0].last_transition_time, at(1));

        let turned = report(ConditionStatus::True, "yes");
        let three = plan_conditions(&turned, &two, &at(4)).unwrap();
        assert_eq!(three[0].last_transition_time, at(4));
    }

    #[test]
    fn a_condition_no_longer_said_is_taken_away_and_others_are_not_ours() {
        let now = at(1);
        let one = plan_conditions(&report(ConditionStatus::True, "yes"), &[], &now).unwrap();
        let mut with_others = one.clone();
        with_others.push(Condition {
            type_: type_::READY.to_owned(),
            ..one[0].clone()
        });
        let same = report(ConditionStatus::True, "yes");
        assert_eq!(plan_conditions(&same, &with_others, &now), None);
        with_others.push(Condition {
            type_: type_::RESOLVED.to_owned(),
            ..one[0].clone()
        });
        assert_eq!(plan_conditions(&same, &with_others, &now), Some(one));
    }
}

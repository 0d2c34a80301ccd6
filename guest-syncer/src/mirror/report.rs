//! The guest claim's status, written: compare-and-swap by the only writer, and
//! an event where a person should look.

use common::api::{
    ConditionStatus, NewCondition, VFClaim, VFClaimStatus, condition, reason, type_,
};
use common::kube::events::Events;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use kube::{Client, Resource as _, ResourceExt as _};

use super::down::{HostView, wanted_status, writes};

/// Something that a person should hear of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub warning: bool,
    pub reason: String,
    pub note: String,
}

/// Brings the claim's status up to what is known; an unchanged one is not written.
///
/// The write carries the uid and resourceVersion that were read, so it neither
/// overwrites what it did not see nor reaches a new claim of the old name.
pub async fn report(
    client: &Client,
    events: &Events,
    claim: &VFClaim,
    host: HostView<'_>,
    synced: &NewCondition,
) -> Result<(), kube::Error> {
    let wanted = wanted_status(claim, host, synced, &Time(Timestamp::now()));
    let told = notices(claim.status.as_ref(), &wanted);
    let api: Api<VFClaim> = Api::namespaced(client.clone(), &claim.namespace().unwrap_or_default());
    let params = PostParams {
        field_manager: Some(super::MANAGER.to_owned()),
        ..PostParams::default()
    };
    let mut current = claim.clone();
    for status in writes(claim.status.as_ref(), wanted) {
        current.status = Some(status);
        current = api
            .replace_status(&claim.name_any(), &params, &current)
            .await?;
    }
    let about = claim.object_ref(&());
    for notice in told {
        if notice.warning {
            events
                .warning(&about, "Sync", &notice.reason, &notice.note)
                .await;
        } else {
            events
                .normal(&about, "Sync", &notice.reason, &notice.note)
                .await;
        }
    }
    Ok(())
}

/// What is new between two statuses and worth an event: a refusal of a new
/// kind, and getting ready. Waiting is not news.
#[must_use]
pub fn notices(old: Option<&VFClaimStatus>, new: &VFClaimStatus) -> Vec<Notice> {
    let was = |t: &str| old.and_then(|s| condition(&s.conditions, t));
    let mut told: Vec<Notice> = Vec::new();
    for type_ in [type_::SYNCED, type_::READY] {
        let Some(c) = condition(&new.conditions, type_) else {
            continue;
        };
        let same = was(type_).is_some_and(|o| o.status == c.status && o.reason == c.reason);
        let quiet = [reason::PENDING, reason::RELEASING].contains(&c.reason.as_str());
        let ready = c.status == ConditionStatus::True.as_str();
        if same || quiet || (ready && type_ != type_::READY) {
            continue;
        }
        let notice = Notice {
            warning: !ready,
            reason: c.reason.clone(),
            note: c.message.clone(),
        };
        if !told.contains(&notice) {
            told.push(notice);
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

    fn status(conditions: &[(&str, &str, &str)]) -> VFClaimStatus {
        let conditions = conditions
            .iter()
            .map(|(t, status, reason)| Condition {
                type_: (*t).into(),
                status: (*status).into(),
                reason: (*reason).into(),
                message: "m".into(),
                observed_generation: None,
                last_transition_time: Time(Timestamp::UNIX_EPOCH),
            })
            .collect();
        VFClaimStatus {
            conditions,
            ..VFClaimStatus::default()
        }
    }

    #[test]
    fn a_refusal_is_told_once_and_waiting_never() {
        let refused = status(&[
            ("Synced", "False", "NodeNotFound"),
            ("Ready", "False", "NodeNotFound"),
        ]);
        let told = notices(None, &refused);
        assert_eq!(told.len(), 1);
        assert!(told[0].warning && told[0].reason == "NodeNotFound");
        assert_eq!(notices(Some(&refused), &refused), vec![]);
        let waiting = status(&[("Synced", "True", "Synced"), ("Ready", "False", "Pending")]);
        assert_eq!(notices(Some(&refused), &waiting), vec![]);
        let ready = status(&[("Synced", "True", "Synced"), ("Ready", "True", "Ready")]);
        let told = notices(Some(&waiting), &ready);
        assert_eq!(
            (told.len(), told[0].warning, told[0].reason.as_str()),
            (1, false, "Ready")
        );
    }
}

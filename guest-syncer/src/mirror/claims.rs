//! One claim, brought one step on: fetch, plan, apply, report. Writes the
//! guest's claim (finalizer, status) and, through `host_claims`, its copy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::api::{
    ConditionStatus, GUEST_FINALIZER, NewCondition, VFClaim, host_claim_name, reason, type_,
};
use common::kube::events::Events;
use common::kube::{Backoff, ErrorClass, class_of, finalizer};
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Client, ResourceExt as _};
use tokio::sync::Notify;

use super::down::HostView;
use super::host_claims::{Created, HostClaims};
use super::report::report;
use super::up::{self, GuestId, Release, Up, owned, plan, target};
use crate::host_link::{Facts, HostLink, Trouble};

/// A claim that may not parse: one of a newer version must not stop the others.
pub type Guarded = DeserializeGuard<VFClaim>;

/// While a release is under way: the host's watch says when it is done, this
/// is for the case that its word was lost.
const RELEASE_LOOK: Duration = Duration::from_secs(30);
/// After a write that lost a race; the winner's event comes sooner.
const RACE_LOOK: Duration = Duration::from_secs(1);
/// How many looks a step may take at a host that changes meanwhile.
const LOOKS: usize = 3;

/// What every reconcile needs.
pub struct Context {
    pub guest: Client,
    pub host: Arc<HostLink>,
    /// Name of our `GuestCluster`.
    pub cluster: String,
    /// UID of this cluster's kube-system namespace.
    pub cluster_uid: String,
    pub nodes: Store<Node>,
    /// The host's copies as last seen.
    pub copies: Store<Guarded>,
    /// Whether `copies` has been filled once: before, it proves nothing.
    pub copies_listed: AtomicBool,
    /// Has `copies` filled anew.
    pub relist: Arc<Notify>,
    pub events: Events,
    /// By UID of the guest's claim.
    pub backoff: Backoff<String>,
}

/// Why a reconcile ended early: the guest's API server did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what}: {source}")]
    Guest {
        what: &'static str,
        source: Box<kube::Error>,
    },
    #[error("the cache of nodes has ended")]
    Nodes(#[from] kube::runtime::reflector::store::WriterDropped),
}

fn guest(what: &'static str) -> impl FnOnce(kube::Error) -> Error {
    move |source| Error::Guest {
        what,
        source: Box::new(source),
    }
}

/// Brings one claim a step on.
pub async fn reconcile(claim: Arc<Guarded>, ctx: Arc<Context>) -> Result<Action, Error> {
    let claim = match &claim.0 {
        Ok(claim) => claim,
        Err(invalid) => {
            tracing::error!(
                claim = invalid.metadata.name,
                namespace = invalid.metadata.namespace,
                error = invalid.error,
                "a VFClaim cannot be read; it is left alone"
            );
            return Ok(Action::await_change());
        }
    };
    if claim.metadata.deletion_timestamp.is_none() {
        keep(claim, &ctx).await
    } else if finalizer::has(claim, GUEST_FINALIZER) {
        release(claim, &ctx).await
    } else {
        ctx.backoff.forget(&claim.uid().unwrap_or_default());
        Ok(Action::await_change())
    }
}

/// When to try again after an error of the guest's API server.
pub fn after_error(claim: Arc<Guarded>, error: &Error, ctx: Arc<Context>) -> Action {
    let lost_race = matches!(error, Error::Guest { source, .. }
        if class_of(source) == ErrorClass::WaitForChange);
    if lost_race {
        return Action::requeue(RACE_LOOK);
    }
    Action::requeue(ctx.backoff.failed(claim.uid().unwrap_or_default()))
}

/// What a step found out of the host, and what is said of it.
struct Outcome {
    copy: Seen,
    synced: NewCondition,
    next: Next,
}

enum Seen {
    Copy(Box<VFClaim>),
    Absent,
    Unknown,
}

enum Next {
    Wait,
    Again,
    Look(Duration),
}

impl Outcome {
    fn of_trouble(trouble: Trouble, copy: Seen) -> Self {
        let (reason, message, next) = match trouble {
            Trouble::Changed => (
                reason::RETRYING,
                "the host's copy changed meanwhile; looking again".to_owned(),
                Next::Look(RACE_LOOK),
            ),
            Trouble::Refused(why) => (
                reason::REFUSED,
                format!(
                    "the host refuses: {why}. Correct the claim, or ask the host's administrator"
                ),
                Next::Again,
            ),
            Trouble::Failing(why) => (
                reason::RETRYING,
                format!("the host could not do it: {why}. It is tried again"),
                Next::Again,
            ),
            Trouble::Unreachable(why) => (reason::HOST_UNREACHABLE, unreachable(&why), Next::Again),
        };
        Self {
            copy,
            synced: not_synced(reason, message),
            next,
        }
    }
}

fn unreachable(why: &str) -> String {
    format!(
        "the host cluster cannot be reached: {why}. Nothing is given up; this goes on when it answers"
    )
}

fn not_synced(reason: &str, message: String) -> NewCondition {
    NewCondition::new(type_::SYNCED, ConditionStatus::False, reason, message)
}

/// Which guest this is on the host, or what to say while that is not known.
fn guest_id(ctx: &Context) -> Result<GuestId, Outcome> {
    let unknown = |reason, message| Outcome {
        copy: Seen::Unknown,
        synced: not_synced(reason, message),
        // New facts, and a host that answers again, wake every claim.
        next: Next::Wait,
    };
    match &*ctx.host.facts().borrow() {
        Facts::Known(found) => Ok(GuestId {
            cluster: ctx.cluster.clone(),
            cluster_uid: ctx.cluster_uid.clone(),
            claim_namespace: found.spec.claim_namespace.clone(),
        }),
        Facts::Missing => Err(unknown(
            reason::GUEST_CLUSTER_NOT_FOUND,
            format!(
                "the host has no GuestCluster {:?}; ask its administrator to make it, or correct \
                 --guest-cluster of the guest-syncer",
                ctx.cluster
            ),
        )),
        Facts::Unknown(why) => Err(unknown(reason::HOST_UNREACHABLE, unreachable(why))),
    }
}

/// A claim that lives: its copy exists and says what it should.
async fn keep(claim: &VFClaim, ctx: &Context) -> Result<Action, Error> {
    ctx.nodes.wait_until_ready().await?;
    let api = claims_of(claim, ctx);
    // First the finalizer: from here on the claim cannot go before its copy has.
    let updated = finalizer::add(&api, claim, GUEST_FINALIZER)
        .await
        .map_err(guest("putting the finalizer on the claim"))?;
    let claim = updated.as_ref().unwrap_or(claim);
    let outcome = match guest_id(ctx) {
        Ok(id) => lift(claim, ctx, &id).await,
        Err(outcome) => outcome,
    };
    tell(claim, ctx, outcome).await
}

/// The way up, carried out.
async fn lift(claim: &VFClaim, ctx: &Context, id: &GuestId) -> Outcome {
    let host = HostClaims::new(&ctx.host, &id.claim_namespace);
    let name = host_claim_name(&claim.uid().unwrap_or_default());
    let found_node = claim.spec.node_name.as_deref();
    let found_node = found_node.and_then(|n| ctx.nodes.get(&ObjectRef::new(n)));
    let node = target(claim, |_| found_node.as_deref());
    let mut copy = match look(ctx, &host, &name, &id.claim_namespace).await {
        Ok(copy) => copy,
        Err(trouble) => return Outcome::of_trouble(trouble, Seen::Unknown),
    };
    for _ in 0..LOOKS {
        match plan(claim, &node, id, copy.as_ref()) {
            Up::Create(wanted) => match host.create(&wanted).await {
                Ok(Created::Made(made)) => return done(*made, id),
                // Our cache is behind, an earlier try of ours got through, or
                // somebody else has the name: the host knows which.
                Ok(Created::Exists) => match host.get(&name).await {
                    Ok(found) => copy = found,
                    Err(trouble) => return Outcome::of_trouble(trouble, Seen::Unknown),
                },
                Err(trouble) => return Outcome::of_trouble(trouble, Seen::Absent),
            },
            Up::Update(edit) => {
                let Some(seen) = copy.take() else { break };
                match host.update(&seen, &edit).await {
                    Ok(updated) => return done(updated, id),
                    Err(Trouble::Changed) => match host.get(&name).await {
                        Ok(found) => copy = found,
                        Err(trouble) => return Outcome::of_trouble(trouble, Seen::Unknown),
                    },
                    Err(trouble) => {
                        return Outcome::of_trouble(trouble, Seen::Copy(Box::new(seen)));
                    }
                }
            }
            Up::Keep => {
                let Some(seen) = copy.take() else { break };
                return done(seen, id);
            }
            Up::AwaitGone => return going(copy),
            Up::Refuse { reason, message } => return refused(claim, id, copy, reason, message),
        }
    }
    Outcome::of_trouble(Trouble::Changed, Seen::Unknown)
}

fn done(copy: VFClaim, id: &GuestId) -> Outcome {
    let message = format!(
        "the host has this claim as {}/{}",
        id.claim_namespace,
        copy.name_any()
    );
    Outcome {
        copy: Seen::Copy(Box::new(copy)),
        synced: NewCondition::new(
            type_::SYNCED,
            ConditionStatus::True,
            reason::SYNCED,
            message,
        ),
        next: Next::Wait,
    }
}

fn going(copy: Option<VFClaim>) -> Outcome {
    Outcome {
        copy: copy.map_or(Seen::Absent, |c| Seen::Copy(Box::new(c))),
        synced: not_synced(
            reason::PENDING,
            "the copy on the host is being deleted there; once its VF is back, it is made again"
                .to_owned(),
        ),
        next: Next::Look(RELEASE_LOOK),
    }
}

fn refused(
    claim: &VFClaim,
    id: &GuestId,
    copy: Option<VFClaim>,
    reason: &str,
    message: String,
) -> Outcome {
    // What a foreign object says is none of this claim's business.
    let ours = copy.filter(|c| owned(claim, id, c).is_ok());
    Outcome {
        copy: ours.map_or(Seen::Absent, |c| Seen::Copy(Box::new(c))),
        synced: not_synced(reason, message),
        // A node that registers, or a copy that changes, wakes the claim.
        next: Next::Wait,
    }
}

/// The copy, from the cache where it proves something, else from the host.
async fn look(
    ctx: &Context,
    host: &HostClaims<'_>,
    name: &str,
    namespace: &str,
) -> Result<Option<VFClaim>, Trouble> {
    if !ctx.copies_listed.load(Ordering::Acquire) {
        return host.get(name).await;
    }
    let cached = ctx.copies.get(&ObjectRef::new(name).within(namespace));
    match cached.as_deref() {
        None => Ok(None),
        Some(DeserializeGuard(Ok(copy))) => Ok(Some(copy.clone())),
        Some(DeserializeGuard(Err(invalid))) => Err(Trouble::Failing(format!(
            "its copy {name} cannot be read by this version of the guest-syncer: {}",
            invalid.error
        ))),
    }
}

/// A claim that is being deleted: the copy goes first, and is seen to be gone.
async fn release(claim: &VFClaim, ctx: &Context) -> Result<Action, Error> {
    let outcome = match guest_id(ctx) {
        Ok(id) => match lower(claim, ctx, &id).await {
            Some(outcome) => outcome,
            None => return let_go(claim, ctx).await,
        },
        Err(outcome) => outcome,
    };
    tell(claim, ctx, outcome).await
}

/// Takes the copy down; `None` once the host has said that it has none of ours.
///
/// The host is asked each time: a cache, or a watch's DELETED, is only a hint.
async fn lower(claim: &VFClaim, ctx: &Context, id: &GuestId) -> Option<Outcome> {
    let host = HostClaims::new(&ctx.host, &id.claim_namespace);
    let name = host_claim_name(&claim.uid().unwrap_or_default());
    let mut last = None;
    for _ in 0..LOOKS {
        let found = match host.get(&name).await {
            Ok(found) => found,
            Err(trouble) => {
                let copy = last.map_or(Seen::Unknown, Seen::Copy);
                return Some(Outcome::of_trouble(trouble, copy));
            }
        };
        let due = up::release(claim, id, found.as_ref());
        // `LetGo` alone comes without a copy.
        let found = found?;
        match due {
            Release::LetGo => return None,
            Release::LeaveForeign(foreign) => {
                tracing::warn!(claim = name, foreign, "released without touching it");
                return None;
            }
            Release::AwaitGone => {
                let mut outcome = done(found, id);
                outcome.next = Next::Look(RELEASE_LOOK);
                return Some(outcome);
            }
            Release::Delete => {}
        }
        if let Err(trouble) = host.delete(&found).await {
            return Some(Outcome::of_trouble(trouble, Seen::Copy(Box::new(found))));
        }
        last = Some(Box::new(found));
    }
    let copy = last.map_or(Seen::Unknown, Seen::Copy);
    Some(Outcome::of_trouble(Trouble::Changed, copy))
}

async fn let_go(claim: &VFClaim, ctx: &Context) -> Result<Action, Error> {
    finalizer::remove(&claims_of(claim, ctx), claim, GUEST_FINALIZER)
        .await
        .map_err(guest("taking the finalizer off the claim"))?;
    ctx.backoff.forget(&claim.uid().unwrap_or_default());
    Ok(Action::await_change())
}

async fn tell(claim: &VFClaim, ctx: &Context, outcome: Outcome) -> Result<Action, Error> {
    let view = match &outcome.copy {
        Seen::Copy(copy) => HostView::Copy(copy),
        Seen::Absent => HostView::Absent,
        Seen::Unknown => HostView::Unknown,
    };
    report(&ctx.guest, &ctx.events, claim, view, &outcome.synced)
        .await
        .map_err(guest("writing the claim's status"))?;
    let uid = claim.uid().unwrap_or_default();
    Ok(match outcome.next {
        Next::Wait => {
            ctx.backoff.forget(&uid);
            Action::await_change()
        }
        Next::Look(after) => Action::requeue(after),
        Next::Again => Action::requeue(ctx.backoff.failed(uid)),
    })
}

fn claims_of(claim: &VFClaim, ctx: &Context) -> Api<VFClaim> {
    Api::namespaced(ctx.guest.clone(), &claim.namespace().unwrap_or_default())
}

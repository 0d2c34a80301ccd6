//! The orphan pass, carried out: looks twice at the host's copies and this
//! cluster's claims, and deletes what `orphans` says. Writes to the host through
//! `host_claims` alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::api::{DELETE_ORPHANS_ANNOTATION, VFClaim, reason};
use common::kube::events::Events;
use common::kube::says_not_found;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::Api;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Resource as _, ResourceExt as _};
use tokio_util::sync::CancellationToken;

use super::claims::{Context, Guarded};
use super::controller::claim_namespace;
use super::host_claims::HostClaims;
use super::metrics::OrphanMetrics;
use super::orphans::{Answer, HostCopy, Look, Mass, Plan, Sight, Versions, deaf, ours, plan};
use super::up::GuestId;
use crate::host_link::Trouble;

/// Between two looks: long enough for a claim that is just being made, restored
/// or moved to be there in the second.
pub const BETWEEN_LOOKS: Duration = Duration::from_secs(60);
/// Claims asked after at once: few, so that claims at work do not wait for it.
const QUESTIONS: usize = 8;
/// What the events are about: the namespace whose UID is this cluster's
/// identity, and where the release is written.
const NAMESPACE: &str = "kube-system";
const ACTION: &str = "DeleteOrphans";

/// When passes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// From the end of one pass to the next.
    pub interval: Duration,
    /// Between the two looks of a pass, and before a pass that failed is tried again.
    pub between_looks: Duration,
    /// Bound of each call to this cluster.
    pub timeout: Duration,
}

/// Why a pass ended early; nothing is concluded from it.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the host: {0:?}")]
    Host(Trouble),
    #[error("this cluster: {0}")]
    Guest(#[source] Box<kube::Error>),
    #[error("this cluster: no answer within {} s", .0.as_secs_f32())]
    Silent(Duration),
}

/// What the next pass waits for.
enum Wait {
    Interval,
    /// Not long: this pass did not come to an end.
    Again,
    /// An administrator's word, or the interval.
    Word(String),
}

/// Makes a pass at once and then now and then, until `stop`; a pass that is
/// under way ends there.
pub async fn run(
    ctx: Arc<Context>,
    metrics: OrphanMetrics,
    pace: Pace,
    identity: Option<String>,
    stop: CancellationToken,
) {
    let mut sweeper = Sweeper {
        ctx: &ctx,
        metrics,
        pace,
        identity,
        told: None,
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = sweeper.sweep() => {}
    }
}

struct Sweeper<'a> {
    ctx: &'a Context,
    metrics: OrphanMetrics,
    pace: Pace,
    identity: Option<String>,
    /// The word of the brake that was said last, and the events in which it was.
    told: Option<(String, Events)>,
}

impl Sweeper<'_> {
    async fn sweep(&mut self) {
        loop {
            let guest = readable(self.ctx).await;
            let wait = match self.pass(&guest).await {
                Ok(wait) => wait,
                Err(error) => {
                    tracing::warn!(%error, "looking for orphaned copies; nothing is concluded");
                    self.metrics.passed("failed");
                    Wait::Again
                }
            };
            match wait {
                Wait::Again => tokio::time::sleep(self.pace.between_looks).await,
                Wait::Interval => tokio::time::sleep(self.pace.interval).await,
                Wait::Word(word) => tokio::select! {
                    () = tokio::time::sleep(self.pace.interval) => {}
                    () = given(self.ctx, &word) => {}
                },
            }
        }
    }

    async fn pass(&mut self, guest: &GuestId) -> Result<Wait, Error> {
        let before = cached(self.ctx);
        let (first, listed, _) = self.look(guest, None).await?;
        if before.is_some_and(|b| deaf(&b, &listed, &cached(self.ctx).unwrap_or_default())) {
            tracing::warn!("the watch of the host's copies missed something; listing them anew");
            self.ctx.relist.notify_one();
        }
        let suspects = first.suspects();
        self.metrics
            .suspects
            .set(i64::try_from(suspects).unwrap_or(i64::MAX));
        if suspects == 0 {
            self.all_well();
            self.metrics.passed("clean");
            return Ok(Wait::Interval);
        }
        tracing::info!(
            suspects,
            "copies on the host whose claims are not seen here; looking once more"
        );
        tokio::time::sleep_until((first.ended + self.pace.between_looks).into()).await;
        let (second, _, word) = self.look(guest, Some(&first)).await?;
        let apart = self.pace.between_looks;
        let planned = plan(&guest.cluster_uid, apart, &first, &second, word.as_deref());
        self.carry_out(guest, planned).await
    }

    /// Lists the copies, and then asks for each one's claim that `earlier` did
    /// not see alive: a claim is there before its copy and stays until that is gone.
    /// With it the versions of all that was listed, and the release as it is now.
    async fn look(
        &self,
        guest: &GuestId,
        earlier: Option<&Look>,
    ) -> Result<(Look, Versions, Option<String>), Error> {
        let begun = Instant::now();
        let (asked_first, _) = self.cluster().await?;
        let host = HostClaims::new(&self.ctx.host, &guest.claim_namespace);
        let listed = host.list().await.map_err(Error::Host)?;
        let versions = listed.iter().map(version).collect();
        // One of a newer version is not ours to judge.
        let readable = listed.iter().filter_map(|found| found.0.as_ref().ok());
        let copies: Vec<HostCopy> = readable.filter_map(|c| ours(c, guest)).collect();
        let sights = self.ask_all(copies, earlier).await?;
        let unanswered = |s: &&Sight| {
            let known = earlier.is_some_and(|look| look.saw_alive(&s.copy.uid));
            s.answer == Answer::Unknown && !s.copy.going && !known
        };
        let unanswered = sights.values().filter(unanswered).count();
        if unanswered > 0 {
            tracing::warn!(
                unanswered,
                "this cluster does not say whether it has the claims of some copies on the host"
            );
        }
        let (asked_last, word) = self.cluster().await?;
        let look = Look {
            begun,
            ended: Instant::now(),
            clusters: [asked_first, asked_last],
            sights,
        };
        Ok((look, versions, word))
    }

    async fn ask_all(
        &self,
        copies: Vec<HostCopy>,
        earlier: Option<&Look>,
    ) -> Result<BTreeMap<String, Sight>, Error> {
        let questions = copies.into_iter().map(|copy| {
            let known = earlier.is_some_and(|look| look.saw_alive(&copy.uid));
            let needless = known || copy.going;
            async move {
                let answer = if needless {
                    Answer::Unknown
                } else {
                    self.ask(&copy).await?
                };
                Ok((copy.uid.clone(), Sight { copy, answer }))
            }
            // Boxed, or the compiler does not see that it may move between threads.
            .boxed()
        });
        futures::stream::iter(questions)
            .buffer_unordered(QUESTIONS)
            .try_collect()
            .await
    }

    /// What this cluster itself says of a copy's claim: an answer of its API
    /// server, read from a quorum.
    async fn ask(&self, copy: &HostCopy) -> Result<Answer, Error> {
        let api: Api<VFClaim> = Api::namespaced(self.ctx.guest.clone(), &copy.claim_namespace);
        match self.bounded(api.get_metadata(&copy.claim_name)).await? {
            Ok(found) => Ok(found.uid().map_or(Answer::Unknown, Answer::Claim)),
            Err(error) if says_not_found::<VFClaim>(&error, &copy.claim_name) => {
                Ok(Answer::NotFound)
            }
            Err(error @ (kube::Error::Api(_) | kube::Error::BuildRequest(_))) => {
                tracing::debug!(copy = copy.name, %error, "is its claim there?");
                Ok(Answer::Unknown)
            }
            // Nobody answers, so there is no use in asking for the others.
            Err(error) => Err(Error::Guest(Box::new(error))),
        }
    }

    /// Who this cluster is, and the release that is written there.
    async fn cluster(&self) -> Result<(String, Option<String>), Error> {
        let api: Api<Namespace> = Api::all(self.ctx.guest.clone());
        let found = self.bounded(api.get(NAMESPACE)).await?;
        let found = found.map_err(|e| Error::Guest(Box::new(e)))?;
        Ok((found.uid().unwrap_or_default(), word_in(&found)))
    }

    async fn bounded<T>(&self, call: impl Future<Output = T>) -> Result<T, Error> {
        tokio::time::timeout(self.pace.timeout, call)
            .await
            .map_err(|_| Error::Silent(self.pace.timeout))
    }

    async fn carry_out(&mut self, guest: &GuestId, planned: Plan) -> Result<Wait, Error> {
        match planned {
            Plan::Keep => {
                self.all_well();
                self.metrics.passed("kept");
                Ok(Wait::Interval)
            }
            Plan::Delete(orphans) => {
                self.all_well();
                self.delete(guest, &orphans).await?;
                self.metrics.passed("deleted");
                Ok(Wait::Interval)
            }
            Plan::DeleteReleased(mass) => {
                self.all_well();
                let deleted = self.delete(guest, &mass.orphans).await?;
                let note = format!(
                    "{deleted} orphaned copies were deleted on the host, as {DELETE_ORPHANS_ANNOTATION}={} says",
                    mass.word
                );
                let about = about(&guest.cluster_uid);
                self.ctx.events.normal(&about, ACTION, ACTION, &note).await;
                self.metrics.passed("released");
                Ok(Wait::Interval)
            }
            Plan::Brake(mass) => {
                self.brake(guest, &mass).await;
                self.metrics.passed("braked");
                Ok(Wait::Word(mass.word))
            }
            Plan::Unsure { orphans, doubtful } => {
                tracing::warn!(
                    orphans,
                    doubtful,
                    "there may be more orphaned copies than are deleted unasked; looking again"
                );
                self.metrics.passed("unsure");
                Ok(Wait::Again)
            }
            Plan::AnotherCluster => {
                tracing::error!(
                    cluster_uid = guest.cluster_uid,
                    "another cluster answers than the one that this process began with; copies on \
                     the host are left alone"
                );
                self.metrics.passed("another_cluster");
                Ok(Wait::Interval)
            }
        }
    }

    /// Deletes what is still as it was seen, and says how many that were. What a
    /// host refuses is left to the next pass; a host that is away ends this one.
    async fn delete(&self, guest: &GuestId, orphans: &[HostCopy]) -> Result<u64, Error> {
        let host = HostClaims::new(&self.ctx.host, &guest.claim_namespace);
        let mut deleted = 0;
        for copy in orphans {
            let claim = format!("{}/{}", copy.claim_namespace, copy.claim_name);
            match host.delete_orphan(copy).await {
                Ok(true) => {
                    tracing::info!(copy = copy.name, claim, "deleted: its claim is gone");
                    self.metrics.deleted.inc();
                    deleted += 1;
                }
                Ok(false) => tracing::info!(copy = copy.name, claim, "an orphan that changed"),
                Err(trouble @ Trouble::Unreachable(_)) => return Err(Error::Host(trouble)),
                Err(trouble) => {
                    tracing::warn!(copy = copy.name, claim, ?trouble, "deleting an orphan");
                }
            }
        }
        Ok(deleted)
    }

    async fn brake(&mut self, guest: &GuestId, mass: &Mass) {
        let message = mass.message();
        tracing::warn!(reason = reason::MASS_ORPHAN, message);
        let held = i64::try_from(mass.orphans.len()).unwrap_or(i64::MAX);
        self.metrics.held.set(held);
        if self
            .told
            .as_ref()
            .is_none_or(|(word, _)| *word != mass.word)
        {
            for copy in &mass.orphans {
                let claim = format!("{}/{}", copy.claim_namespace, copy.claim_name);
                tracing::warn!(
                    copy = copy.name,
                    claim,
                    reason = reason::MASS_ORPHAN,
                    "orphan"
                );
            }
            // kube repeats an event of the same reason with its first note, and
            // the word would be an old one.
            let events = Events::new(
                self.ctx.guest.clone(),
                super::MANAGER,
                self.identity.clone(),
            );
            self.told = Some((mass.word.clone(), events));
        }
        if let Some((_, events)) = &self.told {
            let about = about(&guest.cluster_uid);
            events
                .warning(&about, ACTION, reason::MASS_ORPHAN, &message)
                .await;
        }
    }

    fn all_well(&mut self) {
        self.metrics.held.set(0);
        self.told = None;
    }
}

/// Waits until the host answers and has said where our copies are.
async fn readable(ctx: &Context) -> GuestId {
    let namespace = claim_namespace(ctx.host.facts()).await;
    let answers = ctx.host.answers().wait_for(|up| *up).await.is_ok();
    match namespace {
        Some(claim_namespace) if answers => GuestId {
            cluster: ctx.cluster.clone(),
            cluster_uid: ctx.cluster_uid.clone(),
            claim_namespace,
        },
        // The link lives as long as the context, so this is not met.
        _ => std::future::pending().await,
    }
}

/// The cache's versions, or nothing while it has not been filled.
fn cached(ctx: &Context) -> Option<Versions> {
    let filled = ctx.copies_listed.load(Ordering::Acquire);
    let all = || ctx.copies.state().iter().map(|c| version(c)).collect();
    filled.then(all)
}

fn version(found: &Guarded) -> (String, String) {
    let version = found.meta().resource_version.clone();
    (found.name_any(), version.unwrap_or_default())
}

fn word_in(namespace: &Namespace) -> Option<String> {
    let annotations = namespace.metadata.annotations.as_ref()?;
    annotations.get(DELETE_ORPHANS_ANNOTATION).cloned()
}

/// Waits until an administrator has given the word.
async fn given(ctx: &Context, word: &str) {
    let api: Api<Namespace> = Api::all(ctx.guest.clone());
    let config = watcher::Config::default().fields(&format!("metadata.name={NAMESPACE}"));
    let seen = watcher(api, config).default_backoff().applied_objects();
    let mut given = seen
        .filter_map(|seen| {
            let found = match seen {
                Ok(namespace) => word_in(&namespace).filter(|w| w == word),
                Err(error) => {
                    tracing::warn!(%error, "watching the namespace kube-system");
                    None
                }
            };
            futures::future::ready(found)
        })
        .boxed();
    if given.next().await.is_none() {
        std::future::pending().await
    }
}

fn about(cluster_uid: &str) -> k8s_openapi::api::core::v1::ObjectReference {
    let mut namespace = Namespace::default();
    namespace.metadata.name = Some(NAMESPACE.to_owned());
    namespace.metadata.uid = Some(cluster_uid.to_owned());
    namespace.object_ref(&())
}

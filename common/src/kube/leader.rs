//! Leader election through a coordination.k8s.io Lease, in client-go's manner:
//! a candidate takes over only after it has itself seen the Lease unchanged for
//! the whole lease duration, so clocks need not agree. It lightens the load;
//! correctness rests on compare-and-swap writes, never on being the only one.

use std::future::Future;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, PostParams};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::error::{is_conflict, is_gone};
use crate::cli::LeaderElectionArgs;

/// Why an election cannot be held, or ended.
#[derive(Debug, Error)]
pub enum LeaderError {
    #[error(
        "--leader-election-namespace is needed outside a pod: in which namespace shall the Lease be?"
    )]
    NoNamespace,
    #[error(
        "leader election needs retry period < renew deadline < lease duration, got {retry:?}, {renew:?}, {lease:?}"
    )]
    Durations {
        retry: Duration,
        renew: Duration,
        lease: Duration,
    },
    #[error("lost the Lease {0}: it could not be renewed in time, or another process took it")]
    Lost(String),
}

/// One candidate.
#[derive(Clone, Debug)]
pub struct LeaderConfig {
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Unique to this process.
    pub identity: String,
    pub lease_duration: Duration,
    pub renew_deadline: Duration,
    pub retry_period: Duration,
}

impl LeaderConfig {
    /// The flags as a candidate for the Lease `name`; `None` without
    /// `--leader-election`.
    pub fn from_args(
        args: &LeaderElectionArgs,
        name: &str,
        pod_namespace: &str,
    ) -> Result<Option<Self>, LeaderError> {
        if !args.leader_election {
            return Ok(None);
        }
        let namespace = args
            .leader_election_namespace
            .clone()
            .unwrap_or_else(|| pod_namespace.to_owned());
        if namespace.is_empty() {
            return Err(LeaderError::NoNamespace);
        }
        let (retry, renew, lease) = (
            args.leader_election_retry_period,
            args.leader_election_renew_deadline,
            args.leader_election_lease_duration,
        );
        if retry.is_zero() || retry >= renew || renew >= lease || lease.as_secs() == 0 {
            return Err(LeaderError::Durations {
                retry,
                renew,
                lease,
            });
        }
        let identity = args
            .leader_election_identity
            .clone()
            .unwrap_or_else(default_identity);
        Ok(Some(Self {
            namespace,
            name: name.to_owned(),
            identity,
            lease_duration: lease,
            renew_deadline: renew,
            retry_period: retry,
        }))
    }
}

/// Host name, process id and the moment: unique among processes that live.
fn default_identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let now = Timestamp::now().as_nanosecond();
    format!("{}_{}_{now:x}", host.trim(), std::process::id())
}

/// The Lease as this candidate saw it, and when it last saw it change.
#[derive(Clone, Debug)]
struct Observed {
    lease: Option<Lease>,
    since: Instant,
}

/// What a candidate does next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Create,
    /// The Lease is ours: say that we live.
    Renew,
    /// Nobody has it, or its holder has been silent for the whole duration.
    TakeOver,
    Wait,
}

fn plan(observed: &Observed, identity: &str, now: Instant) -> Step {
    let Some(spec) = observed
        .lease
        .as_ref()
        .map(|l| l.spec.clone().unwrap_or_default())
    else {
        return Step::Create;
    };
    let holder = spec.holder_identity.unwrap_or_default();
    if holder == identity {
        return Step::Renew;
    }
    let duration = u64::try_from(spec.lease_duration_seconds.unwrap_or(0)).unwrap_or(0);
    let silent = now.saturating_duration_since(observed.since);
    if holder.is_empty() || silent >= Duration::from_secs(duration) {
        Step::TakeOver
    } else {
        Step::Wait
    }
}

fn next_lease(config: &LeaderConfig, old: Option<&Lease>, now: Timestamp) -> Lease {
    let mut lease = old.cloned().unwrap_or_else(|| Lease {
        metadata: ObjectMeta {
            name: Some(config.name.clone()),
            namespace: Some(config.namespace.clone()),
            ..ObjectMeta::default()
        },
        spec: None,
    });
    let was = lease.spec.take().unwrap_or_default();
    let mine = was.holder_identity.as_deref() == Some(config.identity.as_str());
    let transitions = was.lease_transitions.unwrap_or(0);
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(config.identity.clone()),
        lease_duration_seconds: i32::try_from(config.lease_duration.as_secs()).ok(),
        acquire_time: if mine {
            was.acquire_time
        } else {
            Some(MicroTime(now))
        },
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(match old {
            Some(_) if !mine => transitions.saturating_add(1),
            _ => transitions,
        }),
        ..LeaseSpec::default()
    });
    lease
}

struct Candidate {
    api: Api<Lease>,
    config: LeaderConfig,
    observed: Observed,
}

impl Candidate {
    /// One try to get or keep the Lease; true when it is ours now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let found = match self.api.get(&self.config.name).await {
            Ok(lease) => Some(lease),
            Err(error) if is_gone(&error) => None,
            Err(error) => return Err(error),
        };
        self.observe(found);
        let lease = next_lease(&self.config, self.observed.lease.as_ref(), Timestamp::now());
        let written = match plan(&self.observed, &self.config.identity, Instant::now()) {
            Step::Wait => return Ok(false),
            Step::Create => self.api.create(&PostParams::default(), &lease).await,
            // Replaced with the resourceVersion that was read: one of two wins.
            Step::Renew | Step::TakeOver => {
                let params = PostParams::default();
                self.api.replace(&self.config.name, &params, &lease).await
            }
        };
        match written {
            Ok(lease) => {
                self.observe(Some(lease));
                Ok(true)
            }
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn observe(&mut self, lease: Option<Lease>) {
        let spec = |l: &Option<Lease>| l.as_ref().and_then(|l| l.spec.clone());
        if spec(&lease) != spec(&self.observed.lease) {
            self.observed.since = Instant::now();
        }
        self.observed.lease = lease;
    }

    /// The Lease as last read is this candidate's.
    fn holds(&self) -> bool {
        plan(&self.observed, &self.config.identity, Instant::now()) == Step::Renew
    }

    /// Gets the Lease, and says when the try that got it began: from then on
    /// others may count how long it stands unchanged.
    async fn acquire(&mut self) -> Instant {
        let deadline = self.config.renew_deadline;
        loop {
            let begun = Instant::now();
            let lease = self.config.name.clone();
            // What an answer that comes later says of the Lease may be over.
            match tokio::time::timeout(deadline, self.attempt()).await {
                Ok(Ok(true)) => return begun,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(%error, lease, "leader election"),
                Err(_) => tracing::warn!(lease, "leader election: no answer"),
            }
            tokio::time::sleep(self.config.retry_period).await;
        }
    }

    /// Renews, until there has been no success for the renew deadline since
    /// `renewed`. Pauses and tries are both bounded by it: a request that hangs
    /// does not make the term longer. A success counts from when its try began.
    async fn keep(&mut self, mut renewed: Instant) {
        loop {
            let left = self.config.renew_deadline.saturating_sub(renewed.elapsed());
            let pause = self.config.retry_period;
            let tried = async {
                tokio::time::sleep(pause).await;
                (Instant::now(), self.attempt().await)
            };
            match tokio::time::timeout(left, tried).await {
                Ok((begun, Ok(true))) => renewed = begun,
                // Somebody else wrote to the Lease but left it ours.
                Ok((_, Ok(false))) if self.holds() => {}
                Ok((_, Ok(false))) | Err(_) => return,
                Ok((_, Err(error))) => {
                    tracing::warn!(%error, lease = self.config.name, "cannot renew the Lease");
                }
            }
        }
    }

    /// Gives the Lease up, so that the next leader need not wait.
    async fn release(&mut self) {
        let Some(mut lease) = self.observed.lease.clone() else {
            return;
        };
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
        }
        let params = PostParams::default();
        let replaced = self.api.replace(&self.config.name, &params, &lease);
        if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(5), replaced).await {
            tracing::warn!(%error, lease = self.config.name, "cannot give the Lease up");
        }
    }
}

/// Waits for the Lease, then runs `work` while it is held. `None` when `stop`
/// came before the Lease did.
///
/// `work` gets a token that is cancelled when `stop` is; it should end soon
/// after, and keeps the Lease until it has. Then the Lease is given up.
///
/// A lost Lease is [`LeaderError::Lost`], and `work` is not asked but dropped
/// where it is: once this returns, none of its futures is polled any more, and a
/// request that waited to be sent is not sent. That holds for what `work` runs
/// itself; what it has spawned it must end on drop, and better not spawn. Two
/// things cannot be taken back: a request that is on its way may still be carried
/// out, and a process that was stopped (SIGSTOP, a paused VM) may send one before
/// it sees how late it is. So each write must carry what it was decided on, and
/// the process should end, so that nothing of its state outlives its term.
pub async fn run_as_leader<F, Fut, T>(
    client: Client,
    config: LeaderConfig,
    stop: CancellationToken,
    work: F,
) -> Result<Option<T>, LeaderError>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = T>,
{
    let mut candidate = Candidate {
        api: Api::namespaced(client, &config.namespace),
        observed: Observed {
            lease: None,
            since: Instant::now(),
        },
        config,
    };
    let lease = candidate.config.name.clone();
    tracing::info!(
        lease,
        identity = candidate.config.identity,
        "waiting to lead"
    );
    let won = tokio::select! {
        () = stop.cancelled() => return Ok(None),
        won = candidate.acquire() => won,
    };
    tracing::info!(lease, identity = candidate.config.identity, "leading");

    tokio::select! {
        // The Lease first: nothing is begun in a term that is over. `select!`
        // drops what did not win before it goes on.
        biased;
        () = candidate.keep(won) => Err(LeaderError::Lost(lease)),
        done = work(stop.child_token()) => {
            candidate.release().await;
            Ok(Some(done))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(holder: Option<&str>, silent: u64) -> (Observed, Instant) {
        let since = Instant::now();
        let lease = Lease {
            spec: Some(LeaseSpec {
                holder_identity: holder.map(str::to_owned),
                lease_duration_seconds: Some(15),
                ..LeaseSpec::default()
            }),
            ..Lease::default()
        };
        let observed = Observed {
            lease: Some(lease),
            since,
        };
        (observed, since + Duration::from_secs(silent))
    }

    #[test]
    fn a_lease_is_taken_only_when_free_or_silent_for_its_whole_duration() {
        for (holder, silent, step) in [
            (Some("me"), 0, Step::Renew),
            (Some("me"), 99, Step::Renew),
            (Some("other"), 0, Step::Wait),
            (Some("other"), 14, Step::Wait),
            (Some("other"), 15, Step::TakeOver),
            (Some(""), 0, Step::TakeOver),
            (None, 0, Step::TakeOver),
        ] {
            let (seen, now) = observed(holder, silent);
            assert_eq!(plan(&seen, "me", now), step, "{holder:?} {silent}");
        }
        let nothing = Observed {
            lease: None,
            since: Instant::now(),
        };
        assert_eq!(plan(&nothing, "me", Instant::now()), Step::Create);
    }
}

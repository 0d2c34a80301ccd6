//! The way to the host cluster: bounded calls, what went wrong in a tenant's
//! words, whether the host answers, and what its `GuestCluster` says.
//!
//! Nothing here writes to the host; `mirror::host_claims` does.

use std::future::Future;
use std::time::Duration;

use common::api::GuestCluster;
use futures::StreamExt as _;
use kube::api::Api;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, Error};
use tokio::sync::watch;

/// How long one watch request may last. Short, because a link between clusters
/// may die without a word, and a new request finds out.
pub const WATCH_SECONDS: u32 = 45;
/// Between two looks at a host that did not answer.
const PROBE: Duration = Duration::from_secs(2);
/// The most of a host's message that is shown, in bytes.
const MESSAGE_MAX: usize = 2048;

/// What the host knows of this guest cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Facts {
    /// Not read yet, and why.
    Unknown(String),
    /// The host has been read and has no `GuestCluster` of our name.
    Missing,
    Known(Box<GuestCluster>),
}

/// Why a call to the host did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The object changed, was recreated or is gone: look again and plan again.
    Changed,
    /// The host answered no, in these words; trying again helps only after
    /// somebody has changed something.
    Refused(String),
    /// The host answers, but not now or not sensibly: try again.
    Failing(String),
    /// No answer, or none for us: what was asked may or may not have been done.
    Unreachable(String),
}

impl Trouble {
    /// What an error of a call means.
    #[must_use]
    pub fn of(error: &Error) -> Self {
        match error {
            Error::Api(status) => match status.code {
                404 | 409 => Self::Changed,
                400 | 403 | 405 | 413 | 415 | 422 => {
                    Self::Refused(clip(if status.message.is_empty() {
                        &status.reason
                    } else {
                        &status.message
                    }))
                }
                401 => Self::Unreachable(
                    "the host does not accept this cluster's client certificate (expired, or of \
                     another authority); renew the Secret of the host kubeconfig"
                        .to_owned(),
                ),
                code => Self::Failing(clip(&format!("HTTP {code}: {}", status.message))),
            },
            other => Self::Unreachable(clip(&chain(other))),
        }
    }
}

/// An error with its causes: hyper's own text says only "client error (Connect)".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

fn clip(text: &str) -> String {
    let end = (0..=MESSAGE_MAX.min(text.len()))
        .rev()
        .find(|i| text.is_char_boundary(*i))
        .unwrap_or(0);
    text.get(..end).unwrap_or_default().to_owned()
}

/// The host cluster as this guest reaches it.
pub struct HostLink {
    client: Client,
    timeout: Duration,
    answers: watch::Sender<bool>,
    facts: watch::Sender<Facts>,
}

impl HostLink {
    /// `timeout` bounds each call.
    #[must_use]
    pub fn new(client: Client, timeout: Duration) -> Self {
        Self {
            client,
            timeout,
            answers: watch::Sender::new(true),
            facts: watch::Sender::new(Facts::Unknown("the host has not answered yet".to_owned())),
        }
    }

    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Runs one call; it is never left waiting for longer than the timeout.
    pub async fn call<T>(
        &self,
        request: impl Future<Output = Result<T, Error>> + Send,
    ) -> Result<T, Trouble> {
        let result = match tokio::time::timeout(self.timeout, request).await {
            Ok(result) => result.map_err(|e| Trouble::of(&e)),
            Err(_) => Err(Trouble::Unreachable(format!(
                "no answer within {} s",
                self.timeout.as_secs_f32()
            ))),
        };
        self.mark(!matches!(result, Err(Trouble::Unreachable(_))));
        result
    }

    /// Whether the host answered the last time.
    #[must_use]
    pub fn answers(&self) -> watch::Receiver<bool> {
        self.answers.subscribe()
    }

    /// What the host's `GuestCluster` says.
    #[must_use]
    pub fn facts(&self) -> watch::Receiver<Facts> {
        self.facts.subscribe()
    }

    fn mark(&self, answers: bool) {
        self.answers.send_if_modified(|was| {
            let changed = *was != answers;
            *was = answers;
            changed
        });
    }

    /// Takes note of a watch's error.
    pub fn note(&self, error: &watcher::Error) -> Trouble {
        let trouble = match error {
            watcher::Error::InitialListFailed(e)
            | watcher::Error::WatchStartFailed(e)
            | watcher::Error::WatchFailed(e) => Trouble::of(e),
            watcher::Error::WatchError(status) => Trouble::of(&Error::Api(status.clone())),
            watcher::Error::NoResourceVersion => Trouble::Changed,
        };
        if matches!(trouble, Trouble::Unreachable(_)) {
            self.mark(false);
        }
        trouble
    }

    /// Follows the `GuestCluster` named `name`; ends only when dropped.
    pub async fn follow(&self, name: &str) {
        let config = watcher::Config::default()
            .fields(&format!("metadata.name={name}"))
            .timeout(WATCH_SECONDS);
        let api: Api<GuestCluster> = Api::all(self.client());
        let mut events = watcher(api, config).default_backoff().boxed();
        let mut listed = None;
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => listed = None,
                Ok(watcher::Event::InitApply(found)) => listed = Some(found),
                Ok(watcher::Event::InitDone) => self.learn(match listed.take() {
                    Some(found) => Facts::Known(Box::new(found)),
                    None => Facts::Missing,
                }),
                Ok(watcher::Event::Apply(found)) => self.learn(Facts::Known(Box::new(found))),
                Ok(watcher::Event::Delete(_)) => self.learn(Facts::Missing),
                Err(error) => self.unread(name, &error),
            }
        }
    }

    /// A read that failed takes nothing away from what was known.
    fn unread(&self, name: &str, error: &watcher::Error) {
        let why = match self.note(error) {
            Trouble::Refused(why) | Trouble::Failing(why) | Trouble::Unreachable(why) => why,
            Trouble::Changed => error.to_string(),
        };
        tracing::warn!(
            guest_cluster = name,
            why,
            "cannot read the GuestCluster of the host"
        );
        self.facts.send_if_modified(|facts| match facts {
            Facts::Unknown(was) if *was != why => {
                *was = why.clone();
                true
            }
            _ => false,
        });
    }

    fn learn(&self, new: Facts) {
        self.facts.send_if_modified(|facts| {
            let changed = *facts != new;
            *facts = new;
            changed
        });
    }

    /// While the host does not answer, asks until it does; ends only when dropped.
    ///
    /// Nothing tells when a peer is back, so this looks every two seconds, one
    /// small request, instead of every waiting claim trying for itself.
    pub async fn probe(&self) {
        let mut answers = self.answers();
        loop {
            if answers.wait_for(|up| !up).await.is_err() {
                return;
            }
            tokio::time::sleep(PROBE).await;
            // The call itself marks the host as answering.
            if self.call(self.client.apiserver_version()).await.is_ok() {
                tracing::info!("the host answers again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    fn api(code: u16) -> Trouble {
        Trouble::of(&Error::Api(Box::new(
            Status::failure("so", "Why").with_code(code),
        )))
    }

    #[test]
    fn a_refusal_is_told_apart_from_silence() {
        for code in [400, 403, 422] {
            assert_eq!(api(code), Trouble::Refused("so".into()), "{code}");
        }
        for code in [404, 409] {
            assert_eq!(api(code), Trouble::Changed, "{code}");
        }
        for code in [429, 500, 503, 504] {
            assert!(matches!(api(code), Trouble::Failing(_)), "{code}");
        }
        assert!(matches!(api(401), Trouble::Unreachable(_)));
    }

    #[test]
    fn long_words_are_clipped_between_characters() {
        let text = "é".repeat(MESSAGE_MAX);
        assert_eq!(clip(&text).len(), MESSAGE_MAX);
        assert_eq!(clip("short"), "short");
    }
}

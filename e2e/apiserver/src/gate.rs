//! A gate in a client, which a test can close: it counts the writes that go
//! through, and holds requests as a slow network would.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use tokio::sync::watch;

use crate::Error;

/// How long a test waits for a request at a gate.
const PATIENCE: Duration = Duration::from_secs(60);

/// What waits at the gate. A watch that is open goes on.
#[derive(Clone, Default)]
pub enum Hold {
    #[default]
    Nothing,
    /// Writes wait before they are sent.
    Writes,
    /// These writes wait before they are sent.
    Some(Arc<dyn Fn(&Write) -> bool + Send + Sync>),
    /// Writes are carried out, and their answers wait.
    Answers,
    /// Every request waits before it is sent.
    Requests,
}

/// A request that the gate let through and that may change something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    pub method: Method,
    pub path: String,
}

#[derive(Default)]
struct State {
    hold: Hold,
    waiting: Vec<Write>,
    sent: Vec<Write>,
}

/// The gate; its clones are the same one, in as many clients as wanted.
#[derive(Clone, Default)]
pub struct Gate(Arc<watch::Sender<State>>);

impl Gate {
    /// A client whose requests go through this gate and then through `client`.
    #[must_use]
    pub fn client(&self, client: Client) -> Client {
        let namespace = client.default_namespace().to_owned();
        Client::new(
            Through {
                gate: self.clone(),
                client,
            },
            namespace,
        )
    }

    pub fn hold(&self, hold: Hold) {
        self.0.send_modify(|state| state.hold = hold);
    }

    /// Holds the writes of which `which` says so.
    pub fn hold_if(&self, which: impl Fn(&Write) -> bool + Send + Sync + 'static) {
        self.hold(Hold::Some(Arc::new(which)));
    }

    /// Waits until at least so many requests wait here.
    pub async fn held(&self, at_least: usize) -> Result<Vec<Write>, Error> {
        let mut state = self.0.subscribe();
        let held = state.wait_for(|state| state.waiting.len() >= at_least);
        match tokio::time::timeout(PATIENCE, held).await {
            Ok(Ok(state)) => Ok(state.waiting.clone()),
            _ => Err(Error::NotHeld(at_least)),
        }
    }

    /// What waits here now; a request that its sender has dropped does not.
    #[must_use]
    pub fn waiting(&self) -> Vec<Write> {
        self.0.borrow().waiting.clone()
    }

    /// The writes that were sent.
    #[must_use]
    pub fn sent(&self) -> Vec<Write> {
        self.0.borrow().sent.clone()
    }

    /// Waits while `held` says so of what is held.
    async fn pass(&self, request: &Write, held: impl Fn(&Hold) -> bool) {
        let mut state = self.0.subscribe();
        if !held(&state.borrow_and_update().hold) {
            return;
        }
        let waiting = Waiting::new(self, request);
        // The sender is in `self`, so this ends when the gate opens.
        let _ = state.wait_for(|state| !held(&state.hold)).await;
        drop(waiting);
    }
}

/// A request in the list of those that wait, for as long as somebody wants it.
struct Waiting<'a>(&'a Gate, Write);

impl<'a> Waiting<'a> {
    fn new(gate: &'a Gate, request: &Write) -> Self {
        gate.0
            .send_modify(|state| state.waiting.push(request.clone()));
        Self(gate, request.clone())
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| {
            if let Some(at) = state.waiting.iter().position(|w| *w == self.1) {
                state.waiting.remove(at);
            }
        });
    }
}

struct Through {
    gate: Gate,
    client: Client,
}

impl tower::Service<Request<Body>> for Through {
    type Response = Response<Body>;
    type Error = kube::Error;
    type Future = futures::future::BoxFuture<'static, Result<Response<Body>, kube::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), kube::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (gate, client) = (self.gate.clone(), self.client.clone());
        let what = Write {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
        };
        Box::pin(async move {
            let writes = what.method != Method::GET;
            let before = |hold: &Hold| match hold {
                Hold::Requests => true,
                Hold::Writes => writes,
                Hold::Some(which) => writes && which(&what),
                Hold::Nothing | Hold::Answers => false,
            };
            gate.pass(&what, before).await;
            if writes {
                gate.0.send_modify(|state| state.sent.push(what.clone()));
            }
            let answer = client.send(request).await;
            gate.pass(&what, |hold| writes && matches!(hold, Hold::Answers))
                .await;
            answer
        })
    }
}

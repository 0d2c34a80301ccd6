//! When claims are looked at: the guest's claims and nodes, the host's copies,
//! and a host that answers again. It reads; `claims` does.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::api::VFClaim;
use futures::channel::mpsc::UnboundedSender;
use futures::stream::{BoxStream, SelectAll};
use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::core::DeserializeGuard;
use kube::runtime::controller::{Config, Error as AppliedError, applier};
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Resource as _, ResourceExt as _};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::claims::{Context, Guarded, after_error, reconcile};
use crate::host_link::{Facts, Trouble, WATCH_SECONDS};

type Ref = ObjectRef<Guarded>;

/// The writing ends of the caches that `Context` reads.
pub struct Caches {
    pub nodes: Writer<Node>,
    pub copies: Writer<Guarded>,
}

/// Reconciles claims until `stop`, at most `workers` at once, and then ends
/// what is under way.
pub async fn run(ctx: Arc<Context>, caches: Caches, workers: u16, stop: CancellationToken) {
    let writer = Writer::<Guarded>::default();
    let claims = writer.as_reader();
    let (wake, woken) = futures::channel::mpsc::unbounded();
    let mut triggers: SelectAll<BoxStream<'static, Ref>> = SelectAll::new();
    triggers.push(own_claims(&ctx, writer).boxed());
    triggers.push(nodes(&ctx, caches.nodes, claims.clone()).boxed());
    triggers.push(host_copies(ctx.clone(), caches.copies, wake).boxed());
    let everything = futures::stream::select(woken, link_changes(&ctx));
    let all = claims.clone();
    triggers.push(
        everything
            .flat_map(move |()| futures::stream::iter(refs(&all, |_| true)))
            .boxed(),
    );
    let queue = triggers
        .map(Ok::<Ref, Infallible>)
        .take_until(stop.cancelled_owned());
    let config = Config::default().concurrency(workers);
    let reconcile = |claim, ctx| Box::pin(reconcile(claim, ctx));
    applier(reconcile, after_error, ctx, claims, queue, config)
        .for_each(|done| {
            match done {
                Ok(_) => {}
                // Gone between the event and its turn.
                Err(AppliedError::ObjectNotFound(_)) => {}
                Err(AppliedError::ReconcilerFailed(error, claim)) => {
                    tracing::warn!(%claim, %error, "reconcile");
                }
                Err(error) => tracing::error!(%error, "controller"),
            }
            futures::future::ready(())
        })
        .await;
}

fn refs(claims: &Store<Guarded>, mut pick: impl FnMut(&VFClaim) -> bool) -> Vec<Ref> {
    let all = claims.state();
    let picked = all.iter().filter(|c| c.0.as_ref().is_ok_and(&mut pick));
    picked.map(|c| ObjectRef::from_obj(&**c)).collect()
}

fn own_claims(ctx: &Context, writer: Writer<Guarded>) -> impl Stream<Item = Ref> + use<> {
    let api: Api<Guarded> = Api::all(ctx.guest.clone());
    watcher(api, watcher::Config::default())
        .default_backoff()
        .modify(|claim| claim.meta_mut().managed_fields = None)
        .reflect(writer)
        .applied_objects()
        .filter_map(|seen| async move {
            match seen {
                Ok(claim) => Some(ObjectRef::from_obj(&claim)),
                Err(error) => {
                    tracing::warn!(%error, "watching this cluster's VFClaims");
                    None
                }
            }
        })
}

/// A Node that comes, goes or changes wakes the claims that name it.
fn nodes(
    ctx: &Context,
    writer: Writer<Node>,
    claims: Store<Guarded>,
) -> impl Stream<Item = Ref> + use<> {
    let api: Api<Node> = Api::all(ctx.guest.clone());
    watcher(api, watcher::Config::default())
        .default_backoff()
        .modify(slim)
        .reflect(writer)
        .touched_objects()
        .flat_map(move |seen| {
            let woken = match seen {
                Ok(node) => {
                    let name = node.name_any();
                    refs(&claims, |c| c.spec.node_name.as_deref() == Some(&name))
                }
                Err(error) => {
                    tracing::warn!(%error, "watching this cluster's Nodes");
                    Vec::new()
                }
            };
            futures::stream::iter(woken)
        })
}

/// Of a Node only the identity is used; images and labels are most of its size.
fn slim(node: &mut Node) {
    node.metadata.managed_fields = None;
    node.metadata.annotations = None;
    node.metadata.labels = None;
    if let Some(status) = &mut node.status {
        status.images = None;
        status.conditions = None;
        status.volumes_attached = None;
        status.volumes_in_use = None;
    }
}

/// The host's copies: each wakes the claim it was made for. A new list wakes
/// all, because what went while the watch was down is in no event; `relist` asks
/// for one where a watch turns out to be deaf.
fn host_copies(
    ctx: Arc<Context>,
    writer: Writer<Guarded>,
    wake: UnboundedSender<()>,
) -> impl Stream<Item = Ref> {
    let (host, relist) = (ctx.host.clone(), ctx.relist.clone());
    futures::stream::once(async move {
        let namespace = claim_namespace(host.facts()).await;
        let api: Api<Guarded> = match namespace {
            Some(namespace) => Api::namespaced(host.client(), &namespace),
            None => return futures::stream::pending().boxed(),
        };
        let config = watcher::Config::default().timeout(WATCH_SECONDS);
        futures::stream::repeat_with(move || {
            watcher(api.clone(), config.clone())
                .default_backoff()
                .take_until(relist.clone().notified_owned())
        })
        .flatten()
        .modify(|copy| copy.meta_mut().managed_fields = None)
        .reflect(writer)
        .boxed()
    })
    .flatten()
    .filter_map(move |seen| {
        let woken = host_event(&ctx, &wake, seen);
        futures::future::ready(woken)
    })
}

fn host_event(
    ctx: &Context,
    wake: &UnboundedSender<()>,
    seen: Result<watcher::Event<Guarded>, watcher::Error>,
) -> Option<Ref> {
    match seen {
        Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => None,
        Ok(watcher::Event::InitDone) => {
            ctx.copies_listed.store(true, Ordering::Release);
            // The receiver lives as long as the controller.
            if wake.unbounded_send(()).is_err() {
                tracing::debug!("controller ended");
            }
            None
        }
        Ok(watcher::Event::Apply(copy) | watcher::Event::Delete(copy)) => {
            let DeserializeGuard(Ok(copy)) = copy else {
                return None;
            };
            let guest = copy.spec.guest?;
            let ours = guest.cluster == ctx.cluster && guest.cluster_uid == ctx.cluster_uid;
            ours.then(|| ObjectRef::new(&guest.name).within(&guest.namespace))
        }
        Err(error) => {
            match ctx.host.note(&error) {
                Trouble::Changed => tracing::debug!(%error, "watching the host's copies"),
                trouble => tracing::warn!(?trouble, "watching the host's copies"),
            }
            None
        }
    }
}

/// Waits for the host's first word on our namespace; it is immutable there.
pub(super) async fn claim_namespace(mut facts: watch::Receiver<Facts>) -> Option<String> {
    let known = facts
        .wait_for(|f| matches!(f, Facts::Known(_)))
        .await
        .ok()?;
    match &*known {
        Facts::Known(found) => Some(found.spec.claim_namespace.clone()),
        _ => None,
    }
}

/// New facts, and a host that answers again, wake all claims.
fn link_changes(ctx: &Context) -> impl Stream<Item = ()> + use<> {
    let facts = changes(ctx.host.facts()).map(|_| ());
    let again = changes(ctx.host.answers())
        .filter_map(|answers| futures::future::ready(answers.then_some(())));
    futures::stream::select(facts, again)
}

fn changes<T: Clone + Send + Sync + 'static>(
    receiver: watch::Receiver<T>,
) -> impl Stream<Item = T> {
    futures::stream::unfold(receiver, |mut receiver| async move {
        receiver.changed().await.ok()?;
        let value = receiver.borrow_and_update().clone();
        Some((value, receiver))
    })
}

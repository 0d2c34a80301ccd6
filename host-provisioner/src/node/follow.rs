//! Follows the objects of a kind, and tells when a spec changed.

use std::collections::HashMap;
use std::fmt::Debug;

use futures::StreamExt as _;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Fills the store that it answers with until `stop`; a change of a spec tells `changed`.
pub fn follow<K>(
    client: &Client,
    config: watcher::Config,
    changed: watch::Sender<()>,
    stop: CancellationToken,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let stream = watcher(Api::<K>::all(client.clone()), config)
        .default_backoff()
        .reflect(writer)
        .touched_objects();
    let known = store.clone();
    tokio::spawn(async move {
        let touched = stream.take_until(stop.cancelled_owned());
        futures::pin_mut!(touched);
        let mut specs = Specs::default();
        while let Some(seen) = touched.next().await {
            match seen {
                Ok(object) => {
                    // The store has taken the event in: what it lacks was deleted.
                    let there = known.get(&ObjectRef::from_obj(&object)).is_some();
                    let generation = there.then_some(object.meta().generation).flatten();
                    if specs.changed(object.name_any(), generation) {
                        changed.send_replace(());
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, kind = %K::kind(&()), "a watch was cut");
                }
            }
        }
    });
    store
}

/// The generation of each object's spec that was seen last.
#[derive(Default)]
struct Specs(HashMap<String, i64>);

impl Specs {
    /// Whether an object is new, has another spec than when it was seen last, or is gone
    /// (`None`). Our own reports change the status alone and wake nobody.
    fn changed(&mut self, name: String, generation: Option<i64>) -> bool {
        match generation {
            Some(now) => self.0.insert(name, now) != Some(now),
            None => {
                self.0.remove(&name);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_is_news_once_and_a_deletion_is_news() {
        let mut specs = Specs::default();
        let mut changed = |generation| specs.changed("pf".into(), generation);
        assert!(changed(Some(1)), "it is new");
        assert!(!changed(Some(1)), "our own report");
        assert!(changed(Some(2)), "an administrator's word");
        assert!(changed(None), "somebody deleted it");
        // Made anew by us, with the generation that it had when it was new before.
        assert!(changed(Some(1)));
        assert!(!changed(Some(1)));
    }
}

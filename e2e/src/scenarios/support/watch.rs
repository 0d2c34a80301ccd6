//! Waits on one object by watching it: each change is looked at as it comes, and the
//! error of a wait that ends in vain carries the last state.

use std::time::Duration;

use anyhow::{Result, anyhow};
use futures::StreamExt;
use kube::Api;
use kube::runtime::watcher::watch_object;
use serde::de::DeserializeOwned;

use crate::wait::{Probe, TimedOut};

/// Awaits until `probe` is ready for the object `name`; `None` is "it is not there".
pub async fn until<K, T>(
    api: &Api<K>,
    name: &str,
    what: &str,
    limit: Duration,
    mut probe: impl FnMut(Option<&K>) -> Result<Probe<T>>,
) -> Result<T>
where
    K: kube::Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let mut last = String::from("nothing yet");
    let mut stream = Box::pin(watch_object(api.clone(), name));
    let look = async {
        while let Some(event) = stream.next().await {
            match event {
                Ok(object) => match probe(object.as_ref())? {
                    Probe::Ready(t) => return Ok(t),
                    Probe::NotYet(state) => last = state,
                },
                // The stream goes on by itself after an error.
                Err(e) => last = format!("watching: {e}"),
            }
        }
        Err(anyhow!("the watch on {name} ended"))
    };
    match tokio::time::timeout(limit, look).await {
        Ok(result) => result,
        Err(_) => Err(anyhow!(TimedOut {
            what: what.to_owned(),
            after: limit,
            last
        })),
    }
}

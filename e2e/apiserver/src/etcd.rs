//! The API server's data as etcd has it: what a new server begins with, and the way back to it.
//!
//! Through etcd, because the API would not take everything away: namespaces wait for a
//! controller that these servers do not have, and finalizers for theirs.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Error;

/// All that the API server keeps.
const ALL: (&str, &str) = ("/registry/", "/registry0");
/// What the server itself writes at any time.
const ITS_OWN: [&str; 4] = [
    "/registry/apiregistration.k8s.io/",
    "/registry/leases/kube-system/",
    "/registry/masterleases/",
    "/registry/ranges/",
];
/// What cannot be put back below a server that runs: it serves by them.
const KINDS: &str = "/registry/apiextensions.k8s.io/";
/// Operations of one transaction; etcd allows 128 (`--max-txn-ops`).
const AT_ONCE: usize = 100;
/// Looks until nothing is found that should not be there.
const LOOKS: usize = 20;

/// What the server had when it was new: keys, and their values in base64.
pub(crate) struct Snapshot(BTreeMap<String, String>);

/// One key of etcd's answer, both in base64, as all bytes are in its JSON.
#[derive(Deserialize)]
struct Entry {
    key: String,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
struct Range {
    #[serde(default)]
    kvs: Vec<Entry>,
}

fn bad(what: &str, why: impl std::fmt::Display) -> Error {
    Error::Etcd(format!("{what}: {why}"))
}

/// Sends one request to the JSON gateway of the etcd on `port` of 127.0.0.1.
async fn ask(port: u16, path: &str, body: &Value) -> Result<Vec<u8>, Error> {
    let request = http::Request::post(format!("http://127.0.0.1:{port}/v3/kv/{path}"))
        .body(Full::new(body.to_string().into_bytes().into()))
        .map_err(|e| bad(path, e))?;
    let client: Client<_, Full<hyper::body::Bytes>> =
        Client::builder(TokioExecutor::new()).build_http();
    let answer = client.request(request).await.map_err(|e| bad(path, e))?;
    let status = answer.status();
    let body = answer
        .into_body()
        .collect()
        .await
        .map_err(|e| bad(path, e))?;
    let body = body.to_bytes().to_vec();
    if status.is_success() {
        Ok(body)
    } else {
        Err(bad(path, String::from_utf8_lossy(&body)))
    }
}

async fn all(port: u16) -> Result<BTreeMap<String, String>, Error> {
    let body = json!({"key": STANDARD.encode(ALL.0), "range_end": STANDARD.encode(ALL.1)});
    let answer = ask(port, "range", &body).await?;
    let found: Range = serde_json::from_slice(&answer).map_err(|e| bad("range", e))?;
    let mut all = BTreeMap::new();
    for entry in found.kvs {
        let name = STANDARD.decode(&entry.key).map_err(|e| bad("range", e))?;
        let name = String::from_utf8_lossy(&name).into_owned();
        if !ITS_OWN.iter().any(|own| name.starts_with(own)) {
            all.insert(name, entry.value);
        }
    }
    Ok(all)
}

impl Snapshot {
    pub(crate) async fn take(port: u16) -> Result<Self, Error> {
        all(port).await.map(Self)
    }

    /// What has to be done about what is there now.
    fn back(&self, now: &BTreeMap<String, String>) -> Vec<Step> {
        let new = now.keys().filter(|name| !self.0.contains_key(*name));
        let other = self
            .0
            .iter()
            .filter(|(n, value)| now.get(*n) != Some(value));
        let put = other.map(|(name, value)| Step::Put(name.clone(), value.clone()));
        new.cloned().map(Step::Delete).chain(put).collect()
    }

    /// Puts everything back to what it was. `false`: a kind was changed, so the server is
    /// not as it was whatever its data say, or somebody goes on writing.
    ///
    /// A request that a client sent before it ended may still be carried out; hence one more
    /// look after the one that found nothing to do.
    pub(crate) async fn restore(&self, port: u16) -> Result<bool, Error> {
        let mut quiet = 0;
        for _ in 0..LOOKS {
            let steps = self.back(&all(port).await?);
            if steps.iter().any(|s| s.name().starts_with(KINDS)) {
                return Ok(false);
            }
            quiet = if steps.is_empty() { quiet + 1 } else { 0 };
            if quiet == 2 {
                return Ok(true);
            }
            for some in steps.chunks(AT_ONCE) {
                let some: Vec<Value> = some.iter().map(Step::request).collect();
                ask(port, "txn", &json!({ "success": some })).await?;
            }
        }
        Ok(false)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Put(String, String),
    Delete(String),
}

impl Step {
    fn name(&self) -> &str {
        match self {
            Self::Put(name, _) | Self::Delete(name) => name,
        }
    }

    fn request(&self) -> Value {
        let key = STANDARD.encode(self.name());
        match self {
            Self::Put(_, value) => json!({"request_put": {"key": key, "value": value}}),
            Self::Delete(_) => json!({"request_delete_range": {"key": key}}),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(all: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = all.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
        owned.collect()
    }

    #[test]
    fn the_way_back_deletes_what_is_new_and_puts_back_what_is_other_or_gone() {
        let snapshot = Snapshot(data(&[("same", "1"), ("other", "2"), ("gone", "3")]));
        let now = data(&[("same", "1"), ("other", "9"), ("new", "4")]);
        let put = |name: &str, value: &str| Step::Put(name.into(), value.into());
        assert_eq!(
            snapshot.back(&now),
            [
                Step::Delete("new".into()),
                put("gone", "3"),
                put("other", "2")
            ]
        );
    }
}

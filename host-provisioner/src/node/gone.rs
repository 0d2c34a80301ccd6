//! Claims that are no longer there, or no longer this node's. The only place where the
//! ledger lets go of a VF without having seen its claim give it up, and only on an answer of
//! the API server.

use std::sync::Arc;

use common::api::VFClaim;
use kube::Api;
use kube::core::DynamicObject;
use kube::runtime::reflector::ObjectRef;

use super::agent::Agent;
use super::ledger::Answer;
use super::listen;

/// The claim, if it is there and this node's. What the answer says of the claim's VF goes
/// into the ledger.
pub(super) async fn read(
    agent: &Agent,
    api: &Api<VFClaim>,
    name: &str,
    uid: &str,
) -> Result<Option<VFClaim>, kube::Error> {
    let found = api.get_opt(name).await?;
    let answer = agent
        .ledger
        .lock()
        .answered(found.as_ref(), uid, &agent.node_name);
    match answer {
        Answer::Mine => Ok(found),
        Answer::Gone { freed } => {
            if freed {
                tracing::info!(claim = name, uid, "gone, and its VF is free");
                listen::prune(agent);
                agent.tell_pool_changed();
            }
            Ok(None)
        }
        Answer::Elsewhere => Ok(None),
    }
}

/// Follows up a claim that the watch no longer has, until the API server has answered: a claim
/// that went while a VF was being chosen for it is reconciled by nobody.
pub async fn follow_up(agent: Arc<Agent>, reference: ObjectRef<DynamicObject>) {
    let Some(uid) = reference.extra.uid.as_deref() else {
        return;
    };
    let namespace = reference.namespace.as_deref().unwrap_or_default();
    let api: Api<VFClaim> = Api::namespaced(agent.client.clone(), namespace);
    while agent.ledger.lock().of(uid).is_some() {
        match read(&agent, &api, &reference.name, uid).await {
            Ok(_) => break,
            Err(error) => {
                let again = agent.backoff.failed(uid.to_owned());
                tracing::warn!(claim = reference.name, %error, ?again, "is the claim gone?");
                tokio::time::sleep(again).await;
            }
        }
    }
    agent.backoff.forget(&uid.to_owned());
}

#[cfg(test)]
mod tests;

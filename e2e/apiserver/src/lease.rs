//! What becomes of a Lease when its holder is not looking.

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

/// Somebody else writes his name into the Lease, whatever its holder writes meanwhile.
pub async fn steal(leases: &Api<Lease>, name: &str) -> kube::Result<()> {
    let thief = Patch::Merge(json!({"spec": {"holderIdentity": "thief"}}));
    leases.patch(name, &PatchParams::default(), &thief).await?;
    Ok(())
}

//! Writes what a `PhysicalFunction` withholds: `spec.withheld` and nothing else of it, each
//! write a compare-and-swap.

use std::time::Duration;

use common::api::{PhysicalFunction, VFClaim, WithheldVf};
use kube::api::{Api, Patch, PatchParams};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use super::run::{Controller, MANAGER, RESYNC, ReconcileError};
use super::withhold::{self, Withhold};

/// Enters a claim's VF, if it is not there; the claim's agent waits for it.
pub(super) async fn enter(
    controller: &Controller,
    claims: &Api<VFClaim>,
    claim: &VFClaim,
    due: &Withhold,
) -> Result<(), kube::Error> {
    let name = &due.physical_function;
    let missing = |pf: &PhysicalFunction| withhold::entered(pf, &due.entry);
    // A cache that is behind is put right by its watch, which has the claim looked at again.
    let known = controller.caches.function(name);
    if let Some(Ok(pf)) = known.as_ref().map(|known| &known.0)
        && missing(pf).is_none()
    {
        return Ok(());
    }
    let api: Api<PhysicalFunction> = Api::all(controller.client.clone());
    let pf = api.get(name).await?;
    let Some(all) = missing(&pf) else {
        return Ok(());
    };
    // In this order: an entry is taken out only after its claim has let go of the VF. If the
    // claim has it still, now that the entry is not there, it has not been there before; and
    // should it come to be there meanwhile, the write is refused.
    let now = claims.get_opt(&claim.name_any()).await?;
    if now.as_ref().and_then(withhold::due).as_ref() != Some(due) {
        return Ok(());
    }
    write(&api, &pf, &all).await?;
    tracing::info!(
        pf = name,
        vf = due.entry.vf_index,
        reason = ?due.entry.reason,
        claim = claim.name_any(),
        "withheld"
    );
    Ok(())
}

/// Takes the entries out whose VFs are gone, as the node agent says; when to look again.
pub(super) async fn reconcile(
    controller: &Controller,
    function: &PhysicalFunction,
) -> Result<Duration, ReconcileError> {
    if withhold::settled(function).is_some() {
        let api: Api<PhysicalFunction> = Api::all(controller.client.clone());
        // The cache may be behind; whoever made the object anew has settled nothing.
        if let Some(pf) = api.get_opt(&function.name_any()).await?
            && let Some(left) = withhold::settled(&pf)
        {
            write(&api, &pf, &left).await?;
            tracing::info!(
                pf = pf.name_any(),
                left = left.len(),
                "destroyed VFs are gone"
            );
        }
    }
    Ok(RESYNC)
}

/// Replaces `spec.withheld` of the object as it was seen; 409 when it changed since.
async fn write(
    api: &Api<PhysicalFunction>,
    seen: &PhysicalFunction,
    withheld: &[WithheldVf],
) -> Result<(), kube::Error> {
    let patch = json!({
        "metadata": {
            "uid": seen.meta().uid,
            "resourceVersion": seen.meta().resource_version,
        },
        "spec": {"withheld": withheld},
    });
    let params = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    api.patch(&seen.name_any(), &params, &Patch::Merge(patch))
        .await
        .map(drop)
}

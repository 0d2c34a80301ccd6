//! The pool of the wired PF, as an administrator sees and sets it.

use std::time::Duration;

use anyhow::{Context, Result};
use common::api::{PhysicalFunction, PhysicalFunctionStatus, condition, type_};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::lab::Lab;
use super::watch;
use crate::wait::Probe;

/// Longest a change of the number of VFs may take, once nobody has any.
const RESIZE: Duration = Duration::from_secs(60);
/// VFs that L1's wired PF can have.
const ALL: u16 = 7;

impl Lab<'_> {
    fn functions(&self) -> Api<PhysicalFunction> {
        Api::all(self.host.clone())
    }

    /// The wired PF's object as it is now.
    pub async fn pool(&self) -> Result<PhysicalFunction> {
        Ok(self.functions().get(&self.wired.object).await?)
    }

    /// An administrator's change of the wired PF's spec.
    pub async fn set_pool(&self, spec: Value) -> Result<()> {
        let patch = Patch::Merge(json!({ "spec": spec }));
        self.functions()
            .patch(&self.wired.object, &PatchParams::default(), &patch)
            .await
            .with_context(|| format!("changing the spec of {}", self.wired.object))?;
        Ok(())
    }

    /// Waits until `seen` is true of the wired PF.
    pub async fn pool_until(
        &self,
        what: &str,
        seen: impl Fn(&PhysicalFunction, &PhysicalFunctionStatus) -> bool,
    ) -> Result<PhysicalFunction> {
        watch::until(&self.functions(), &self.wired.object, what, RESIZE, |p| {
            let pf = p.context("the PhysicalFunction is gone")?;
            let status = pf.status.as_ref().context("no status")?;
            Ok(if seen(pf, status) {
                Probe::Ready(pf.clone())
            } else {
                Probe::NotYet(format!(
                    "{} VFs, {:?}, {:?}, {}",
                    status.num_vfs,
                    status.counts,
                    pf.spec.withheld,
                    resized(status).unwrap_or_default()
                ))
            })
        })
        .await
    }
}

/// Reason and message of the condition Resized.
#[must_use]
pub fn resized(status: &PhysicalFunctionStatus) -> Option<String> {
    let c = condition(&status.conditions, type_::RESIZED)?;
    Some(format!("{}: {}", c.reason, c.message))
}

/// The wired PF has all its VFs again, or none, and nobody asks for another number.
pub(super) async fn restore(lab: &Lab<'_>) -> Result<()> {
    let pf = lab.pool().await?;
    let count = pf.status.as_ref().map_or(0, |s| s.num_vfs);
    let as_ever = pf.spec.num_vfs.is_none() && pf.spec.withheld.is_empty();
    if as_ever && (count == ALL || count == 0) {
        return Ok(());
    }
    lab.set_pool(json!({"withheld": null, "numVFs": null}))
        .await?;
    if count != 0 {
        lab.set_pool(json!({"numVFs": ALL})).await?;
        lab.pool_until("all VFs to be there again", |_, s| s.num_vfs == ALL)
            .await?;
        lab.set_pool(json!({"numVFs": null})).await?;
    }
    Ok(())
}

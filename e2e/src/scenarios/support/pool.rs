//! The pools of PFs, as an administrator sees and sets them.

use std::time::Duration;

use anyhow::{Context, Result};
use common::api::{PhysicalFunction, PhysicalFunctionStatus, condition, type_};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::lab::{Lab, Pf};
use super::watch;
use crate::wait::Probe;

/// Longest a change of the number of VFs may take, once nobody has any.
const RESIZE: Duration = Duration::from_secs(60);
/// VFs that a PF of L1 can have.
const ALL: u16 = 7;

impl Lab<'_> {
    fn functions(&self) -> Api<PhysicalFunction> {
        Api::all(self.host.clone())
    }

    /// The PF's object as it is now.
    pub async fn pool(&self, pf: &Pf) -> Result<PhysicalFunction> {
        Ok(self.functions().get(&pf.object).await?)
    }

    /// An administrator's change of the PF's spec.
    pub async fn set_pool(&self, pf: &Pf, spec: Value) -> Result<()> {
        let patch = Patch::Merge(json!({ "spec": spec }));
        self.functions()
            .patch(&pf.object, &PatchParams::default(), &patch)
            .await
            .with_context(|| format!("changing the spec of {}", pf.object))?;
        Ok(())
    }

    /// Waits until `seen` is true of the PF.
    pub async fn pool_until(
        &self,
        pf: &Pf,
        what: &str,
        seen: impl Fn(&PhysicalFunction, &PhysicalFunctionStatus) -> bool,
    ) -> Result<PhysicalFunction> {
        watch::until(&self.functions(), &pf.object, what, RESIZE, |p| {
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

/// The PFs that scenarios set have all their VFs again, or none, and nobody asks for another
/// number.
pub(super) async fn restore(lab: &Lab<'_>) -> Result<()> {
    for pf in [&lab.wired, &lab.second] {
        restore_one(lab, pf).await?;
    }
    Ok(())
}

async fn restore_one(lab: &Lab<'_>, pf: &Pf) -> Result<()> {
    let now = lab.pool(pf).await?;
    let count = now.status.as_ref().map_or(0, |s| s.num_vfs);
    let as_ever = now.spec.num_vfs.is_none() && now.spec.withheld.is_empty();
    if as_ever && (count == ALL || count == 0) {
        return Ok(());
    }
    let nothing = json!({"withheld": null, "numVFs": null, "managed": true});
    lab.set_pool(pf, nothing).await?;
    if count != 0 {
        lab.set_pool(pf, json!({"numVFs": ALL})).await?;
        lab.pool_until(pf, "all VFs to be there again", |_, s| s.num_vfs == ALL)
            .await?;
        lab.set_pool(pf, json!({"numVFs": null})).await?;
    }
    Ok(())
}

//! Claims as a tenant makes and deletes them, their copies on the host, and waits on
//! what their conditions say.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use common::api::{VFClaim, VFClaimStatus, condition, host_claim_name, type_};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use super::lab::{Lab, MARK};
use super::site::L2_NODE;
use super::watch;
use crate::deploy::names::{CLAIM_NAMESPACE, CLASS, TENANT_NAMESPACE};
use crate::wait::Probe;

/// Longest a claim may take from its creation to Ready.
pub const ATTACH: Duration = Duration::from_secs(120);
/// Longest a deleted claim may take to go.
pub const RELEASE: Duration = Duration::from_secs(120);
/// Longest a refusal may take to be said.
pub const REFUSE: Duration = Duration::from_secs(40);

/// What a tenant asks for; the class is [`CLASS`] and the node is L2 unless said otherwise.
#[derive(Clone, Debug)]
pub struct Wish {
    name: String,
    spec: serde_json::Value,
}

impl Wish {
    #[must_use]
    pub fn new(name: &str) -> Self {
        let spec = json!({"className": CLASS, "nodeName": L2_NODE, "network": {}});
        Self {
            name: name.to_owned(),
            spec,
        }
    }

    #[must_use]
    pub fn class(self, class: &str) -> Self {
        self.set("/className", json!(class))
    }

    #[must_use]
    pub fn node(self, node: &str) -> Self {
        self.set("/nodeName", json!(node))
    }

    #[must_use]
    pub fn mac(self, mac: &str) -> Self {
        self.network("macAddress", json!(mac))
    }

    #[must_use]
    pub fn vlan(self, id: i64) -> Self {
        self.network("vlan", json!({"id": id}))
    }

    #[must_use]
    pub fn trust(self, trust: bool) -> Self {
        self.network("trust", json!(trust))
    }

    /// Asks for a namespace, and for nothing of a network interface.
    #[must_use]
    pub fn namespace(mut self, id: u32) -> Self {
        if let Some(spec) = self.spec.as_object_mut() {
            spec.remove("network");
            spec.insert("storage".into(), json!({"namespaceID": id}));
        }
        self
    }

    fn set(mut self, path: &str, value: serde_json::Value) -> Self {
        if let Some(field) = self.spec.pointer_mut(path) {
            *field = value;
        }
        self
    }

    /// Asks for any setting, by its name in the API.
    #[must_use]
    pub fn network(mut self, field: &str, value: serde_json::Value) -> Self {
        if let Some(network) = self.spec.get_mut("network").and_then(|n| n.as_object_mut()) {
            network.insert(field.to_owned(), value);
        }
        self
    }

    /// As it would be in a tenant's file.
    #[must_use]
    pub fn object(&self) -> serde_json::Value {
        json!({
            "apiVersion": "sriov.harvesterhci.io/v1alpha1",
            "kind": "VFClaim",
            "metadata": {"name": self.name, "labels": {MARK: "yes"}},
            "spec": self.spec,
        })
    }
}

/// A claim of the guest cluster.
#[derive(Clone, Debug)]
pub struct Claim {
    pub name: String,
    pub uid: String,
}

impl Claim {
    /// The name of its copy.
    #[must_use]
    pub fn host_name(&self) -> String {
        host_claim_name(&self.uid)
    }

    /// QEMU's id of its device.
    #[must_use]
    pub fn qemu_id(&self) -> String {
        host_claim_name(&self.uid)
    }
}

/// What a claim that can be used says of itself.
#[derive(Clone, Debug)]
pub struct Attached {
    pub host: VFClaim,
    /// The VF's address on the host.
    pub vf: String,
    pub vf_index: u16,
    pub iommu_group: u32,
    pub guest_address: String,
    /// Empty for a VF that is no network interface.
    pub mac: String,
}

impl Lab<'_> {
    pub fn guest_claims(&self) -> Api<VFClaim> {
        Api::namespaced(self.guest.clone(), TENANT_NAMESPACE)
    }

    pub fn host_claims(&self) -> Api<VFClaim> {
        Api::namespaced(self.host.clone(), CLAIM_NAMESPACE)
    }

    /// Creates a claim as the tenant would.
    pub async fn create(&self, wish: &Wish) -> Result<Claim> {
        let api = self.guest_claims();
        let object: VFClaim = serde_json::from_value(wish.object())?;
        let made = api
            .create(&PostParams::default(), &object)
            .await
            .with_context(|| format!("creating claim {}", wish.name))?;
        Ok(Claim {
            name: wish.name.clone(),
            uid: made.metadata.uid.context("the API server gave no UID")?,
        })
    }

    /// Waits until the guest's claim is Ready, and reads its copy.
    pub async fn ready(&self, claim: &Claim) -> Result<Attached> {
        let api = self.guest_claims();
        let what = format!("claim {} to be Ready", claim.name);
        let guest = watch::until(&api, &claim.name, &what, ATTACH, |c| {
            let Some(c) = c else {
                bail!("claim {} is gone", claim.name)
            };
            Ok(if truth(c, type_::READY) == Some("True") {
                Probe::Ready(c.clone())
            } else {
                Probe::NotYet(told(c))
            })
        })
        .await;
        let host = self.host_copy(claim).await?;
        // What the host says explains why the guest's is not Ready.
        let guest = guest
            .with_context(|| format!("its copy: {}", host.as_ref().map_or("none".into(), told)))?;
        let host = host.context("a Ready claim has no copy on the host")?;
        attached(&guest, host)
    }

    /// [`Lab::create`] and [`Lab::ready`].
    pub async fn attach(&self, wish: &Wish) -> Result<(Claim, Attached)> {
        let claim = self.create(wish).await?;
        let attached = self.ready(&claim).await?;
        Ok((claim, attached))
    }

    /// The copy as it is now.
    pub async fn host_copy(&self, claim: &Claim) -> Result<Option<VFClaim>> {
        Ok(self.host_claims().get_opt(&claim.host_name()).await?)
    }

    /// Asks for another network, as the tenant would: what `network` does not say is not asked
    /// for any more.
    pub async fn edit(&self, claim: &Claim, network: serde_json::Value) -> Result<()> {
        let patch = json!([{"op": "replace", "path": "/spec/network", "value": network}]);
        let patch: Patch<()> = Patch::Json(serde_json::from_value(patch)?);
        self.guest_claims()
            .patch(&claim.name, &PatchParams::default(), &patch)
            .await
            .with_context(|| format!("changing claim {}", claim.name))?;
        Ok(())
    }

    /// Waits for `look` to find something in the copy's status.
    pub async fn host_status<T>(
        &self,
        claim: &Claim,
        what: &str,
        look: impl Fn(&VFClaimStatus) -> Option<T>,
    ) -> Result<T> {
        let api = self.host_claims();
        watch::until(&api, &claim.host_name(), what, ATTACH, |c| {
            let Some(c) = c else {
                return Ok(Probe::NotYet("no copy yet".into()));
            };
            let found = c.status.as_ref().and_then(&look);
            Ok(found.map_or_else(|| Probe::NotYet(told(c)), Probe::Ready))
        })
        .await
    }

    /// Waits until the copy exists.
    pub async fn copied(&self, claim: &Claim) -> Result<()> {
        let api = self.host_claims();
        watch::until(
            &api,
            &claim.host_name(),
            "the copy to be made",
            ATTACH,
            |c| Ok(c.map_or(Probe::NotYet("no copy yet".into()), |_| Probe::Ready(()))),
        )
        .await
    }

    /// Waits until the copy is being deleted.
    pub async fn host_deleting(&self, claim: &Claim) -> Result<()> {
        let api = self.host_claims();
        watch::until(
            &api,
            &claim.host_name(),
            "the copy to be deleted",
            RELEASE,
            |c| {
                Ok(match c {
                    Some(c) if c.metadata.deletion_timestamp.is_none() => Probe::NotYet(told(c)),
                    _ => Probe::Ready(()),
                })
            },
        )
        .await
    }

    /// Waits until a condition of the guest's claim has `reason` and is not True.
    pub async fn refused(&self, claim: &Claim, type_: &str, reason: &str) -> Result<Condition> {
        let api = self.guest_claims();
        let what = format!("claim {} to be refused: {type_} with {reason}", claim.name);
        watch::until(&api, &claim.name, &what, REFUSE, |c| {
            let Some(c) = c else {
                bail!("claim {} is gone", claim.name)
            };
            if truth(c, type_::READY) == Some("True") {
                bail!("claim {} was not refused: it is Ready", claim.name)
            }
            let found = conditions(c).and_then(|all| condition(all, type_));
            Ok(
                match found.filter(|f| f.reason == reason && f.status != "True") {
                    Some(f) => Probe::Ready(f.clone()),
                    None => Probe::NotYet(told(c)),
                },
            )
        })
        .await
    }

    /// Waits for an event with `reason` about the guest's claim and returns its words.
    pub async fn event(&self, claim: &Claim, reason: &str) -> Result<String> {
        let api: Api<Event> = Api::namespaced(self.guest.clone(), TENANT_NAMESPACE);
        event(&api, &claim.name, &claim.uid, reason).await
    }

    /// Waits for an event with `reason` about the copy and returns its words.
    pub async fn host_event(&self, claim: &Claim, reason: &str) -> Result<String> {
        let api: Api<Event> = Api::namespaced(self.host.clone(), CLAIM_NAMESPACE);
        let copy = self.host_copy(claim).await?.context("there is no copy")?;
        let uid = copy.metadata.uid.context("a copy without a UID")?;
        event(&api, &claim.host_name(), &uid, reason).await
    }

    /// The reasons of all events about the copy.
    pub async fn host_events(&self, claim: &Claim) -> Result<Vec<String>> {
        let api: Api<Event> = Api::namespaced(self.host.clone(), CLAIM_NAMESPACE);
        let copy = self.host_copy(claim).await?.context("there is no copy")?;
        let events = api.list(&ListParams::default()).await?.items;
        let about = |e: &Event| e.regarding.as_ref().and_then(|r| r.uid.clone());
        let mine = events.into_iter().filter(|e| about(e) == copy.metadata.uid);
        Ok(mine.filter_map(|e| e.reason).collect())
    }

    /// Deletes the claim; returns when both it and its copy are gone.
    pub async fn release(&self, claim: &Claim) -> Result<()> {
        self.delete(claim).await?;
        self.gone(claim).await
    }

    /// Asks for the claim's deletion.
    pub async fn delete(&self, claim: &Claim) -> Result<()> {
        match self
            .guest_claims()
            .delete(&claim.name, &DeleteParams::default())
            .await
        {
            Err(kube::Error::Api(s)) if s.code == 404 => Ok(()),
            other => other
                .map(|_| ())
                .with_context(|| format!("deleting claim {}", claim.name)),
        }
    }

    /// Waits until claim and copy are gone.
    pub async fn gone(&self, claim: &Claim) -> Result<()> {
        let what = format!("claim {} to go", claim.name);
        let went = watch::until(&self.guest_claims(), &claim.name, &what, RELEASE, |c| {
            Ok(match c {
                Some(c) if c.metadata.uid.as_deref() == Some(&claim.uid) => {
                    Probe::NotYet(format!("{:?} {}", c.metadata.finalizers, told(c)))
                }
                _ => Probe::Ready(()),
            })
        })
        .await;
        let copy = self.host_copy(claim).await?;
        let words = copy.as_ref().map_or("none".into(), told);
        went.with_context(|| format!("its copy: {words}"))?;
        if copy.is_some() {
            bail!("claim {} is gone but its copy is not: {words}", claim.name);
        }
        Ok(())
    }
}

/// Waits for an event with `reason` about the claim and returns its words.
async fn event(api: &Api<Event>, name: &str, uid: &str, reason: &str) -> Result<String> {
    let every = Duration::from_millis(300);
    let what = format!("an event {reason} about claim {name}");
    crate::wait::until(&what, REFUSE, every, || async {
        let events = api.list(&ListParams::default()).await?.items;
        let about = |e: &&Event| e.regarding.as_ref().and_then(|r| r.uid.as_deref()) == Some(uid);
        let mine: Vec<&Event> = events.iter().filter(about).collect();
        let found = mine.iter().find(|e| e.reason.as_deref() == Some(reason));
        Ok(match found {
            Some(e) => Probe::Ready(e.note.clone().unwrap_or_default()),
            None => Probe::NotYet(format!(
                "{:?}",
                mine.iter().map(|e| &e.reason).collect::<Vec<_>>()
            )),
        })
    })
    .await
}

fn attached(guest: &VFClaim, host: VFClaim) -> Result<Attached> {
    let status = host.status.as_ref().context("the copy has no status")?;
    let device = status.device.as_ref().context("the copy has no device")?;
    let in_guest = guest.status.as_ref().and_then(|s| s.guest_device.as_ref());
    let in_guest = in_guest.context("the guest's claim does not say where the device is")?;
    Ok(Attached {
        vf: device
            .pci_address
            .clone()
            .context("the device has no address")?,
        vf_index: device.vf_index,
        iommu_group: device
            .iommu_group
            .context("the device has no IOMMU group")?,
        guest_address: in_guest.pci_address.clone(),
        mac: in_guest
            .mac_address
            .as_deref()
            .unwrap_or_default()
            .to_lowercase(),
        host: host.clone(),
    })
}

fn conditions(claim: &VFClaim) -> Option<&[Condition]> {
    claim.status.as_ref().map(|s| s.conditions.as_slice())
}

/// The status of one of the claim's conditions, if it has that.
pub fn truth<'c>(claim: &'c VFClaim, type_: &str) -> Option<&'c str> {
    condition(conditions(claim)?, type_).map(|c| c.status.as_str())
}

/// A claim's conditions in one line, for errors.
#[must_use]
pub fn told(claim: &VFClaim) -> String {
    let all = conditions(claim).unwrap_or_default();
    if all.is_empty() {
        return "no condition yet".into();
    }
    let each = all
        .iter()
        .map(|c| format!("{}={} {} ({})", c.type_, c.status, c.reason, c.message));
    each.collect::<Vec<_>>().join("; ")
}

/// Deletes every claim that a scenario made, in both clusters, and waits for them to go.
pub async fn remove_all(lab: &Lab<'_>) -> Result<()> {
    let marked = ListParams::default().labels(MARK);
    for claim in lab.guest_claims().list(&marked).await? {
        let name = claim.metadata.name.unwrap_or_default();
        let uid = claim.metadata.uid.unwrap_or_default();
        lab.release(&Claim { name, uid }).await?;
    }
    // Forged copies have no claim in the guest that would take them along.
    let api = lab.host_claims();
    for claim in api.list(&marked).await? {
        let name = claim.metadata.name.unwrap_or_default();
        api.delete(&name, &DeleteParams::default()).await?;
        watch::until(&api, &name, &format!("copy {name} to go"), RELEASE, |c| {
            Ok(c.map_or(Probe::Ready(()), |c| Probe::NotYet(told(c))))
        })
        .await?;
    }
    Ok(())
}

/// A spec that the API server must refuse: creates it and returns what it said.
pub async fn refused_at_once(lab: &Lab<'_>, wish: &Wish) -> Result<String> {
    let api = super::kinds::claims_untyped(&lab.guest);
    let object = serde_json::from_value(wish.object())?;
    match api.create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(s)) if s.code == 422 => Ok(s.message),
        Err(e) => Err(e.into()),
        Ok(_) => bail!("the API server took {}", wish.object()),
    }
}

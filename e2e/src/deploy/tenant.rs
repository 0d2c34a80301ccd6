//! What administrators and the tenant set up besides the charts: namespaces, classes, the
//! GuestCluster, and the guest's way into the host cluster. Everything may be done again.

use std::time::Duration;

use anyhow::{Context, Result};
use common::api::{
    DEFAULT_CLASS_ANNOTATION, GUEST_USER_PREFIX, GuestCluster, VFClass, condition, type_,
};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{Patch, PatchParams};
use kube::config::Kubeconfig;
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::apply::MANAGER;
use super::credential;
use super::names::{
    CLAIM_NAMESPACE, CLASS, DEFAULT_CLASS, GUEST_CLUSTER, HOST_KUBECONFIG_SECRET, SYSTEM,
    TENANT_NAMESPACE, VM_NAMESPACE,
};
use crate::clusters::Cluster;
use crate::wait::{self, Probe};

/// The key of the kubeconfig in its Secret.
pub const KUBECONFIG_KEY: &str = "kubeconfig";

/// Waits until the controller has made what the guest needs.
pub async fn guest_is_ready(host: &Cluster) -> Result<()> {
    let api: Api<GuestCluster> = Api::all(host.client());
    let what = format!("GuestCluster {GUEST_CLUSTER} to be Ready");
    wait::until(
        &what,
        Duration::from_secs(60),
        Duration::from_millis(500),
        || async {
            let status = api.get(GUEST_CLUSTER).await?.status.unwrap_or_default();
            let ready = condition(&status.conditions, type_::READY).filter(|c| c.status == "True");
            Ok(match ready {
                Some(_) => Probe::Ready(()),
                None => Probe::NotYet(format!("{:?}", status.conditions)),
            })
        },
    )
    .await
}

/// The administrator's word on classes and the guest. Needs the CRDs.
pub async fn guest_cluster(host: &Cluster) -> Result<()> {
    let client = host.client();
    let classes: Api<VFClass> = Api::all(client.clone());
    let all = [
        "MacAddress",
        "Vlan",
        "SpoofCheck",
        "Trust",
        "LinkState",
        "MinTxRateMbps",
        "MaxTxRateMbps",
    ];
    apply(
        &classes,
        CLASS,
        &class("every setting may be chosen", &all, false),
    )
    .await?;
    let mac = ["MacAddress"];
    apply(
        &classes,
        DEFAULT_CLASS,
        &class("for claims that name no class", &mac, true),
    )
    .await?;
    let guests: Api<GuestCluster> = Api::all(client);
    let spec = json!({
        "claimNamespace": CLAIM_NAMESPACE,
        "vmNamespace": VM_NAMESPACE,
        "vmSelector": {"matchLabels": {"guest-cluster": GUEST_CLUSTER}},
        "classes": [CLASS, DEFAULT_CLASS],
    });
    apply(&guests, GUEST_CLUSTER, &json!({"spec": spec})).await
}

fn class(description: &str, overrides: &[&str], default: bool) -> Value {
    let annotations = if default {
        json!({DEFAULT_CLASS_ANNOTATION: "true"})
    } else {
        json!({})
    };
    json!({
        "metadata": {"annotations": annotations},
        "spec": {
            "description": description,
            "pfSelector": {"drivers": ["igb"]},
            "allowedOverrides": overrides,
        },
    })
}

/// The tenant's namespace, and the Secret with which the guest-syncer reaches the host.
pub async fn guest_side(host: &Cluster, guest: &Cluster) -> Result<()> {
    let client = guest.client();
    namespace(&client, TENANT_NAMESPACE).await?;
    namespace(&client, SYSTEM).await?;
    let secrets: Api<Secret> = Api::namespaced(client, SYSTEM);
    let server = format!("https://{}:6443", host.node());
    let ca = authority(host)?;
    let known = secrets.get_opt(HOST_KUBECONFIG_SECRET).await?;
    if known.is_some_and(|s| serves(&s, &server, &ca)) {
        return Ok(());
    }
    let user = format!("{GUEST_USER_PREFIX}{GUEST_CLUSTER}");
    let credential = credential::sign(&host.client(), &user).await?;
    let text = credential::kubeconfig(&server, &ca, &credential)?;
    apply(
        &secrets,
        HOST_KUBECONFIG_SECRET,
        &json!({"stringData": {KUBECONFIG_KEY: text}}),
    )
    .await
}

/// Base64 of the host API server's CA, from the administrator's kubeconfig.
fn authority(host: &Cluster) -> Result<String> {
    let config = Kubeconfig::read_from(&host.kubeconfig)?;
    config
        .clusters
        .first()
        .and_then(|c| c.cluster.as_ref())
        .and_then(|c| c.certificate_authority_data.clone())
        .with_context(|| format!("{} names no CA", host.kubeconfig.display()))
}

/// Whether the Secret was made for this very host cluster: a new one has a new CA.
fn serves(secret: &Secret, server: &str, ca: &str) -> bool {
    let text = secret
        .data
        .as_ref()
        .and_then(|d| d.get(KUBECONFIG_KEY))
        .and_then(|b| std::str::from_utf8(&b.0).ok());
    let config = text.and_then(|t| Kubeconfig::from_yaml(t).ok());
    let cluster = config
        .and_then(|c| c.clusters.into_iter().next())
        .and_then(|c| c.cluster);
    cluster.is_some_and(|c| {
        c.server.as_deref() == Some(server) && c.certificate_authority_data.as_deref() == Some(ca)
    })
}

async fn namespace(client: &Client, name: &str) -> Result<()> {
    apply(&Api::<Namespace>::all(client.clone()), name, &json!({})).await
}

/// Server-side applies `fields` as object `name` of the API's kind.
async fn apply<K>(api: &Api<K>, name: &str, fields: &Value) -> Result<()>
where
    K: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    let mut object = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": name},
    });
    merge(&mut object, fields);
    api.patch(
        name,
        &PatchParams::apply(MANAGER).force(),
        &Patch::Apply(&object),
    )
    .await
    .with_context(|| format!("applying {} {name}", K::kind(&())))?;
    Ok(())
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (k, v) in from {
                merge(into.entry(k.clone()).or_insert(Value::Null), v);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_for_another_ca_or_server_is_made_again() {
        let credential = credential::Credential {
            certificate: "c".into(),
            key: "k".into(),
        };
        let text = credential::kubeconfig("https://h:6443", "Q0E=", &credential).unwrap();
        let data = [(
            KUBECONFIG_KEY.to_owned(),
            k8s_openapi::ByteString(text.into_bytes()),
        )];
        let secret = Secret {
            data: Some(data.into()),
            ..Secret::default()
        };
        assert!(serves(&secret, "https://h:6443", "Q0E="));
        assert!(!serves(&secret, "https://h:6443", "Q0F="));
        assert!(!serves(&secret, "https://i:6443", "Q0E="));
        assert!(!serves(&Secret::default(), "https://h:6443", "Q0E="));
    }

    #[test]
    fn fields_are_merged_into_the_object() {
        let mut object = json!({"metadata": {"name": "a"}});
        merge(&mut object, &json!({"metadata": {"labels": {}}, "spec": 1}));
        assert_eq!(
            object,
            json!({"metadata": {"name": "a", "labels": {}}, "spec": 1})
        );
    }
}

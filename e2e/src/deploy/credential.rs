//! The guest's credential for the host cluster, as an administrator would make it today:
//! a key and a request, approved and signed through the host's CSR API. Touches one
//! CertificateSigningRequest and nothing else.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use serde_json::json;

use crate::wait::{self, Probe};

const LIMIT: Duration = Duration::from_secs(60);
const EVERY: Duration = Duration::from_millis(200);
/// Longer than any data centre lives.
const SECONDS: i32 = 7 * 24 * 3600;

/// A client certificate and its key, both PEM.
pub struct Credential {
    pub certificate: String,
    pub key: String,
}

/// A credential whose CN, the user's name to the API server, is `user`.
pub async fn sign(host: &Client, user: &str) -> Result<Credential> {
    let key = KeyPair::generate()?;
    let request = request(user, &key)?;
    let api: Api<CertificateSigningRequest> = Api::all(host.clone());
    let csr: CertificateSigningRequest = serde_json::from_value(json!({
        "metadata": {"generateName": "e2e-guest-"},
        "spec": {
            "request": ByteString(request.into_bytes()),
            "signerName": "kubernetes.io/kube-apiserver-client",
            "usages": ["client auth"],
            "expirationSeconds": SECONDS,
        },
    }))?;
    let csr = api
        .create(&PostParams::default(), &csr)
        .await
        .context("asking for the guest's certificate")?;
    let name = csr.metadata.name.context("the request has no name")?;
    let approval = json!({"status": {"conditions": [{
        "type": "Approved",
        "status": "True",
        "reason": "Administrator",
        "message": "approved by the emulated data centre's administrator",
    }]}});
    api.patch_approval(&name, &PatchParams::default(), &Patch::Merge(&approval))
        .await
        .context("approving the guest's certificate")?;
    let certificate = wait::until(
        &format!("request {name} to be signed"),
        LIMIT,
        EVERY,
        || async {
            let status = api.get(&name).await?.status.unwrap_or_default();
            Ok(match status.certificate {
                Some(ByteString(pem)) => Probe::Ready(String::from_utf8(pem)?),
                None => Probe::NotYet(format!("{:?}", status.conditions)),
            })
        },
    )
    .await?;
    api.delete(&name, &DeleteParams::default()).await?;
    Ok(Credential {
        certificate,
        key: key.serialize_pem(),
    })
}

fn request(user: &str, key: &KeyPair) -> Result<String> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, user);
    Ok(params.serialize_request(key)?.pem()?)
}

/// A kubeconfig for `credential` at `server`, whose CA is `ca` (base64 of its PEM).
pub fn kubeconfig(server: &str, ca: &str, credential: &Credential) -> Result<String> {
    let encode = |text: &str| serde_json::to_value(ByteString(text.as_bytes().to_vec()));
    Ok(serde_json::to_string_pretty(&json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "host",
        "clusters": [{
            "name": "host",
            "cluster": {"server": server, "certificate-authority-data": ca},
        }],
        "users": [{
            "name": "guest",
            "user": {
                "client-certificate-data": encode(&credential.certificate)?,
                "client-key-data": encode(&credential.key)?,
            },
        }],
        "contexts": [{"name": "host", "context": {"cluster": "host", "user": "guest"}}],
    }))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_pem_and_kubeconfig_is_read_by_clients() {
        let key = KeyPair::generate().unwrap();
        let pem = request("sriov.harvesterhci.io:guest:a", &key).unwrap();
        assert!(
            pem.starts_with("-----BEGIN CERTIFICATE REQUEST-----"),
            "{pem}"
        );
        let credential = Credential {
            certificate: "CERT".into(),
            key: "KEY".into(),
        };
        let text = kubeconfig("https://h:6443", "Q0E=", &credential).unwrap();
        let config: kube::config::Kubeconfig = kube::config::Kubeconfig::from_yaml(&text).unwrap();
        let cluster = config.clusters[0].cluster.as_ref().unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://h:6443"));
        assert_eq!(cluster.certificate_authority_data.as_deref(), Some("Q0E="));
        let user = config.auth_infos[0].auth_info.as_ref().unwrap();
        assert_eq!(user.client_certificate_data.as_deref(), Some("Q0VSVA=="));
    }
}

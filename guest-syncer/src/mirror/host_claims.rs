//! The copies on the host: the only code that writes to the host cluster, and
//! only `VFClaim`s of our own claim namespace.

use common::api::{GUEST_GENERATION_ANNOTATION, VFClaim};
use common::kube::{is_gone, says_not_found};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::DeserializeGuard;
use kube::core::params::ValidationDirective;
use kube::{Error, Resource as _, ResourceExt as _};
use serde_json::{Value, json};

use super::orphans::HostCopy;
use super::up::Edit;
use crate::host_link::{HostLink, Trouble};

/// Objects in one page of a list, as kubectl asks for them.
const PAGE: u32 = 500;

/// What became of a POST.
#[derive(Clone, Debug, PartialEq)]
pub enum Created {
    Made(Box<VFClaim>),
    /// The name is taken: by an earlier try of ours, or by somebody else.
    Exists,
}

/// The claims of one guest on its host.
pub struct HostClaims<'a> {
    link: &'a HostLink,
    namespace: &'a str,
    api: Api<VFClaim>,
}

impl<'a> HostClaims<'a> {
    #[must_use]
    pub fn new(link: &'a HostLink, namespace: &'a str) -> Self {
        Self {
            link,
            namespace,
            api: Api::namespaced(link.client(), namespace),
        }
    }

    /// The copy as the host has it now; `None` only when the host said that
    /// there is none.
    pub async fn get(&self, name: &str) -> Result<Option<VFClaim>, Trouble> {
        self.link
            .call(async {
                match self.api.get(name).await {
                    Ok(found) => Ok(Ok(Some(found))),
                    Err(error) if says_not_found::<VFClaim>(&error, name) => Ok(Ok(None)),
                    Err(error) if is_gone(&error) => Ok(Err(Trouble::Failing(no_such_api()))),
                    Err(error) => Err(error),
                }
            })
            .await?
    }

    /// All objects in our namespace as the host has them now: a complete list
    /// from a quorum, not from a cache, or an error.
    pub async fn list(&self) -> Result<Vec<DeserializeGuard<VFClaim>>, Trouble> {
        self.list_by(PAGE).await
    }

    /// The same, `page` objects a request.
    pub async fn list_by(&self, page: u32) -> Result<Vec<DeserializeGuard<VFClaim>>, Trouble> {
        let api: Api<DeserializeGuard<VFClaim>> =
            Api::namespaced(self.link.client(), self.namespace);
        // Without a resourceVersion the host answers with its newest state.
        let mut params = ListParams::default().limit(page);
        let mut found = Vec::new();
        loop {
            let page = match self.link.call(api.list(&params)).await {
                // A 404 is no empty list.
                Err(Trouble::Changed) => return Err(Trouble::Failing(no_such_api())),
                answered => answered?,
            };
            found.extend(page.items);
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                return Ok(found);
            }
        }
    }

    /// POST, never apply: apply would adopt what somebody else made. Strict, so
    /// that a host of an older version refuses a field that it does not know
    /// (`vlan`) instead of dropping it.
    pub async fn create(&self, copy: &VFClaim) -> Result<Created, Trouble> {
        let request = strict_post(self.namespace, copy).map_err(|e| Trouble::of(&e))?;
        let client = self.link.client();
        self.link
            .call(async {
                match client.request::<VFClaim>(request).await {
                    Ok(made) => Ok(Ok(Created::Made(Box::new(made)))),
                    Err(Error::Api(status)) if status.reason == "AlreadyExists" => {
                        Ok(Ok(Created::Exists))
                    }
                    Err(Error::Api(status)) if status.code == 404 => {
                        Ok(Err(Trouble::Refused(format!(
                            "{} (the claim namespace {:?} or the VFClaim API is missing on the host)",
                            status.message, self.namespace
                        ))))
                    }
                    Err(error) => Err(error),
                }
            })
            .await?
    }

    /// Writes an edit onto the copy as it was `seen`: another resourceVersion
    /// answers 409, and a patch never creates.
    pub async fn update(&self, seen: &VFClaim, edit: &Edit) -> Result<VFClaim, Trouble> {
        // A list of JSON Patch operations always reads as one.
        let patch = serde_json::from_value(edit_operations(seen, edit))
            .map_err(|e| Trouble::Failing(e.to_string()))?;
        let params = PatchParams::default().validation(ValidationDirective::Strict);
        let name = seen.name_any();
        self.link
            .call(self.api.patch(&name, &params, &Patch::Json::<()>(patch)))
            .await
    }

    /// Deletes the copy if it is still the object that was `seen`.
    pub async fn delete(&self, seen: &VFClaim) -> Result<(), Trouble> {
        // Gone, or another object of that name: the caller looks.
        self.delete_if(&seen.name_any(), seen.uid(), None)
            .await
            .map(drop)
    }

    /// Deletes an orphaned copy if it is still as it was seen; false when it is
    /// not, or gone.
    pub async fn delete_orphan(&self, seen: &HostCopy) -> Result<bool, Trouble> {
        let version = seen.resource_version.clone();
        self.delete_if(&seen.name, Some(seen.uid.clone()), Some(version))
            .await
    }

    async fn delete_if(
        &self,
        name: &str,
        uid: Option<String>,
        resource_version: Option<String>,
    ) -> Result<bool, Trouble> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid,
                resource_version,
            }),
            ..DeleteParams::default()
        };
        match self.link.call(self.api.delete(name, &params)).await {
            Ok(_) => Ok(true),
            Err(Trouble::Changed) => Ok(false),
            Err(trouble) => Err(trouble),
        }
    }
}

/// A 404 that is not about the object proves nothing about it: the CRD may be
/// missing for a moment, or the answer come from something in between.
fn no_such_api() -> String {
    "the host answers that it has no VFClaim API (chart vf-crds); nothing is concluded from that"
        .to_owned()
}

fn strict_post(namespace: &str, copy: &VFClaim) -> Result<http::Request<Vec<u8>>, Error> {
    let body = serde_json::to_vec(copy).map_err(Error::SerdeError)?;
    let path = VFClaim::url_path(&(), Some(namespace));
    // kube's PostParams has no field validation.
    let params = PostParams {
        field_manager: Some(super::MANAGER.to_owned()),
        ..PostParams::default()
    };
    let mut request = kube::core::Request::new(path)
        .create(&params, body)
        .map_err(Error::BuildRequest)?;
    let uri = format!("{}&fieldValidation=Strict", request.uri())
        .parse()
        .map_err(|e: http::uri::InvalidUri| Error::HttpError(e.into()))?;
    *request.uri_mut() = uri;
    Ok(request)
}

/// A JSON Patch rather than a merge: a merge would keep a `qos` that the new
/// `vlan` does not have, and a replace would drop fields of a newer host.
fn edit_operations(seen: &VFClaim, edit: &Edit) -> Value {
    let set = |path: &str, value: Value| json!({"op": "add", "path": path, "value": value});
    let mut operations = vec![
        set("/metadata/uid", json!(seen.metadata.uid)),
        set(
            "/metadata/resourceVersion",
            json!(seen.metadata.resource_version),
        ),
    ];
    if seen.metadata.annotations.is_none() {
        operations.push(set("/metadata/annotations", json!({})));
    }
    let annotation = GUEST_GENERATION_ANNOTATION
        .replace('~', "~0")
        .replace('/', "~1");
    operations.push(set(
        &format!("/metadata/annotations/{annotation}"),
        json!(edit.guest_generation.to_string()),
    ));
    let mut field = |path: &str, had: bool, value: Option<Value>| match value {
        Some(value) => operations.push(set(path, value)),
        None if had => operations.push(json!({"op": "remove", "path": path})),
        None => {}
    };
    field(
        "/spec/network",
        seen.spec.network.is_some(),
        edit.network.as_ref().map(|n| json!(n)),
    );
    field(
        "/spec/vmIP",
        seen.spec.vm_ip.is_some(),
        edit.vm_ip.as_ref().map(|ip| json!(ip)),
    );
    Value::Array(operations)
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::api::{NetworkRequest, VFClaimSpec, Vlan};

    #[test]
    fn a_new_vlan_without_qos_takes_the_old_qos_away() {
        let network = |qos| {
            Some(NetworkRequest {
                vlan: Some(Vlan {
                    id: 5,
                    qos,
                    ..Vlan::default()
                }),
                ..NetworkRequest::default()
            })
        };
        let mut seen = VFClaim::new(
            "vfc-u",
            VFClaimSpec {
                network: network(Some(3)),
                vm_ip: Some("10.0.0.1".into()),
                ..VFClaimSpec::default()
            },
        );
        seen.metadata.resource_version = Some("7".into());
        let edit = Edit {
            network: network(None),
            vm_ip: None,
            guest_generation: 2,
        };
        let operations = edit_operations(&seen, &edit);
        let of = |path: &str| {
            let all = operations.as_array().unwrap();
            all.iter().find(|o| o["path"] == path).cloned().unwrap()
        };
        assert_eq!(of("/spec/network")["value"], json!({"vlan": {"id": 5}}));
        assert_eq!(of("/spec/vmIP")["op"], "remove");
        assert_eq!(of("/metadata/resourceVersion")["value"], "7");
        assert_eq!(
            of("/metadata/annotations/sriov.harvesterhci.io~1guest-generation")["value"],
            "2"
        );
    }

    #[test]
    fn a_post_is_strict() {
        let request = strict_post("ns", &VFClaim::new("x", VFClaimSpec::default())).unwrap();
        let uri = request.uri().to_string();
        assert!(uri.starts_with("/apis/sriov.harvesterhci.io/v1alpha1/namespaces/ns/vfclaims?"));
        assert!(uri.contains("fieldValidation=Strict"), "{uri}");
    }
}

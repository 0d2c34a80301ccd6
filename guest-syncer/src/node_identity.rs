//! Who a guest Node says it is: what of a Node goes into a host claim.
//!
//! Pure. `status.nodeInfo.systemUUID` is the identity, because it is the
//! firmware UUID that the hypervisor gave the machine. Hostname and MAC decide
//! nothing, and `spec.providerID` is only passed along: Harvester's cloud
//! provider derives it from the hostname, so it can name another tenant's VM.

use std::net::IpAddr;

use common::api::reason;
use k8s_openapi::api::core::v1::Node;
use thiserror::Error;

/// The most of `providerID` that a host claim carries (the CRD's bound).
const PROVIDER_ID_MAX: usize = 512;

/// What a host claim says of a guest Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    /// The Node's name.
    pub name: String,
    /// The machine's UUID, lower-case, 36 characters.
    pub system_uuid: String,
    /// `spec.providerID`, when it has one that fits.
    pub provider_id: Option<String>,
    /// The first InternalIP that is an IP address: a cross-check, never an identity.
    pub internal_ip: Option<String>,
}

/// Why a claim's node cannot be named to the host; each sentence says what to do.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NodeProblem {
    #[error(
        "spec.nodeName is not set: a claim in a guest cluster names the node that gets the VF; \
         delete this claim and make one with spec.nodeName (spec.guest is for copies on a host cluster)"
    )]
    NoTarget,
    #[error(
        "this cluster has no node {0:?}; `kubectl get nodes` lists the names. The claim goes on as \
         soon as a node of that name registers; if the name is wrong, delete the claim and make another"
    )]
    NotFound(String),
    #[error(
        "node {name:?} reports the systemUUID {found:?}, which is no UUID of a machine: \
         its VM cannot be found by it. Check status.nodeInfo of the node and its kubelet"
    )]
    NoSystemUuid { name: String, found: String },
}

impl NodeProblem {
    /// The condition reason.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NoTarget => super::mirror::INVALID_TARGET,
            Self::NotFound(_) => reason::NODE_NOT_FOUND,
            Self::NoSystemUuid { .. } => reason::NODE_WITHOUT_UUID,
        }
    }
}

/// Reads a Node's identity.
pub fn identify(node: &Node) -> Result<NodeIdentity, NodeProblem> {
    let name = node.metadata.name.clone().unwrap_or_default();
    let status = node.status.as_ref();
    let found = status
        .and_then(|s| s.node_info.as_ref())
        .map(|i| i.system_uuid.as_str())
        .unwrap_or_default();
    let system_uuid = machine_uuid(found).ok_or_else(|| NodeProblem::NoSystemUuid {
        name: name.clone(),
        found: found.chars().take(64).collect(),
    })?;
    let internal_ip = status
        .and_then(|s| s.addresses.as_deref())
        .unwrap_or_default()
        .iter()
        .filter(|a| a.type_ == "InternalIP")
        .find_map(|a| a.address.parse::<IpAddr>().ok())
        .map(|ip| ip.to_string());
    let provider_id = node
        .spec
        .as_ref()
        .and_then(|s| s.provider_id.clone())
        .filter(|id| !id.is_empty() && id.len() <= PROVIDER_ID_MAX);
    Ok(NodeIdentity {
        name,
        system_uuid,
        provider_id,
        internal_ip,
    })
}

/// The UUID in lower case (SMBIOS tools print it in either), unless it is none
/// or one of the two that firmware without a UUID shows (all 0, all f: SMBIOS
/// specification 7.2.1), which many machines share.
fn machine_uuid(text: &str) -> Option<String> {
    let text = text.trim().to_ascii_lowercase();
    let groups: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|g| g.len()).collect();
    let hex = groups
        .iter()
        .all(|g| g.bytes().all(|b| b.is_ascii_hexdigit()));
    let same = |c: char| text.chars().all(|x| x == c || x == '-');
    (lengths == [8, 4, 4, 4, 12] && hex && !same('0') && !same('f')).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const UUID: &str = "6F1C1C3E-0d3d-4d4b-9a57-8a3a0f4f6a01";

    fn node(uuid: &str, provider: Option<&str>, addresses: &[(&str, &str)]) -> Node {
        let addresses: Vec<_> = addresses
            .iter()
            .map(|(t, a)| json!({"type": t, "address": a}))
            .collect();
        serde_json::from_value(json!({
            "metadata": {"name": "w1"},
            "spec": {"providerID": provider},
            "status": {"addresses": addresses, "nodeInfo": {
                "machineID": "", "systemUUID": uuid, "bootID": "", "kernelVersion": "",
                "osImage": "", "containerRuntimeVersion": "", "kubeletVersion": "",
                "kubeProxyVersion": "", "operatingSystem": "", "architecture": "",
            }},
        }))
        .unwrap()
    }

    #[test]
    fn the_uuid_is_lower_case_and_the_first_internal_ip_is_taken() {
        let n = node(
            UUID,
            Some("harvester://ns/w1"),
            &[
                ("Hostname", "w1"),
                ("ExternalIP", "192.0.2.1"),
                ("InternalIP", "not-an-ip"),
                ("InternalIP", "10.0.0.7"),
                ("InternalIP", "10.0.0.8"),
            ],
        );
        assert_eq!(
            identify(&n),
            Ok(NodeIdentity {
                name: "w1".into(),
                system_uuid: UUID.to_lowercase(),
                provider_id: Some("harvester://ns/w1".into()),
                internal_ip: Some("10.0.0.7".into()),
            })
        );
    }

    #[test]
    fn what_is_no_machine_uuid_is_refused_in_words() {
        for uuid in [
            "",
            "w1",
            "00000000-0000-0000-0000-000000000000",
            "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
            "6f1c1c3e-0d3d-4d4b-9a57-8a3a0f4f6a0",
            "6f1c1c3e0d3d-4d4b-9a57-8a3a-0f4f6a01",
            "6f1c1c3g-0d3d-4d4b-9a57-8a3a0f4f6a01",
        ] {
            let problem = identify(&node(uuid, None, &[])).unwrap_err();
            assert_eq!(problem.reason(), "NodeWithoutSystemUUID", "{uuid:?}");
            assert!(problem.to_string().contains("w1"), "{problem}");
        }
    }

    #[test]
    fn a_node_without_status_has_no_identity() {
        assert!(identify(&Node::default()).is_err());
    }

    #[test]
    fn a_provider_id_that_does_not_fit_is_left_out() {
        let long = "x".repeat(PROVIDER_ID_MAX + 1);
        let found = identify(&node(UUID, Some(&long), &[])).unwrap();
        assert_eq!((found.provider_id, found.internal_ip), (None, None));
    }
}

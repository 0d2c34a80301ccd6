//! The small values: PCI addresses and ids, MAC addresses, durations, machine UUIDs of nodes.

use common::cli::parse_duration;
use common::pci::{PciAddress, PciId};
use guest_syncer::node_identity::identify;
use host_provisioner::kernel::MacAddr;
use k8s_openapi::api::core::v1::Node;
use serde_json::json;

pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let text = text.as_ref();
    if let Ok(address) = text.parse::<PciAddress>() {
        assert_eq!(address.to_string(), text.to_ascii_lowercase());
        let parts = PciAddress::new(
            address.domain(),
            address.bus(),
            address.slot(),
            address.function(),
        );
        assert_eq!(parts, Some(address));
    }
    if let Ok(id) = text.parse::<PciId>() {
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    if let Ok(mac) = text.parse::<MacAddr>() {
        assert_eq!(mac.to_string(), text.to_ascii_lowercase());
    }
    if let Ok(duration) = parse_duration(text) {
        // What is accepted may be waited for: no arithmetic on it may overflow at once.
        let millis = duration.as_millis();
        let again = parse_duration(&format!("{millis}ms")).expect("a duration in milliseconds");
        // Big ones are as exact as a f64.
        let off = again.as_secs_f64() - duration.as_secs_f64();
        assert!(off.abs() <= 0.001 + duration.as_secs_f64() * 1e-9, "{text}");
    }
    node(text);
}

/// A node's word on which machine it is, and where.
fn node(text: &str) {
    let (uuid, rest) = text.split_once('\n').unwrap_or((text, ""));
    let (address, provider) = rest.split_once('\n').unwrap_or((rest, ""));
    let node: Node = serde_json::from_value(json!({
        "metadata": {"name": "w1"},
        "spec": {"providerID": provider},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address}],
            "nodeInfo": {
                "machineID": "", "systemUUID": uuid, "bootID": "", "kernelVersion": "",
                "osImage": "", "containerRuntimeVersion": "", "kubeletVersion": "",
                "kubeProxyVersion": "", "operatingSystem": "", "architecture": "",
            },
        },
    }))
    .expect("a node");
    match identify(&node) {
        Ok(found) => {
            // The bounds of the host's schema, or the copy could never be made.
            assert_eq!(found.system_uuid.len(), 36);
            assert_eq!(found.system_uuid, uuid.trim().to_ascii_lowercase());
            assert!(found.system_uuid.bytes().any(|b| b != b'0' && b != b'-'));
            assert!(found.provider_id.is_none_or(|id| id.len() <= 512));
            assert!(found.internal_ip.is_none_or(|ip| ip.len() <= 45));
        }
        // It becomes a condition's message, of which the API has a bound.
        Err(problem) => assert!(problem.to_string().len() < 4096),
    }
}

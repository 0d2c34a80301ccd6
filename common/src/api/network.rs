//! Network wishes, defaults and grants of an Ethernet VF.

use std::fmt;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The Ethernet type of a VLAN tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VlanProtocol {
    /// The customer tag, 0x8100.
    #[default]
    #[serde(rename = "802.1Q")]
    Ieee8021Q,
    /// The service tag, 0x88a8, outside of a tag that the guest puts on itself.
    #[serde(rename = "802.1ad")]
    Ieee8021Ad,
}

impl fmt::Display for VlanProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ieee8021Q => "802.1Q",
            Self::Ieee8021Ad => "802.1ad",
        })
    }
}

/// The link that the PF shows to a VF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LinkState {
    /// As the PF's own link is.
    #[default]
    Auto,
    /// Up, whatever the PF's is: VFs of one PF reach each other without a cable.
    Enable,
    /// Down: nothing is sent or received.
    Disable,
}

impl fmt::Display for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "Auto",
            Self::Enable => "Enable",
            Self::Disable => "Disable",
        })
    }
}

/// A tag that the PF inserts and strips; the guest does not see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Vlan {
    /// VLAN identifier, 1 to 4094.
    #[schemars(range(min = 1, max = 4094))]
    pub id: u16,
    /// Priority code point of the tag, 0 to 7.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 7))]
    pub qos: Option<u8>,
    /// Ethernet type of the tag. Left out: 802.1Q.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<VlanProtocol>,
}

/// What a tenant asks of its VF. What is left out comes from the class.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("!has(self.minTxRateMbps) || !has(self.maxTxRateMbps) || self.minTxRateMbps <= self.maxTxRateMbps").message("minTxRateMbps must not be above maxTxRateMbps")
)]
#[serde(rename_all = "camelCase")]
pub struct NetworkRequest {
    /// Unicast MAC address, colon-separated. Left out: one is derived from the
    /// claim's UID, locally administered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 17),
        regex(pattern = r"^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$")
    )]
    #[x_kube(
        validation = Rule::new("self != '00:00:00:00:00:00'").message("macAddress must not be all zero; leave it out to get one")
    )]
    pub mac_address: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<Vlan>,
    /// Drop frames whose source MAC is not the VF's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoof_check: Option<bool>,
    /// Let the guest change its MAC and go promiscuous.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
    /// The link that the VF is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_state: Option<LinkState>,
    /// What the VF can count on sending, in Mbit/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub min_tx_rate_mbps: Option<u32>,
    /// What the VF cannot exceed in sending, in Mbit/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_tx_rate_mbps: Option<u32>,
}

/// A class's network defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("!has(self.minTxRateMbps) || !has(self.maxTxRateMbps) || self.minTxRateMbps <= self.maxTxRateMbps").message("minTxRateMbps must not be above maxTxRateMbps")
)]
#[serde(rename_all = "camelCase")]
pub struct ClassNetwork {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<Vlan>,
    /// Drop frames whose source MAC is not the VF's. Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoof_check: Option<bool>,
    /// Let the guest change its MAC and go promiscuous. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
    /// The link that the VF is shown. Default Auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_state: Option<LinkState>,
    /// What the VF can count on sending, in Mbit/s. Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub min_tx_rate_mbps: Option<u32>,
    /// What the VF cannot exceed in sending, in Mbit/s. Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_tx_rate_mbps: Option<u32>,
}

/// A network setting that a class may let its claims choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NetworkField {
    MacAddress,
    Vlan,
    SpoofCheck,
    Trust,
    LinkState,
    MinTxRateMbps,
    MaxTxRateMbps,
}

/// What the controller granted: every setting decided, nothing left to default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrantedNetwork {
    #[schemars(length(max = 17))]
    pub mac_address: String,
    /// Absent: untagged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<Vlan>,
    pub spoof_check: bool,
    pub trust: bool,
    /// A grant of an earlier version does not say it: Auto.
    #[serde(default)]
    pub link_state: LinkState,
    /// Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_tx_rate_mbps: Option<u32>,
    /// Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tx_rate_mbps: Option<u32>,
}

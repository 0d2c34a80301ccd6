//! What a claim is granted: class, quota, cordon and the class's policy on what
//! a claim may choose. Pure; the answer is a value or a refusal with a sentence.

use common::api::{
    Admitted, ClassNetwork, ClassStorage, DEFAULT_CLASS_ANNOTATION, GrantedNetwork, GrantedStorage,
    GuestCluster, NetworkField, NetworkRequest, PhysicalFunction, VFClaim, VFClass, Vlan, reason,
};
use kube::ResourceExt as _;
use sha2::{Digest as _, Sha256};

use super::refusal::Refusal;
use crate::driver::supports;
use crate::node::pool::wanted_config;

/// Everything that admission depends on.
pub struct Ask<'a> {
    pub claim: &'a VFClaim,
    /// UID of the guest's claim: the seed of a derived MAC address.
    pub guest_uid: &'a str,
    pub cluster: &'a GuestCluster,
    pub classes: &'a [&'a VFClass],
    /// Claims of this guest, other than this one, that were admitted.
    pub admitted_others: usize,
    /// The PF of the claim's device, as its node's agent reports it; it says what can be
    /// changed on a VF in use. A claim without a device is refused by the agent.
    pub pf: Option<&'a PhysicalFunction>,
}

/// True when the class is the one of claims that name none.
#[must_use]
pub fn is_default(class: &VFClass) -> bool {
    class
        .annotations()
        .get(DEFAULT_CLASS_ANNOTATION)
        .is_some_and(|v| v == "true")
}

/// The classes that this guest may use and that exist, by name.
#[must_use]
pub fn usable<'a>(cluster: &GuestCluster, classes: &[&'a VFClass]) -> Vec<&'a VFClass> {
    let mut usable: Vec<&VFClass> = classes
        .iter()
        .filter(|c| c.metadata.deletion_timestamp.is_none())
        .filter(|c| cluster.spec.classes.contains(&c.name_any()))
        .copied()
        .collect();
    usable.sort_by_key(|c| c.name_any());
    usable
}

/// The default class in force: the newest of those marked, as Kubernetes does
/// it for StorageClasses.
#[must_use]
pub fn default_class<'a>(usable: &[&'a VFClass]) -> Option<&'a VFClass> {
    usable
        .iter()
        .filter(|c| is_default(c))
        .max_by_key(|c| (c.creation_timestamp(), std::cmp::Reverse(c.name_any())))
        .copied()
}

/// What the claim is granted. A claim that has a grant keeps it: for a later
/// generation only the network is decided again, under the class it has.
pub fn admit(ask: &Ask<'_>) -> Result<Admitted, Refusal> {
    let generation = ask.claim.metadata.generation.unwrap_or(0);
    let before = ask.claim.status.as_ref().and_then(|s| s.admitted.as_ref());
    match before {
        Some(granted) if granted.observed_generation == generation => Ok(granted.clone()),
        Some(granted) => regrant(ask, granted, generation),
        None => first_grant(ask, generation),
    }
}

fn first_grant(ask: &Ask<'_>, generation: i64) -> Result<Admitted, Refusal> {
    if ask.cluster.spec.cordoned {
        return Err(Refusal::new(
            reason::CORDONED,
            "the host's administrator has stopped new claims of this cluster for now; the claim \
             goes on by itself when that ends",
        ));
    }
    let class = choose_class(ask)?;
    let quota = ask.cluster.spec.quota.claims;
    if let Some(most) = quota.filter(|most| ask.admitted_others >= *most as usize) {
        return Err(Refusal::new(
            reason::QUOTA_EXCEEDED,
            format!(
                "this cluster may have {most} claims and has {}; delete one, or ask the host's \
                 administrator for more",
                ask.admitted_others
            ),
        ));
    }
    let (network, storage) = match &class.spec.storage {
        Some(of) => (None, Some(grant_storage(ask, &class.name_any(), of)?)),
        None => (Some(first_network(ask, class)?), None),
    };
    Ok(Admitted {
        observed_generation: generation,
        class_name: class.name_any(),
        class_uid: class.uid().unwrap_or_default(),
        pf_selector: class.spec.pf_selector.clone(),
        num_vfs: class.spec.num_vfs,
        reclaim_policy: class.spec.reclaim_policy,
        placement: class.spec.placement,
        network,
        storage,
    })
}

fn first_network(ask: &Ask<'_>, class: &VFClass) -> Result<GrantedNetwork, Refusal> {
    let name = class.name_any();
    if ask.claim.spec.storage.is_some() {
        return Err(Refusal::new(
            reason::OVERRIDE_NOT_ALLOWED,
            format!(
                "VFClass {name} hands out network interfaces and no namespaces; make the claim \
                 again without storage, or with a class for it"
            ),
        ));
    }
    let wish = ask.claim.spec.network.clone().unwrap_or_default();
    Policy {
        class: &name,
        allowed: &class.spec.allowed_overrides,
        current: defaults(&class.spec.network, ask.guest_uid),
        fallback: None,
    }
    .grant(&wish)
}

/// The namespaces of the class that the claim may have: all, or the one that it names. Whether
/// another claim has one its node knows.
fn grant_storage(ask: &Ask<'_>, class: &str, of: &ClassStorage) -> Result<GrantedStorage, Refusal> {
    no_network(ask, class)?;
    let Some(wish) = &ask.claim.spec.storage else {
        return Ok(GrantedStorage {
            namespaces: of.namespaces.clone(),
        });
    };
    if of.namespaces.contains(&wish.namespace_id) {
        return Ok(GrantedStorage {
            namespaces: vec![wish.namespace_id],
        });
    }
    let all: Vec<String> = of.namespaces.iter().map(u32::to_string).collect();
    Err(Refusal::new(
        reason::OVERRIDE_NOT_ALLOWED,
        format!(
            "VFClass {class} does not hand out namespace {}; make the claim again with one of {}, \
             or without storage to get a free one",
            wish.namespace_id,
            all.join(", ")
        ),
    ))
}

fn no_network(ask: &Ask<'_>, class: &str) -> Result<(), Refusal> {
    if ask.claim.spec.network.is_none() {
        return Ok(());
    }
    Err(Refusal::new(
        reason::OVERRIDE_NOT_ALLOWED,
        format!(
            "VFClass {class} hands out NVMe namespaces, which have no network settings; leave \
             network out, or ask for another class"
        ),
    ))
}

fn choose_class<'a>(ask: &Ask<'a>) -> Result<&'a VFClass, Refusal> {
    let usable = usable(ask.cluster, ask.classes);
    let names: Vec<String> = usable.iter().map(|c| c.name_any()).collect();
    let choice = if names.is_empty() {
        "this cluster may use none yet; ask the host's administrator".to_owned()
    } else {
        format!("this cluster may use {}", names.join(", "))
    };
    let Some(wanted) = &ask.claim.spec.class_name else {
        return default_class(&usable).ok_or_else(|| {
            Refusal::new(
                reason::CLASS_NOT_FOUND,
                format!("no class is the default one; make the claim again with spec.className: {choice}"),
            )
        });
    };
    if let Some(class) = usable.iter().find(|c| c.name_any() == *wanted) {
        return Ok(class);
    }
    let exists = ask.classes.iter().any(|c| c.name_any() == *wanted);
    Err(if exists {
        Refusal::new(
            reason::CLASS_NOT_ALLOWED,
            format!("VFClass {wanted} is not for this cluster; {choice}"),
        )
    } else {
        Refusal::new(
            reason::CLASS_NOT_FOUND,
            format!("there is no VFClass {wanted}; {choice}"),
        )
    })
}

/// A changed spec under the class that was granted. The class's defaults of
/// today reach only the settings that a claim may choose anyway, because what
/// it chose before is not recorded.
fn regrant(ask: &Ask<'_>, granted: &Admitted, generation: i64) -> Result<Admitted, Refusal> {
    let Some(before) = &granted.network else {
        // What it asks for of storage does not change.
        no_network(ask, &granted.class_name)?;
        return Ok(Admitted {
            observed_generation: generation,
            ..granted.clone()
        });
    };
    let wish = ask.claim.spec.network.clone().unwrap_or_default();
    let class = ask
        .classes
        .iter()
        .find(|c| c.uid().as_deref() == Some(granted.class_uid.as_str()));
    let policy = Policy {
        class: &granted.class_name,
        allowed: class.map_or(&[], |c| &c.spec.allowed_overrides),
        current: class.map_or_else(
            || before.clone(),
            |c| defaults(&c.spec.network, ask.guest_uid),
        ),
        fallback: Some(before),
    };
    let network = policy.grant(&wish)?;
    let has_device = ask
        .claim
        .status
        .as_ref()
        .is_some_and(|s| s.device.is_some());
    if has_device && network.mac_address != before.mac_address {
        return Err(Refusal::new(
            reason::OVERRIDE_NOT_ALLOWED,
            format!(
                "the MAC address stays {} while the VF is in use, because guest drivers take \
                 another one only when they are loaded again; delete the claim and make another",
                before.mac_address
            ),
        ));
    }
    if has_device {
        settable(ask.pf, &network)?;
    }
    Ok(Admitted {
        observed_generation: generation,
        network: Some(network),
        ..granted.clone()
    })
}

/// Whether the driver of the PF can do it. An edit that it cannot do is refused here, so that
/// the claim keeps what works; a PF that does not say what it can is left to its agent.
fn settable(pf: Option<&PhysicalFunction>, network: &GrantedNetwork) -> Result<(), Refusal> {
    let Some(status) = pf.and_then(|pf| pf.status.as_ref()) else {
        return Ok(());
    };
    let driver = status.driver.as_deref().unwrap_or("none");
    match (&status.capabilities, wanted_config(network)) {
        (Some(can), Ok(want)) => supports(driver, can, &want).map_err(|cannot| {
            Refusal::new(
                reason::UNSUPPORTED_SETTING,
                format!(
                    "the VF in use cannot be changed so: {cannot}; ask for less, or delete the \
                     claim and make another from a class whose devices can"
                ),
            )
        }),
        _ => Ok(()),
    }
}

/// The settings of a claim that asks for none.
pub(super) fn defaults(class: &ClassNetwork, guest_uid: &str) -> GrantedNetwork {
    GrantedNetwork {
        mac_address: derived_mac(guest_uid),
        vlan: class.vlan.clone(),
        spoof_check: class.spoof_check.unwrap_or(true),
        trust: class.trust.unwrap_or(false),
        link_state: class.link_state.unwrap_or_default(),
        min_tx_rate_mbps: class.min_tx_rate_mbps,
        max_tx_rate_mbps: class.max_tx_rate_mbps,
    }
}

/// The MAC address of a claim that asks for none: locally administered,
/// unicast, and a function of the guest claim's UID, so that a host copy that
/// is made again has the same one.
#[must_use]
pub fn derived_mac(guest_uid: &str) -> String {
    let digest = Sha256::digest(guest_uid.as_bytes());
    let bytes: Vec<String> = digest
        .iter()
        .take(6)
        .enumerate()
        .map(|(i, b)| if i == 0 { (b & 0xfc) | 0x02 } else { *b })
        .map(|b| format!("{b:02x}"))
        .collect();
    bytes.join(":")
}

/// Which wishes are granted.
struct Policy<'a> {
    class: &'a str,
    allowed: &'a [NetworkField],
    /// What holds for settings that the claim leaves out and may choose.
    current: GrantedNetwork,
    /// An earlier grant: holds for settings that the claim may not choose.
    fallback: Option<&'a GrantedNetwork>,
}

impl Policy<'_> {
    fn grant(&self, wish: &NetworkRequest) -> Result<GrantedNetwork, Refusal> {
        use NetworkField::{
            LinkState, MacAddress, MaxTxRateMbps, MinTxRateMbps, SpoofCheck, Trust,
        };
        let mac = wish.mac_address.as_deref().map(normal_mac).transpose()?;
        let vlan = wish.vlan.clone().map(usable_vlan).transpose()?;
        let held = self.holding(NetworkField::Vlan).vlan.as_ref();
        let vlan = vlan.map(|wish| match held {
            // The same in other words is no other wish.
            Some(held) if is_same_tag(held, &wish) => Some(held.clone()),
            _ => Some(wish),
        });
        let granted = GrantedNetwork {
            mac_address: self.choose(MacAddress, "macAddress", mac, |n| n.mac_address.clone())?,
            vlan: self.choose(NetworkField::Vlan, "vlan", vlan, |n| n.vlan.clone())?,
            spoof_check: self.choose(SpoofCheck, "spoofCheck", wish.spoof_check, |n| {
                n.spoof_check
            })?,
            trust: self.choose(Trust, "trust", wish.trust, |n| n.trust)?,
            link_state: self.choose(LinkState, "linkState", wish.link_state, |n| n.link_state)?,
            min_tx_rate_mbps: self.choose(
                MinTxRateMbps,
                "minTxRateMbps",
                wish.min_tx_rate_mbps.map(Some),
                |n| n.min_tx_rate_mbps,
            )?,
            max_tx_rate_mbps: self.choose(
                MaxTxRateMbps,
                "maxTxRateMbps",
                wish.max_tx_rate_mbps.map(Some),
                |n| n.max_tx_rate_mbps,
            )?,
        };
        usable_rates(&granted)?;
        Ok(granted)
    }

    /// What holds for a setting that the claim leaves out.
    fn holding(&self, field: NetworkField) -> &GrantedNetwork {
        match self.fallback {
            Some(before) if !self.allowed.contains(&field) => before,
            _ => &self.current,
        }
    }

    /// Asking for what would hold anyway is no override.
    fn choose<T: PartialEq>(
        &self,
        field: NetworkField,
        name: &str,
        wish: Option<T>,
        of: impl Fn(&GrantedNetwork) -> T,
    ) -> Result<T, Refusal> {
        let allowed = self.allowed.contains(&field);
        let held = of(self.holding(field));
        match wish {
            None => Ok(held),
            Some(wish) if allowed || wish == held => Ok(wish),
            Some(_) => Err(Refusal::new(
                reason::OVERRIDE_NOT_ALLOWED,
                format!(
                    "VFClass {} does not let a claim choose network.{name}; leave it out, or ask \
                     the host's administrator for a class that does",
                    self.class
                ),
            )),
        }
    }
}

/// Lower case, colons; unicast and not zero. The schema says the same, but a
/// VF must not be given what an older schema let through.
fn normal_mac(text: &str) -> Result<String, Refusal> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            (part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
                .then(|| u8::from_str_radix(part, 16).ok())
                .flatten()
        })
        .collect();
    match bytes.as_deref() {
        Some(mac @ [first, _, _, _, _, _]) if first & 1 == 0 && mac.iter().any(|b| *b != 0) => {
            Ok(text.to_ascii_lowercase())
        }
        _ => Err(Refusal::new(
            reason::OVERRIDE_NOT_ALLOWED,
            format!(
                "network.macAddress {text} is not a unicast MAC address; write six pairs of hex \
                 digits whose first is even, such as 02:00:00:00:00:01"
            ),
        )),
    }
}

/// A tag that the kernel can put on and reports again: it shows identifier 0 as none, and the
/// claim would be compared with it for ever. The schema says the same, as for a MAC address.
fn usable_vlan(vlan: Vlan) -> Result<Vlan, Refusal> {
    if (1..=4094).contains(&vlan.id) && vlan.qos.is_none_or(|qos| qos <= 7) {
        return Ok(vlan);
    }
    Err(Refusal::new(
        reason::OVERRIDE_NOT_ALLOWED,
        format!(
            "network.vlan {} with qos {} is no VLAN; write an id of 1 to 4094 and a qos of 0 to 7",
            vlan.id,
            vlan.qos.unwrap_or(0)
        ),
    ))
}

/// A priority of 0 and the protocol 802.1Q may be written out or left out.
fn is_same_tag(one: &Vlan, other: &Vlan) -> bool {
    let meant = |vlan: &Vlan| {
        (
            vlan.id,
            vlan.qos.unwrap_or(0),
            vlan.protocol.unwrap_or_default(),
        )
    };
    meant(one) == meant(other)
}

/// One bound may be the claim's and the other the class's, which no schema sees together.
fn usable_rates(granted: &GrantedNetwork) -> Result<(), Refusal> {
    match (granted.min_tx_rate_mbps, granted.max_tx_rate_mbps) {
        (Some(min), Some(max)) if min > max => Err(Refusal::new(
            reason::OVERRIDE_NOT_ALLOWED,
            format!(
                "network.minTxRateMbps would be {min} and network.maxTxRateMbps {max}, with what \
                 the class gives where the claim says nothing; write a minimum that is not above \
                 the maximum"
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "admit_tests.rs"]
mod tests;

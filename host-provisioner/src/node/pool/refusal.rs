//! Why no VF was chosen, in words that a tenant understands, with what to do. Pure.

use common::api::reason;
use common::pci::PciAddress;

use crate::driver::Unsupported;
use crate::kernel::{MacAddr, Stuck};

use super::claim::Holder;
use super::view::GroupConflict;

/// So many PFs or claims are named in a message before it says "and more".
const MOST_NAMED: usize = 5;

/// Why one PF that the class selects cannot serve the claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    NotManaged,
    /// The words of [`crate::kernel::PfFacts::in_use_by_host`].
    InUseByHost(String),
    /// A write about it has not come back from the kernel.
    Stuck(Stuck),
    /// No backend for the kernel driver, or no driver.
    NoBackend(Option<String>),
    /// Its backend serves nobody with it as it is set up; why, and what to do.
    Unserviceable(&'static str),
    Unsupported(Unsupported),
    MacInUse {
        mac: MacAddr,
        by: MacUser,
    },
    /// What would be in the VF's IOMMU group.
    NotIsolated(GroupConflict),
    NoFreeVf {
        /// VFs that exist.
        existing: usize,
        /// Of them, those that no claim has and that are not ours to give.
        foreign: usize,
        /// Of them, those that `spec.withheld` keeps from everybody.
        withheld: usize,
        /// VFs that it could have.
        total: u16,
        holders: Vec<Holder>,
    },
    /// None of the namespaces that the claim may have is free.
    NoNamespace(NoNamespace),
    /// Its VFs do not exist yet and are promised to another VM.
    BeingMade,
    /// The number of its VFs is being changed.
    Resizing,
}

/// Why none of the namespaces that a claim may have can be had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NoNamespace {
    /// Those that other claims have.
    pub claimed: Vec<(u32, Holder)>,
    /// Those that no claim has and a controller has all the same.
    pub attached: Vec<u32>,
    /// Those that there are not.
    pub absent: Vec<u32>,
}

/// Who has a MAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MacUser {
    /// The PF itself.
    Host,
    Claim(Box<Holder>),
    /// A VF that no claim has.
    Foreign(u16),
}

/// No VF for this claim; every PF that the class selects with its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoChoice {
    /// Namespace of the claim: claims of others are not named to its tenant.
    pub namespace: String,
    /// PFs of the node that were looked at.
    pub seen: usize,
    /// By name of the `PhysicalFunction`.
    pub refusals: Vec<(String, Refusal)>,
}

impl Refusal {
    /// Condition reason.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NotManaged => reason::NOT_MANAGED,
            Self::InUseByHost(_) => reason::IN_USE_BY_HOST,
            Self::Stuck(_) => reason::BROKEN,
            Self::NoBackend(_) | Self::Unserviceable(_) => reason::UNSUPPORTED_DRIVER,
            Self::Unsupported(_) => reason::UNSUPPORTED_SETTING,
            Self::MacInUse { .. } => reason::MAC_IN_USE,
            Self::NotIsolated(_) => reason::NOT_ISOLATED,
            Self::NoFreeVf { .. } => reason::NO_FREE_VF,
            Self::NoNamespace(_) => reason::NO_FREE_NAMESPACE,
            Self::BeingMade | Self::Resizing => reason::PENDING,
        }
    }

    /// How near the PF came to serving the claim: the nearest gives the reason.
    const fn nearness(&self) -> u8 {
        match self {
            Self::NotManaged => 0,
            Self::NoBackend(_) | Self::Unserviceable(_) => 1,
            Self::InUseByHost(_) => 2,
            Self::Stuck(_) => 3,
            Self::Unsupported(_) => 4,
            Self::NotIsolated(_) => 5,
            Self::NoFreeVf { .. } | Self::NoNamespace(_) => 6,
            Self::MacInUse { .. } => 7,
            Self::BeingMade | Self::Resizing => 8,
        }
    }

    fn words(&self, pf: &str, names: &Names<'_>) -> String {
        match self {
            Self::NotManaged => format!(
                "{pf} is not managed; an administrator can give consent by setting spec.managed \
                 to true on that PhysicalFunction"
            ),
            Self::InUseByHost(words) => format!(
                "{pf} carries the host's own traffic ({words}) and is left alone, managed or not; \
                 an administrator can move that traffic elsewhere or take the device out of the class"
            ),
            Self::Stuck(stuck) => format!(
                "{pf} is broken: the kernel has not come back from a change of its VFs (process \
                 {} of the host waits for it); an administrator has to end what uses them, or \
                 restart the host",
                stuck.pid
            ),
            Self::NoBackend(None) => format!(
                "{pf} has no kernel driver; an administrator has to bind one that makes VFs"
            ),
            Self::NoBackend(Some(driver)) => {
                format!("{pf} has the kernel driver {driver}, which is not supported")
            }
            Self::Unserviceable(words) => format!("{pf} serves no claim: {words}"),
            Self::Unsupported(what) => format!(
                "{pf} cannot do what was asked: {what}; ask for less or choose another class"
            ),
            Self::MacInUse { mac, by } => format!(
                "MAC address {mac} is in use on {pf} by {}; ask for another, or leave it out to \
                 get one",
                names.mac_user(by)
            ),
            Self::NotIsolated(conflict) => format!("{pf}: {}", isolation(*conflict)),
            Self::NoFreeVf {
                existing,
                foreign,
                withheld,
                total,
                holders,
            } => {
                let counts = (*existing, *foreign, *withheld);
                no_free_vf(pf, counts, *total, &names.list(holders))
            }
            Self::NoNamespace(none) => no_namespace(pf, none, names),
            Self::BeingMade => format!(
                "the VFs of {pf} are being made for a claim of another VM; this claim goes on by \
                 itself when they exist"
            ),
            Self::Resizing => format!(
                "the number of VFs of {pf} is being changed; this claim goes on by itself when \
                 that is done"
            ),
        }
    }
}

fn no_namespace(pf: &str, none: &NoNamespace, names: &Names<'_>) -> String {
    let numbers = |nsids: &[u32]| {
        let all: Vec<String> = nsids.iter().take(MOST_NAMED).map(u32::to_string).collect();
        let more = if nsids.len() > MOST_NAMED {
            " and more"
        } else {
            ""
        };
        all.join(", ") + more
    };
    let mut why = Vec::new();
    if !none.claimed.is_empty() {
        let (nsids, holders): (Vec<u32>, Vec<Holder>) = none.claimed.iter().cloned().unzip();
        why.push(format!(
            "{} held by {}",
            numbers(&nsids),
            names.list(&holders)
        ));
    }
    if !none.attached.is_empty() {
        why.push(format!(
            "{} attached to a controller without a claim, so that its data may be somebody's (an \
             administrator has to see to that, erase it and detach it: nvme format, nvme detach-ns)",
            numbers(&none.attached)
        ));
    }
    if !none.absent.is_empty() {
        why.push(format!("{} not there", numbers(&none.absent)));
    }
    format!(
        "{pf} has no free namespace for the claim: {}; delete a claim that is not needed, wait, or \
         name another namespace of the class",
        why.join("; ")
    )
}

fn no_free_vf(
    pf: &str,
    (existing, foreign, withheld): (usize, usize, usize),
    total: u16,
    holders: &str,
) -> String {
    let mut words = format!("{pf} has no free VF: {existing} of at most {total} exist");
    if !holders.is_empty() {
        words += &format!(", held by {holders}");
    }
    if foreign > 0 {
        words += &format!(", {foreign} in use by something else on the host");
    }
    if withheld > 0 {
        words += &format!(", {withheld} withheld since their claims went");
    }
    if existing < usize::from(total) {
        words += ". More can be made only while none of them is in use";
    }
    words + "; delete a claim that is not needed, or wait"
}

fn isolation(conflict: GroupConflict) -> String {
    match conflict {
        GroupConflict::NoIommu => {
            "its VFs are in no IOMMU group, so they cannot be given to a VM; \
             an administrator has to turn on the IOMMU (firmware, and intel_iommu=on or \
             amd_iommu=on on the kernel command line)"
                .to_owned()
        }
        GroupConflict::Stranger(member) => format!(
            "its VFs share an IOMMU group with {member}, so a VM that had one could reach that \
             device; an administrator has to put the card below a port that isolates (ACS)"
        ),
        GroupConflict::OtherUser(member) => format!(
            "its free VFs share an IOMMU group with VF {member}, which somebody else has; an \
             administrator has to put the card below a port that isolates (ACS)"
        ),
    }
}

/// Claims by name, for an administrator, each with its VM's UID.
#[must_use]
pub fn claims_words(holders: &[Holder]) -> String {
    let one = |holder: &Holder| {
        let (namespace, name) = (&holder.claim.namespace, &holder.claim.name);
        format!("{namespace}/{name} (VM {})", holder.vm_uid)
    };
    let mut parts: Vec<String> = holders.iter().take(MOST_NAMED).map(one).collect();
    let more = holders.len().saturating_sub(MOST_NAMED);
    if more > 0 {
        parts.push(format!("{more} more"));
    }
    parts.join(", ")
}

/// Names claims to whom it may: all to an administrator, to a tenant its own.
struct Names<'a> {
    visible_namespace: Option<&'a str>,
}

impl Names<'_> {
    fn may_see(&self, holder: &Holder) -> bool {
        self.visible_namespace
            .is_none_or(|namespace| namespace == holder.claim.namespace)
    }

    fn list(&self, holders: &[Holder]) -> String {
        let seen: Vec<&Holder> = holders.iter().filter(|h| self.may_see(h)).collect();
        let mut parts: Vec<String> = seen
            .iter()
            .take(MOST_NAMED)
            .map(|holder| format!("{}/{}", holder.claim.namespace, holder.claim.name))
            .collect();
        let more = seen.len().saturating_sub(MOST_NAMED);
        if more > 0 {
            parts.push(format!("{more} more"));
        }
        match holders.len() - seen.len() {
            0 => {}
            1 => parts.push("1 claim of another cluster".to_owned()),
            others => parts.push(format!("{others} claims of other clusters")),
        }
        parts.join(", ")
    }

    fn mac_user(&self, user: &MacUser) -> String {
        match user {
            MacUser::Host => "the host itself".to_owned(),
            MacUser::Foreign(index) => format!("VF {index}, which is no claim's"),
            MacUser::Claim(holder) => self.list(std::slice::from_ref(holder)),
        }
    }
}

impl NoChoice {
    /// Condition reason: that of the PF that came nearest.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.refusals
            .iter()
            .max_by_key(|(_, refusal)| refusal.nearness())
            .map_or(reason::NO_MATCHING_PF, |(_, refusal)| refusal.reason())
    }

    /// For the claim's condition. It reaches the tenant, so it names no claim
    /// outside the claim's own namespace.
    #[must_use]
    pub fn message(&self) -> String {
        self.words(&Names {
            visible_namespace: Some(&self.namespace),
        })
    }

    /// For logs and events on the host: names every claim.
    #[must_use]
    pub fn message_for_administrator(&self) -> String {
        self.words(&Names {
            visible_namespace: None,
        })
    }

    fn words(&self, names: &Names<'_>) -> String {
        if self.refusals.is_empty() {
            return format!(
                "none of the {} SR-IOV devices of the VM's host node is one that the class \
                 selects; choose another class, or ask an administrator which classes this node \
                 serves",
                self.seen
            );
        }
        // The nearest first: that is the one to do something about.
        let mut sorted: Vec<&(String, Refusal)> = self.refusals.iter().collect();
        sorted.sort_by_key(|(pf, refusal)| (u8::MAX - refusal.nearness(), pf.clone()));
        let mut parts: Vec<String> = sorted
            .iter()
            .take(MOST_NAMED)
            .map(|(pf, refusal)| refusal.words(pf, names))
            .collect();
        let more = sorted.len().saturating_sub(MOST_NAMED);
        if more > 0 {
            parts.push(format!("{more} more devices refuse too"));
        }
        parts.join(". ")
    }
}

/// Where a PF's VFs would come to lie is known only once they exist, but when
/// the PF shares its own group with something on another bus, the port above
/// it does not isolate, and then its VFs join that group too
/// (drivers/iommu/iommu.c, `pci_device_group`).
#[must_use]
pub(super) fn foreseen(pf: PciAddress, members: &[PciAddress]) -> Option<GroupConflict> {
    members
        .iter()
        .find(|member| (member.domain(), member.bus()) != (pf.domain(), pf.bus()))
        .map(|member| GroupConflict::Stranger(*member))
}

//! From the modelled world to the values that the project's own ledger and planners take, and
//! back. Their answers are the model's decisions: nothing is decided here.

use std::collections::BTreeMap;

use common::api::{
    Admitted, AttachmentStatus, ClaimRef, DeviceStatus, GrantedNetwork, GuestRef, HOST_FINALIZER,
    Launcher, LinkState, PfSelector, Transport, VFClaim, VFClaimSpec, VFClaimStatus, VmRef,
    host_claim_name,
};
use common::pci::{PciAddress, PciId};
use host_provisioner::controller::admit::derived_mac;
use host_provisioner::kernel::{PfFacts, VFIO_PCI, VfFacts};
use host_provisioner::node::ledger::{Doubled, Entry, Ledger, VfKey};
use host_provisioner::node::pool::{
    Choice, GroupProbe, Holder, PfInput, PfView, Wish, choose, groups_to_probe,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::world::{HELD, Held, HostCopy, Setting, Slot, World};

pub const NODE: &str = "host1";
pub const PF: &str = "pf";
pub const NAMESPACE: &str = "claims";
/// The resourceVersion of a copy as it is now, and of any earlier state of it.
const NOW: &str = "now";
const BEFORE: &str = "before";

pub fn pod_uid(vm: usize, pod: u8) -> String {
    format!("pod-{vm}-{pod}")
}

pub fn guest_uid(slot: Slot, uid: u8) -> String {
    format!("guest-{slot}-{uid}")
}

fn copy_uid(slot: Slot, uid: u8) -> String {
    format!("copy-{slot}-{uid}")
}

pub fn system_uuid(vm: usize) -> String {
    format!("6d1a3a5e-4e5f-4b7a-9a43-0a7c1f2e3d4{vm}")
}

pub fn guest_name(slot: Slot) -> String {
    format!("claim-{slot}")
}

pub fn long_ago() -> Time {
    Time(Timestamp::UNIX_EPOCH)
}

/// A copy by its UID.
pub fn reference(slot: Slot, uid: u8) -> ClaimRef {
    ClaimRef {
        namespace: NAMESPACE.into(),
        name: String::new(),
        uid: copy_uid(slot, uid),
    }
}

/// The copy as the API server would show it.
pub fn host_claim(setting: &Setting, slot: Slot, copy: &HostCopy, newest: bool) -> VFClaim {
    let vm = setting.vm_of[slot];
    let uid = guest_uid(slot, copy.guest);
    let mut claim = VFClaim::new(
        &host_claim_name(&uid),
        VFClaimSpec {
            class_name: Some("gold".into()),
            guest: Some(GuestRef {
                cluster: "blue".into(),
                cluster_uid: "kube-system".into(),
                namespace: "default".into(),
                name: guest_name(slot),
                uid: uid.clone(),
                node_name: format!("worker-{vm}"),
                system_uuid: system_uuid(vm),
                provider_id: None,
            }),
            ..VFClaimSpec::default()
        },
    );
    let meta = &mut claim.metadata;
    meta.namespace = Some(NAMESPACE.into());
    meta.uid = Some(copy_uid(slot, copy.uid));
    meta.resource_version = Some(if newest { NOW } else { BEFORE }.into());
    meta.generation = Some(1);
    meta.deletion_timestamp = copy.deleting.then(long_ago);
    meta.finalizers = copy.finalizer.then(|| vec![HOST_FINALIZER.into()]);
    let mut annotations = BTreeMap::new();
    annotations.insert(common::api::GUEST_GENERATION_ANNOTATION.into(), "1".into());
    meta.annotations = Some(annotations);
    claim.status = Some(status(setting, slot, copy, &uid));
    claim
}

fn status(setting: &Setting, slot: Slot, copy: &HostCopy, guest_uid: &str) -> VFClaimStatus {
    let vm = setting.vm_of[slot];
    let vmi_uid = format!("vmi-{vm}");
    VFClaimStatus {
        admitted: copy.granted.then(|| Admitted {
            observed_generation: 1,
            class_name: "gold".into(),
            class_uid: "class".into(),
            pf_selector: PfSelector::default(),
            num_vfs: None,
            reclaim_policy: setting.reclaim,
            placement: Default::default(),
            network: Some(GrantedNetwork {
                mac_address: derived_mac(guest_uid),
                vlan: None,
                spoof_check: true,
                trust: false,
                link_state: LinkState::Auto,
                min_tx_rate_mbps: None,
                max_tx_rate_mbps: None,
            }),
            storage: None,
        }),
        vm: copy.granted.then(|| VmRef {
            namespace: "vms".into(),
            name: format!("vm-{vm}"),
            uid: vmi_uid.clone(),
            ip: None,
        }),
        host_node: copy.pod.map(|_| NODE.into()),
        launcher: copy.pod.map(|pod| Launcher {
            vmi_uid: vmi_uid.clone(),
            pod_uid: pod_uid(vm, pod),
        }),
        device: copy.device.map(|vf| DeviceStatus {
            node_name: NODE.into(),
            physical_function: PF.into(),
            vf_index: vf.into(),
            namespace_id: None,
            pci_address: None,
            vendor_id: None,
            device_id: None,
            iommu_group: None,
        }),
        attachment: copy.attachment.map(|pod| AttachmentStatus {
            vmi_uid,
            pod_uid: pod_uid(vm, pod),
            qemu_device_id: format!("vfc-{guest_uid}"),
            port: format!("port-{slot}"),
            transport: Transport::QmpSocket,
            boot_id: "boot".into(),
            qemu_start_time: 1,
        }),
        ..VFClaimStatus::default()
    }
}

/// The project's ledger with what the modelled agent remembers.
pub fn ledger(setting: &Setting, held: &[Option<Held>; HELD]) -> Ledger {
    let mut ledger = Ledger::default();
    for held in held.iter().flatten() {
        let slot = usize::from(held.slot);
        let vm = setting.vm_of[slot];
        let entry = Entry {
            vf: VfKey {
                physical_function: PF.into(),
                index: held.vf.into(),
            },
            claim: ClaimRef {
                name: host_claim_name(&guest_uid(slot, held.guest)),
                ..reference(slot, held.uid)
            },
            mac_address: derived_mac(&guest_uid(slot, held.guest)),
            namespace: None,
            wanted: None,
            going: false,
            vm_uid: format!("vmi-{vm}"),
            pod_uid: held.pod.map(|pod| pod_uid(vm, pod)).unwrap_or_default(),
            port: held.port.then(|| format!("port-{slot}")),
            unanswered: held.may_land.then(|| NOW.into()),
        };
        ledger.enter(entry).unwrap();
    }
    ledger
}

/// What the ledger remembers, of the claims that it can know.
pub fn remembered(
    setting: &Setting,
    ledger: &Ledger,
    known: impl Iterator<Item = (Slot, HostCopy)>,
) -> [Option<Held>; HELD] {
    let mut found: Vec<Held> = known
        .filter_map(|(slot, copy)| {
            let entry = ledger.of(&copy_uid(slot, copy.uid))?;
            let vm = setting.vm_of[slot];
            Some(Held {
                slot: u8::try_from(slot).unwrap(),
                uid: copy.uid,
                guest: copy.guest,
                vf: u8::try_from(entry.vf.index).unwrap(),
                pod: (0..u8::MAX)
                    .take(16)
                    .find(|pod| pod_uid(vm, *pod) == entry.pod_uid),
                port: entry.port.is_some(),
                may_land: entry.unanswered.as_deref() == Some(NOW),
            })
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    let mut held = [None; HELD];
    assert!(
        found.len() <= HELD,
        "the ledger has more claims than the model can say"
    );
    for (place, entry) in held.iter_mut().zip(found) {
        *place = Some(entry);
    }
    held
}

/// Changes the agent's ledger by the project's own one; `copy` is the claim that it is about.
pub fn with_ledger<T>(
    setting: &Setting,
    world: &mut World,
    about: (Slot, HostCopy),
    change: impl FnOnce(&mut Ledger) -> T,
) -> T {
    let mut ledger = ledger(setting, &world.agent.ledger);
    let done = change(&mut ledger);
    let before = world.agent.ledger.into_iter().flatten().map(|held| {
        let copy = HostCopy {
            guest: held.guest,
            uid: held.uid,
            ..about.1
        };
        (usize::from(held.slot), copy)
    });
    world.agent.ledger = remembered(setting, &ledger, before.chain([about]));
    done
}

/// The claim's own answer to the ledger, as a reconcile begins or a write was answered.
pub fn observe(
    setting: &Setting,
    world: &mut World,
    slot: Slot,
    copy: &HostCopy,
    newest: bool,
) -> Result<(), Doubled> {
    let claim = host_claim(setting, slot, copy, newest);
    with_ledger(setting, world, (slot, *copy), |ledger| {
        ledger.observe(&claim)
    })
}

/// The ledger of an agent that starts: every claim of this node, from a consistent LIST.
pub fn fill(setting: &Setting, world: &mut World) {
    let bound = |slot: &Slot| world.copies[*slot].filter(|copy| copy.pod.is_some());
    let listed: Vec<(Slot, HostCopy)> = setting
        .slots()
        .filter_map(|slot| Some((slot, bound(&slot)?)))
        .collect();
    let claims: Vec<VFClaim> = listed
        .iter()
        .map(|(slot, copy)| host_claim(setting, *slot, copy, true))
        .collect();
    let mut ledger = Ledger::default();
    ledger.fill(&claims);
    world.agent.ledger = remembered(setting, &ledger, listed.into_iter());
}

fn address(function: u8) -> PciAddress {
    format!("0000:01:10.{function}").parse().unwrap()
}

fn id(text: &str) -> PciId {
    text.parse().unwrap()
}

/// The PF as the agent's snapshot of the kernel and its ledger show it.
pub fn view(setting: &Setting, world: &World, ledger: &Ledger) -> PfView {
    let indexes = 0..if world.vfs_made { setting.total_vfs } else { 0 };
    let vfs: Vec<VfFacts> = indexes
        .map(|vf| VfFacts {
            index: vf.into(),
            address: address(vf),
            vendor: id("8086"),
            device: id("10ca"),
            driver: world.vf(vf).vfio.then(|| VFIO_PCI.into()),
            iommu_group: Some(setting.group(vf).into()),
            group_members: (0..setting.total_vfs)
                .filter(|other| setting.group(*other) == setting.group(vf))
                .map(address)
                .collect(),
        })
        .collect();
    let holders = Holder::all(ledger, PF);
    let probes = groups_to_probe(&vfs, &holders)
        .into_iter()
        .map(|group| {
            let held = world.held(setting, u8::try_from(group).unwrap());
            let probe = if held {
                GroupProbe::Busy
            } else {
                GroupProbe::Free
            };
            (group, probe)
        })
        .collect();
    let pf = PciAddress::to_string(&"0000:01:00.0".parse().unwrap());
    PfView::new(PfInput {
        name: PF.into(),
        facts: PfFacts {
            up: true,
            eswitch: None,
            address: pf.parse().unwrap(),
            vendor: id("8086"),
            device: id("10c9"),
            driver: Some("igb".into()),
            interface: Some("eth0".into()),
            mac: None,
            permanent_mac: None,
            serial: None,
            slot: None,
            total_vfs: setting.total_vfs.into(),
            num_vfs: u16::try_from(vfs.len()).unwrap(),
            numa_node: None,
            iommu_group: Some(99),
            group_members: vec![pf.parse().unwrap()],
            in_use_by_host: None,
            identity: "pf".into(),
        },
        vfs,
        managed: true,
        desired: None,
        withheld: crate::reclaim::entries(setting, world),
        resize: None,
        resizing: false,
        holders,
        probes,
        macs: BTreeMap::new(),
        namespaces: BTreeMap::new(),
        // Nobody but QEMU opens a device here.
        stuck: BTreeMap::new(),
    })
}

/// The pool's choice for a claim, entered into the ledger; `None`: there is none now.
pub fn allocate(
    setting: &Setting,
    world: &mut World,
    slot: Slot,
    copy: &HostCopy,
    newest: bool,
) -> Option<Choice> {
    let claim = host_claim(setting, slot, copy, newest);
    let wish = Wish::of(&claim, &BTreeMap::new()).unwrap();
    let seen = *world;
    with_ledger(setting, world, (slot, *copy), |ledger| {
        let choice = choose(&[view(setting, &seen, ledger)], &wish).ok()?;
        ledger.enter(wish.entry(&claim, &choice)).ok()?;
        Some(choice)
    })
}

/// What `left::take_over` enters into the ledger before it writes.
pub fn enter(
    setting: &Setting,
    world: &mut World,
    slot: Slot,
    copy: &HostCopy,
    (vf, pod): (u8, u8),
) -> Result<(), Doubled> {
    let taken = HostCopy {
        device: Some(vf),
        attachment: Some(pod),
        ..*copy
    };
    let claim = host_claim(setting, slot, &taken, true);
    let mut entry = Ledger::entry_of(&claim).unwrap();
    entry
        .unanswered
        .clone_from(&claim.metadata.resource_version);
    with_ledger(setting, world, (slot, *copy), |ledger| ledger.enter(entry))
}

/// How many VFs are to be made for the claim's VF to exist.
pub fn creation(setting: &Setting, world: &World, slot: Slot, copy: &HostCopy) -> Option<u16> {
    let claim = host_claim(setting, slot, copy, true);
    let wish = Wish::of(&claim, &BTreeMap::new()).unwrap();
    let ledger = ledger(setting, &world.agent.ledger);
    choose(&[view(setting, world, &ledger)], &wish).ok()?.create
}

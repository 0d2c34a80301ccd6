//! The project's own plans of controller and guest-syncer, asked about modelled claims.

use std::cell::RefCell;
use std::collections::HashMap;

use common::api::{
    GUEST_FINALIZER, GuestCluster, GuestClusterSpec, GuestClusterStatus, ReclaimPolicy, VFClaim,
    VFClaimSpec, VFClaimStatus, VFClass, VFClassSpec,
};
use guest_syncer::mirror::up::{self, GuestId, Release, Up};
use guest_syncer::node_identity::NodeIdentity;
use host_provisioner::controller::plan::{Known, plan};
use host_provisioner::controller::vmi::Vmi;
use serde_json::Value;

use crate::facts::{
    NAMESPACE, NODE, guest_name, guest_uid, host_claim, long_ago, pod_uid, system_uuid,
};
use crate::world::{Guest, HostCopy, Setting, Slot};

/// What the controller's plan comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    Nothing,
    /// Take the finalizer off.
    Release,
    /// Enter the copy's VF into what the PhysicalFunction withholds.
    Withhold,
    Write {
        finalizer: bool,
        /// The copy with the decision in it, when there is one.
        decision: Option<HostCopy>,
    },
}

type DueKey = (Slot, usize, ReclaimPolicy, HostCopy, Option<u8>);

thread_local! {
    // Plans are asked for again and again over the same few claims.
    static DUE: RefCell<HashMap<DueKey, Due>> = RefCell::default();
}

/// The controller's plan for a copy whose VM runs in `pod`.
pub fn controller_due(setting: &Setting, slot: Slot, copy: &HostCopy, pod: Option<u8>) -> Due {
    let key = (slot, setting.vm_of[slot], setting.reclaim, *copy, pod);
    if let Some(known) = DUE.with_borrow(|due| due.get(&key).copied()) {
        return known;
    }
    let due = controller_plan(setting, slot, copy, pod);
    DUE.with_borrow_mut(|memory| memory.insert(key, due));
    due
}

fn controller_plan(setting: &Setting, slot: Slot, copy: &HostCopy, pod: Option<u8>) -> Due {
    let vm = setting.vm_of[slot];
    let mut cluster = GuestCluster::new(
        "blue",
        GuestClusterSpec {
            claim_namespace: NAMESPACE.into(),
            vm_namespace: "vms".into(),
            classes: vec!["gold".into()],
            ..GuestClusterSpec::default()
        },
    );
    cluster.status = Some(GuestClusterStatus {
        cluster_uid: Some("kube-system".into()),
        ..GuestClusterStatus::default()
    });
    let spec = VFClassSpec {
        reclaim_policy: setting.reclaim,
        ..VFClassSpec::default()
    };
    let mut class = VFClass::new("gold", spec);
    class.metadata.uid = Some("class".into());
    let vmi = Vmi {
        namespace: "vms".into(),
        name: format!("vm-{vm}"),
        uid: format!("vmi-{vm}"),
        firmware_uuid: Some(system_uuid(vm)),
        phase: if pod.is_some() { "Running" } else { "Failed" }.into(),
        node: Some(NODE.into()),
        active_pods: pod
            .map(|pod| (pod_uid(vm, pod), NODE.into()))
            .into_iter()
            .collect(),
        ..Vmi::default()
    };
    let claim = host_claim(setting, slot, copy, true);
    let plan = plan(
        &claim,
        &Known {
            clusters: &[&cluster],
            classes: &[&class],
            vmis: &[vmi],
            admitted_others: 0,
            pf: None,
        },
    );
    assert_eq!(plan.pin, None, "the cluster's UID is pinned from the start");
    if plan.release {
        return Due::Release;
    }
    if plan.withhold.is_some() {
        return Due::Withhold;
    }
    let decision = plan.decision.map(|patch| {
        let mut status = serde_json::to_value(claim.status).unwrap();
        merge(&mut status, &patch);
        let status: VFClaimStatus = serde_json::from_value(status).unwrap();
        let launcher = status.launcher.map(|launcher| launcher.pod_uid);
        HostCopy {
            granted: status.admitted.is_some(),
            pod: launcher.map(|uid| (0..16).find(|pod| pod_uid(vm, *pod) == uid).unwrap()),
            ..*copy
        }
    });
    if !plan.finalizer && decision.is_none() {
        return Due::Nothing;
    }
    Due::Write {
        finalizer: plan.finalizer,
        decision,
    }
}

/// A JSON merge patch (RFC 7396).
fn merge(into: &mut Value, patch: &Value) {
    let (Value::Object(map), Value::Object(changes)) = (&mut *into, patch) else {
        *into = patch.clone();
        return;
    };
    for (key, change) in changes {
        if change.is_null() {
            map.remove(key);
        } else {
            merge(map.entry(key.clone()).or_insert(Value::Null), change);
        }
    }
}

fn guest_claim(slot: Slot, guest: &Guest) -> VFClaim {
    let mut claim = VFClaim::new(
        &guest_name(slot),
        VFClaimSpec {
            class_name: Some("gold".into()),
            node_name: Some("worker".into()),
            ..VFClaimSpec::default()
        },
    );
    claim.metadata.namespace = Some("default".into());
    claim.metadata.uid = Some(guest_uid(slot, guest.uid));
    claim.metadata.generation = Some(1);
    claim.metadata.deletion_timestamp = guest.deleting.then(long_ago);
    claim.metadata.finalizers = guest.finalizer.then(|| vec![GUEST_FINALIZER.into()]);
    claim
}

fn guest_id() -> GuestId {
    GuestId {
        cluster: "blue".into(),
        cluster_uid: "kube-system".into(),
        claim_namespace: NAMESPACE.into(),
    }
}

/// Whether the guest-syncer makes a copy of this living claim, of which it knows `copy`.
pub fn syncer_creates(
    setting: &Setting,
    slot: Slot,
    guest: &Guest,
    copy: Option<&HostCopy>,
) -> bool {
    let vm = setting.vm_of[slot];
    let node = Ok(NodeIdentity {
        name: format!("worker-{vm}"),
        system_uuid: system_uuid(vm),
        provider_id: None,
        internal_ip: None,
    });
    let copy = copy.map(|copy| host_claim(setting, slot, copy, true));
    let claim = guest_claim(slot, guest);
    matches!(
        up::plan(&claim, &node, &guest_id(), copy.as_ref()),
        Up::Create(_)
    )
}

/// What the guest-syncer does about the copy of a claim that is being deleted.
pub fn syncer_release(
    setting: &Setting,
    slot: Slot,
    guest: &Guest,
    found: Option<&HostCopy>,
) -> Release {
    let found = found.map(|copy| host_claim(setting, slot, copy, true));
    up::release(&guest_claim(slot, guest), &guest_id(), found.as_ref())
}

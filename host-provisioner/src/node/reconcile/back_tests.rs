//! What becomes of a VF when its claim goes, by the policy that was granted.

use std::sync::Arc;

use common::api::{ReclaimPolicy, WithheldReason, WithheldVf, condition, reason, type_};

use super::super::reconcile;
use crate::kernel::fake::Write;
use crate::kernel::{Kernel as _, VFIO_PCI};
use crate::node::ledger::claim_ref;
use crate::node::test_stage::Stage;

const MAC: &str = "02:00:00:00:00:01";

/// Brings a claim of this policy up and deletes it; the VF's index, and the claim as it was.
async fn going(stage: &Stage, policy: ReclaimPolicy) -> (u16, common::api::VFClaim) {
    let claim = stage.claim_of(MAC, policy).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let device = stage.now(&claim).await.status.unwrap().device.unwrap();
    stage.delete(&claim).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    (device.vf_index, claim)
}

/// As the controller does it.
async fn withhold(
    stage: &mut Stage,
    index: u16,
    claim: &common::api::VFClaim,
    reason: WithheldReason,
) {
    stage
        .respec(|spec| {
            spec.withheld.push(WithheldVf {
                vf_index: index,
                reason,
                claim: claim_ref(claim),
            });
        })
        .await;
}

async fn next(stage: &Stage, last: u8) -> u16 {
    let other = stage.claim(&format!("02:00:00:00:00:{last:02}")).await;
    reconcile(Arc::new(other.clone()), Arc::clone(&stage.agent)).await;
    stage
        .now(&other)
        .await
        .status
        .unwrap()
        .device
        .unwrap()
        .vf_index
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroyed_vf_is_cleaned_and_is_let_go_of_when_nobody_gets_it() {
    let mut stage = Stage::new().await;
    let (index, claim) = going(&stage, ReclaimPolicy::Destroy).await;
    let waits = stage.now(&claim).await;
    let status = waits.status.unwrap();
    assert!(
        status.device.is_some(),
        "free, and nothing says that it is not"
    );
    let ready = condition(&status.conditions, type_::READY).unwrap();
    assert_eq!(ready.reason, reason::RELEASING);
    let vfs = stage.kernel.virtual_functions(stage.pf.address).unwrap();
    assert_eq!(vfs[usize::from(index)].driver, None);
    assert_ne!(next(&stage, 2).await, index, "its claim has it still");

    // A successor of the agent knows no less.
    let uid = waits.metadata.uid.unwrap();
    stage.agent.ledger.lock().forget(&uid);
    withhold(&mut stage, index, &claim, WithheldReason::Destroyed).await;
    let written = stage.kernel.writes();
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    assert!(stage.now(&claim).await.status.unwrap().device.is_none());
    assert_eq!(stage.kernel.writes(), written, "it was clean already");
    assert_ne!(next(&stage, 3).await, index);
    assert_eq!(stage.kernel.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retained_vf_is_as_it_was_until_it_is_given_back_and_is_reset_then() {
    let mut stage = Stage::new().await;
    let claim = stage.claim_of(MAC, ReclaimPolicy::Retain).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let device = stage.now(&claim).await.status.unwrap().device.unwrap();
    let index = device.vf_index;
    let written = stage.kernel.writes();
    stage.delete(&claim).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    assert!(stage.now(&claim).await.status.unwrap().device.is_some());
    withhold(&mut stage, index, &claim, WithheldReason::Retained).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    assert!(stage.now(&claim).await.status.unwrap().device.is_none());
    assert_eq!(stage.kernel.writes(), written, "it was written to");
    let vfs = stage.kernel.virtual_functions(stage.pf.address).unwrap();
    let vf = &vfs[usize::from(index)];
    assert_eq!(vf.driver.as_deref(), Some(VFIO_PCI));
    assert_ne!(next(&stage, 2).await, index);

    stage.respec(|spec| spec.withheld.clear()).await;
    let written = stage.kernel.writes().len();
    // It is on vfio-pci already, so it goes first.
    assert_eq!(next(&stage, 3).await, index);
    let since = stage.kernel.writes().split_off(written);
    assert_eq!(since.first(), Some(&Write::Reset(vf.address)));
    let config = stage.kernel.vf_config(&stage.pf, index).unwrap();
    assert_eq!(config.mac.to_string(), "02:00:00:00:00:03");
    assert_eq!(stage.kernel.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_choice_of_a_withheld_vf_is_given_up_and_the_vf_left_as_it_is() {
    let mut stage = Stage::new().await;
    let (index, claim) = going(&stage, ReclaimPolicy::Retain).await;
    withhold(&mut stage, index, &claim, WithheldReason::Retained).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    // A dead agent's choice, carried out now.
    let late = stage.claim("02:00:00:00:00:02").await;
    let choice = serde_json::json!({"device": {
        "nodeName": stage.agent.node_name, "physicalFunction": stage.function, "vfIndex": index,
    }});
    let manager = crate::node::agent::MANAGER;
    let late = common::kube::status::decide(&stage.claims(), &late, manager, &choice)
        .await
        .unwrap();
    let before = stage.kernel.vf_config(&stage.pf, index).unwrap();
    reconcile(Arc::new(late.clone()), Arc::clone(&stage.agent)).await;
    let device = stage.now(&late).await.status.unwrap().device.unwrap();
    assert_ne!(device.vf_index, index);
    assert_eq!(stage.kernel.vf_config(&stage.pf, index).unwrap(), before);
}

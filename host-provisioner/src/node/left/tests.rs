use std::sync::Arc;

use common::api::{condition, type_};

use super::*;
use crate::kernel::{GroupHold, Kernel as _};
use crate::node::allocate::snapshot;
use crate::node::reconcile::reconcile;
use crate::node::test_stage::Stage;

const MAC: &str = "02:00:00:00:00:01";

/// A stage with a claim that has its VF, whose group somebody has open, as a QEMU would.
async fn attached() -> (Stage, VFClaim, PciAddress, GroupHold) {
    let stage = Stage::new().await;
    let claim = stage.claim(MAC).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let claim = stage.now(&claim).await;
    let index = claim
        .status
        .as_ref()
        .unwrap()
        .device
        .as_ref()
        .unwrap()
        .vf_index;
    let vfs = stage.kernel.virtual_functions(stage.pf.address).unwrap();
    let vf = vfs.iter().find(|vf| vf.index == index).unwrap();
    let held = stage.kernel.hold_group(vf.iommu_group.unwrap()).unwrap();
    (stage, claim, vf.address, held)
}

#[tokio::test(flavor = "multi_thread")]
async fn suspicious_is_a_group_in_use_that_no_other_claim_names() {
    let (stage, claim, address, held) = attached().await;
    let another = stage.claim("02:00:00:00:00:02").await;
    let groups = async |claim: &VFClaim| {
        let (snapshots, _) = snapshot(&stage.agent).await.unwrap();
        suspicious(&stage.agent.ledger.lock(), claim, &snapshots).len()
    };
    assert_eq!(groups(&another).await, 0, "a claim names it");
    assert_eq!(groups(&claim).await, 1, "none but this one names it");
    stage.tear_off(&claim).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    assert_eq!(stage.taken(), 0);
    assert_eq!(groups(&another).await, 1);
    drop(held);
    assert_eq!(groups(&another).await, 0, "nobody has it");
    stage.kernel.give_driver(address, Some("igbvf"));
    assert_eq!(groups(&another).await, 0, "the host uses it itself");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_qemu_that_has_such_a_group_open_is_asked() {
    for has_it in [false, true] {
        let (stage, claim, address, _held) = attached().await;
        let vfs = stage.kernel.virtual_functions(stage.pf.address).unwrap();
        let vf = vfs.iter().find(|vf| vf.address == address).unwrap();
        let group = vf.iommu_group.unwrap();
        stage.tear_off(&claim).await;
        let anew = stage.claim(MAC).await;
        stage.agent.ledger.lock().observe(&anew).unwrap();
        stage.run_vm(&[if has_it { group } else { group + 1 }]);
        let (snapshots, _) = snapshot(&stage.agent).await.unwrap();
        match look(&stage.agent, &anew, &snapshots).await {
            Ok((left, _)) => assert!(!has_it && left == Left::Nothing, "{left:?}"),
            Err(error) => assert!(has_it && error.to_string().contains("QEMU"), "{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_vf_of_ours_that_no_claim_names_is_taken_over() {
    let (stage, claim, address, _held) = attached().await;
    let another = stage.claim("02:00:00:00:00:02").await;
    let named = async |host| {
        let (snapshots, _) = snapshot(&stage.agent).await.unwrap();
        of_no_other(
            &stage.agent.ledger.lock(),
            &another,
            "here",
            &snapshots,
            host,
        )
    };
    assert_eq!(named(Some(address)).await, None, "a claim names it");
    stage.tear_off(&claim).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let found = named(Some(address)).await.unwrap();
    let before = claim.status.unwrap().device.unwrap();
    assert_eq!(found.node_name, "here");
    assert_eq!(found.vf_index, before.vf_index);
    assert_eq!(found.physical_function, before.physical_function);
    assert_eq!(
        found.pci_address.as_deref(),
        Some(address.to_string().as_str())
    );
    assert!(found.iommu_group.is_some());
    assert_eq!(named(None).await, None);
    assert_eq!(named("0000:77:00.0".parse().ok()).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_made_anew_waits_while_somebody_else_has_its_address_and_his_vf_is_not_touched() {
    let (stage, claim, address, held) = attached().await;
    stage.tear_off(&claim).await;
    let written = stage.kernel.writes().len();
    let anew = stage.claim(MAC).await;
    // Nobody has told that the earlier one is gone: that its name is another's says so. Its VM
    // does not run, so whoever has its VF is a stranger.
    reconcile(Arc::new(anew.clone()), Arc::clone(&stage.agent)).await;
    let status = stage.now(&anew).await.status.unwrap();
    let allocated = condition(&status.conditions, type_::ALLOCATED).unwrap();
    assert_eq!(allocated.reason, reason::MAC_IN_USE);
    assert_eq!(stage.taken(), 0);
    let since = stage.kernel.writes().split_off(written);
    assert!(since.is_empty(), "{address}: {since:?}");

    drop(held);
    reconcile(Arc::new(anew.clone()), Arc::clone(&stage.agent)).await;
    assert!(stage.now(&anew).await.status.unwrap().device.is_some());
    assert_eq!(stage.taken(), 1);
    assert_eq!(stage.kernel.violations(), Vec::<String>::new());
}

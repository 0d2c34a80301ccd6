//! The number of VFs over the kernel that remembers, reported to a real API server.

use std::sync::Arc;

use common::api::{
    PhysicalFunctionStatus, ReclaimPolicy, VFClaim, VfState, WithheldReason, WithheldVf, condition,
    reason, type_,
};
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::kernel::Kernel as _;
use crate::kernel::fake::Write;
use crate::node::ledger::claim_ref;
use crate::node::publish::publish;
use crate::node::reconcile::reconcile;
use crate::node::test_stage::Stage;

const MAC: &str = "02:00:00:00:00:01";

async fn up(stage: &Stage, claim: &VFClaim) {
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
}

async fn report(stage: &Stage) -> PhysicalFunctionStatus {
    let object = stage.functions().get(&stage.function).await.unwrap();
    object.status.unwrap()
}

/// What the count was written to, in order.
fn counts(stage: &Stage) -> Vec<u16> {
    let writes = stage.kernel.writes().into_iter();
    let count = |w| match w {
        Write::NumVfs { count, .. } => Some(count),
        _ => None,
    };
    writes.filter_map(count).collect()
}

fn resized(status: &PhysicalFunctionStatus) -> (&str, &str, &str) {
    let c = condition(&status.conditions, type_::RESIZED).unwrap();
    (&c.status, &c.reason, &c.message)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_waits_for_the_claim_that_holds_a_vf_and_is_applied_then() {
    let mut stage = Stage::new().await;
    let claim = stage.claim(MAC).await;
    up(&stage, &claim).await;
    publish(&stage.agent).await.unwrap();
    assert_eq!(resized(&report(&stage).await).0, "True");
    stage.respec(|spec| spec.num_vfs = Some(3)).await;
    publish(&stage.agent).await.unwrap();
    let waits = report(&stage).await;
    let (status, why, words) = resized(&waits);
    assert_eq!((status, why), ("False", reason::IN_USE));
    let name = claim.metadata.name.clone().unwrap();
    for part in ["3 VFs are wanted and there are 7", &name, "VM vm"] {
        assert!(words.contains(part), "{words}");
    }
    assert_eq!(counts(&stage), [7]);

    stage.delete(&claim).await;
    up(&stage, &claim).await;
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [7, 0, 3]);
    let done = report(&stage).await;
    assert_eq!(resized(&done).0, "True");
    assert_eq!((done.num_vfs, done.vfs.len(), done.counts.free), (3, 3, 3));
    let last = done.resize.unwrap();
    assert!(last.complete && last.desired_vfs == Some(3), "{last:?}");

    // Once; and a successor goes by what is recorded.
    stage.respec(|_| {}).await;
    stage.agent.resizes.lock().clear();
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [7, 0, 3]);
    // More, while none is in use: at once.
    stage.respec(|spec| spec.num_vfs = Some(5)).await;
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [7, 0, 3, 0, 5]);
    assert_eq!(stage.kernel.violations(), Vec::<String>::new());
}

/// Has a claim's VF destroyed, as the controller helps to.
async fn destroy(stage: &mut Stage, mac: &str) -> String {
    let claim = stage.claim_of(mac, ReclaimPolicy::Destroy).await;
    up(stage, &claim).await;
    let device = stage.now(&claim).await.status.unwrap().device.unwrap();
    stage.delete(&claim).await;
    let entry = WithheldVf {
        vf_index: device.vf_index,
        reason: WithheldReason::Destroyed,
        claim: claim_ref(&claim),
    };
    stage.respec(|spec| spec.withheld = vec![entry]).await;
    up(stage, &claim).await;
    assert!(stage.now(&claim).await.status.unwrap().device.is_none());
    claim.metadata.uid.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroyed_vf_goes_when_the_last_claim_has() {
    let mut stage = Stage::new().await;
    let other = stage.claim("02:00:00:00:00:02").await;
    up(&stage, &other).await;
    let uid = destroy(&mut stage, MAC).await;
    publish(&stage.agent).await.unwrap();
    let waits = report(&stage).await;
    assert_eq!(resized(&waits).1, reason::IN_USE);
    assert_eq!((waits.counts.retired, waits.num_vfs), (1, 7));
    assert_eq!(counts(&stage), [7]);

    stage.delete(&other).await;
    up(&stage, &other).await;
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [7, 0, 6]);
    let done = report(&stage).await;
    let last = done.resize.clone().unwrap();
    assert_eq!((last.num_vfs, last.complete), (6, true));
    assert_eq!(last.destroyed, [uid], "the controller goes by it");
    assert!(
        done.vfs.iter().all(|vf| vf.state == VfState::Free),
        "{done:?}"
    );
    // Until the controller has taken the entry out nothing more happens, and after it neither.
    publish(&stage.agent).await.unwrap();
    stage.respec(|spec| spec.withheld.clear()).await;
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [7, 0, 6]);
    let settled = report(&stage).await.resize.unwrap();
    assert_eq!(settled.destroyed, Vec::<String>::new());
    // The next one is another one less.
    destroy(&mut stage, "02:00:00:00:00:03").await;
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [7, 0, 6, 0, 5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retained_vf_and_a_group_that_somebody_has_open_hold_the_number() {
    let mut stage = Stage::new().await;
    stage.kernel.give_vfs(stage.pf.address, 7);
    let entry: WithheldVf = serde_json::from_value(json!({
        "vfIndex": 4, "reason": "Retained",
        "claim": {"namespace": "blue", "name": "gone", "uid": "g"},
    }))
    .unwrap();
    stage
        .respec(|spec| {
            spec.num_vfs = Some(2);
            spec.withheld = vec![entry];
        })
        .await;
    publish(&stage.agent).await.unwrap();
    let waits = report(&stage).await;
    assert!(resized(&waits).2.contains("VF 4"), "{:?}", resized(&waits));
    stage.respec(|spec| spec.withheld.clear()).await;
    let vfs = stage.kernel.virtual_functions(stage.pf.address).unwrap();
    stage.kernel.bind_vfio(vfs[5].address).unwrap();
    let held = stage
        .kernel
        .hold_group(vfs[5].iommu_group.unwrap())
        .unwrap();
    publish(&stage.agent).await.unwrap();
    let waits = report(&stage).await;
    assert!(resized(&waits).2.contains("1 in use by something else"));
    assert_eq!(counts(&stage), Vec::<u16>::new());
    drop(held);
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [0, 2]);
    assert_eq!(stage.kernel.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_refuses_is_said_and_tried_again() {
    let mut stage = Stage::new().await;
    stage.kernel.give_vfs(stage.pf.address, 7);
    stage.respec(|spec| spec.num_vfs = Some(2)).await;
    stage.kernel.fail_next("set_num_vfs", libc::ENOMEM);
    publish(&stage.agent).await.unwrap_err();
    let failed = report(&stage).await;
    let (status, why, words) = resized(&failed);
    assert_eq!((status, why), ("False", reason::RESIZING));
    assert!(
        words.contains("tried again") && words.contains("numvfs"),
        "{words}"
    );
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [0, 2]);
    assert_eq!(resized(&report(&stage).await).0, "True");
    // A driver that makes fewer is not asked again and again.
    stage.kernel.make_at_most(stage.pf.address, 4);
    stage.respec(|spec| spec.num_vfs = Some(6)).await;
    for _ in 0..3 {
        publish(&stage.agent).await.unwrap();
    }
    assert_eq!(counts(&stage), [0, 2, 0, 6]);
    assert_eq!(report(&stage).await.num_vfs, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_finishes_what_was_begun() {
    let mut stage = Stage::new().await;
    let begun = Patch::Merge(json!({"status": {"resize": {
        "numVFs": 6, "destroyed": ["g"], "complete": false,
    }}}));
    let params = PatchParams::default();
    let functions = stage.functions();
    let write = functions.patch_status(&stage.function, &params, &begun);
    write.await.unwrap();
    let entry: WithheldVf = serde_json::from_value(json!({
        "vfIndex": 3, "reason": "Destroyed",
        "claim": {"namespace": "blue", "name": "gone", "uid": "g"},
    }))
    .unwrap();
    stage.respec(|spec| spec.withheld = vec![entry]).await;
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [6], "0 was written before");
    let last = report(&stage).await.resize.unwrap();
    assert!(last.complete && last.destroyed == ["g"], "{last:?}");
    publish(&stage.agent).await.unwrap();
    assert_eq!(counts(&stage), [6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_number_is_written_while_a_claim_has_a_vf_whatever_comes_at_once() {
    let mut stage = Stage::new().await;
    for round in 0_u16..6 {
        stage
            .respec(|spec| spec.num_vfs = Some(2 + round % 3))
            .await;
        let mut claims = Vec::new();
        for n in 0..3 {
            claims.push(stage.claim(&format!("02:00:00:00:{round:02}:{n:02}")).await);
        }
        let ups = futures::future::join_all(claims.iter().map(|claim| up(&stage, claim)));
        let (_, published) = tokio::join!(ups, publish(&stage.agent));
        published.unwrap();
        for claim in &claims {
            stage.delete(claim).await;
        }
        let downs = futures::future::join_all(claims.iter().map(|claim| up(&stage, claim)));
        let (_, published) = tokio::join!(downs, publish(&stage.agent));
        published.unwrap();
    }
    // Of a VF that is bound somebody has the claim.
    let mut bound = std::collections::BTreeSet::new();
    for write in stage.kernel.writes() {
        match write {
            Write::Bind(vf) => assert!(bound.insert(vf)),
            Write::Unbind(vf) => assert!(bound.remove(&vf)),
            Write::NumVfs { count, .. } => assert!(bound.is_empty(), "{count}: {bound:?}"),
            Write::VfSetting { .. } | Write::LinkUp(_) | Write::Reset(_) | Write::Nvme { .. } => {}
        }
    }
    assert_eq!(stage.taken(), 0);
    assert_eq!(stage.kernel.violations(), Vec::<String>::new());
    publish(&stage.agent).await.unwrap();
    assert_eq!(report(&stage).await.num_vfs, 4);
}

//! A claim's walk as far as it goes on a host whose VM does not run.

use super::*;
use crate::kernel::Kernel as _;
use crate::kernel::fake::Write;
use crate::node::agent::MANAGER;
use crate::node::test_stage::Stage;
use common::api::{condition, type_};
use serde_json::json;

const MAC: &str = "02:00:00:00:00:01";

fn says<'c>(claim: &'c VFClaim, type_: &str) -> (&'c str, &'c str) {
    let conditions = &claim.status.as_ref().unwrap().conditions;
    let c = condition(conditions, type_).unwrap();
    (&c.status, &c.reason)
}

fn counts(stage: &Stage) -> Vec<u16> {
    let writes = stage.kernel.writes().into_iter();
    let count = |w| match w {
        Write::NumVfs { count, .. } => Some(count),
        _ => None,
    };
    writes.filter_map(count).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn up_to_the_vm_and_back_with_the_claim_as_the_log() {
    let stage = Stage::new().await;
    let claim = stage.claim(MAC).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let up = stage.now(&claim).await;
    let device = up.status.as_ref().unwrap().device.clone().unwrap();
    assert_eq!(says(&up, type_::PREPARED), ("True", reason::PREPARED));
    assert_eq!(
        says(&up, type_::ATTACHED),
        ("False", reason::VM_NOT_RUNNING)
    );
    assert!(up.status.as_ref().unwrap().attachment.is_none());
    assert_eq!(counts(&stage), [7]);

    // Another look, and a successor that knows nothing but the claim, change nothing.
    let written = stage.kernel.writes();
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    stage
        .agent
        .ledger
        .lock()
        .forget(up.metadata.uid.as_deref().unwrap());
    reconcile(Arc::new(up.clone()), Arc::clone(&stage.agent)).await;
    let still = stage.now(&claim).await;
    assert_eq!(still.status.as_ref().unwrap().device, Some(device.clone()));
    assert_eq!(
        still.metadata.resource_version,
        up.metadata.resource_version
    );
    assert_eq!(stage.kernel.writes(), written);

    stage.delete(&claim).await;
    // The cache is behind: the agent goes by what the API server has.
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let down = stage.now(&claim).await;
    assert!(down.status.as_ref().unwrap().device.is_none());
    assert_eq!(stage.taken(), 0);
    let vfs = stage.kernel.virtual_functions(stage.pf.address).unwrap();
    let vf = vfs.iter().find(|v| v.index == device.vf_index).unwrap();
    assert_eq!(vf.driver, None);
    assert_eq!(counts(&stage), [7], "the pool keeps its VFs");
    assert_eq!(stage.kernel.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_at_once_get_a_vf_each_and_the_count_is_written_once() {
    let stage = Stage::new().await;
    let mut claims = Vec::new();
    for n in 1..=4 {
        claims.push(stage.claim(&format!("02:00:00:00:00:{n:02}")).await);
    }
    let all = claims
        .iter()
        .map(|c| reconcile(Arc::new(c.clone()), Arc::clone(&stage.agent)));
    futures::future::join_all(all).await;
    let mut indexes = std::collections::BTreeSet::new();
    for claim in &claims {
        let now = stage.now(claim).await;
        let device = now.status.unwrap().device.unwrap();
        assert!(indexes.insert(device.vf_index), "{device:?} given twice");
    }
    assert_eq!(counts(&stage), [7]);
    assert_eq!(stage.kernel.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_refuses_is_said_and_tried_again_with_the_same_vf() {
    let stage = Stage::new().await;
    let claim = stage.claim(MAC).await;
    stage.kernel.fail_next("bind_vfio", libc::EIO);
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let failed = stage.now(&claim).await;
    let device = failed.status.as_ref().unwrap().device.clone().unwrap();
    assert_eq!(says(&failed, type_::PREPARED), ("False", reason::RETRYING));

    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let up = stage.now(&claim).await;
    assert_eq!(says(&up, type_::PREPARED), ("True", reason::PREPARED));
    let same = up.status.unwrap().device.unwrap();
    assert_eq!(same.vf_index, device.vf_index);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_names_another_ones_vf_lets_go_of_it_and_gets_its_own() {
    let stage = Stage::new().await;
    let first = stage.claim(MAC).await;
    reconcile(Arc::new(first.clone()), Arc::clone(&stage.agent)).await;
    let first = stage.now(&first).await;
    let taken = first.status.as_ref().unwrap().device.clone().unwrap();

    // A dead agent's choice, carried out after the VF was given to the first claim.
    let late = stage.claim("02:00:00:00:00:02").await;
    let choice = json!({"device": {
        "nodeName": taken.node_name,
        "physicalFunction": taken.physical_function,
        "vfIndex": taken.vf_index,
    }});
    let late = common::kube::status::decide(&stage.claims(), &late, MANAGER, &choice)
        .await
        .unwrap();
    let written = stage.kernel.writes();
    reconcile(Arc::new(late.clone()), Arc::clone(&stage.agent)).await;
    let device = stage.now(&late).await.status.unwrap().device.unwrap();
    assert_ne!(device.vf_index, taken.vf_index);
    let vfs = stage.kernel.virtual_functions(stage.pf.address).unwrap();
    let vf = vfs.iter().find(|v| v.index == taken.vf_index).unwrap();
    let since = stage.kernel.writes().split_off(written.len());
    let touched = since.iter().any(|w| match w {
        Write::VfSetting { vf: at, .. } => *at == vf.address,
        Write::Bind(at) | Write::Unbind(at) | Write::Reset(at) => *at == vf.address,
        Write::NumVfs { .. } | Write::LinkUp(_) | Write::Nvme { .. } => false,
    });
    assert!(!touched, "{since:?}");
    let still = stage.now(&first).await.status.unwrap().device.unwrap();
    assert_eq!(still.vf_index, taken.vf_index);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unbind_that_does_not_come_back_holds_its_claim_and_no_other() {
    let stage = Stage::new().await;
    let claim = stage.claim(MAC).await;
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let device = stage.now(&claim).await.status.unwrap().device.unwrap();
    stage.delete(&claim).await;
    stage.kernel.stick_next("unbind");
    let mut due = stage.agent.report_due.subscribe();
    due.mark_unchanged();
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let held = stage.now(&claim).await;
    assert_eq!(says(&held, type_::READY), ("False", reason::BROKEN));
    assert_eq!(held.status.unwrap().device.unwrap(), device);
    assert!(due.has_changed().unwrap(), "the PF's object is not told");

    let written = stage.kernel.writes();
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    assert_eq!(stage.kernel.writes(), written, "written to again");
    let other = stage.claim("02:00:00:00:00:02").await;
    reconcile(Arc::new(other.clone()), Arc::clone(&stage.agent)).await;
    let given = stage.now(&other).await.status.unwrap().device.unwrap();
    assert_ne!(given.vf_index, device.vf_index);

    let address = device.pci_address.clone();
    let vfs = stage.kernel.virtual_functions(stage.pf.address).unwrap();
    let vf = vfs.iter().find(|v| v.index == device.vf_index).unwrap();
    assert!(address.is_none_or(|a| a == vf.address.to_string()));
    stage.kernel.stick(vf.address, false);
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    assert!(stage.now(&claim).await.status.unwrap().device.is_none());
    assert_eq!(stage.kernel.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pf_that_the_host_uses_meanwhile_is_not_written_to() {
    let stage = Stage::new().await;
    let claim = stage.claim(MAC).await;
    // Chosen, and nothing done to it yet.
    stage.kernel.fail_next("bind_vfio", libc::EIO);
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let pf = stage.pf.address;
    stage.kernel.use_by_host(pf, Some("default route"));
    let written = stage.kernel.writes();
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let held = stage.now(&claim).await;
    assert_eq!(
        says(&held, type_::PREPARED),
        ("False", reason::IN_USE_BY_HOST)
    );
    assert_eq!(stage.kernel.writes(), written);

    stage.kernel.use_by_host(pf, None);
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let up = stage.now(&claim).await;
    assert_eq!(says(&up, type_::PREPARED), ("True", reason::PREPARED));
}

#[tokio::test(flavor = "multi_thread")]
async fn vfs_that_do_not_come_are_waited_for_in_words() {
    let stage = Stage::new().await;
    let claim = stage.claim(MAC).await;
    stage.kernel.stick_next("set_num_vfs");
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let waits = stage.now(&claim).await;
    assert_eq!(says(&waits, type_::PREPARED), ("False", reason::BROKEN));
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    assert_eq!(counts(&stage), [7], "written again");

    // It came back, and made them.
    stage.kernel.stick(stage.pf.address, false);
    stage.kernel.give_vfs(stage.pf.address, 7);
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
    let up = stage.now(&claim).await;
    assert_eq!(says(&up, type_::PREPARED), ("True", reason::PREPARED));
    assert_eq!(counts(&stage), [7]);
}

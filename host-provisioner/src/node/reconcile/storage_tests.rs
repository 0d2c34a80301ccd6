//! A claim of a namespace, as far as it goes on a host whose VM does not run.

use super::*;
use crate::kernel::fake::{Formats, nvme_pf};
use crate::node::test_stage::Stage;
use common::api::{condition, type_};

const SECRET: &[u8] = b"the first guest's";

async fn disks() -> Stage {
    let stage = Stage::of(nvme_pf("0000:04:00.0".parse().unwrap())).await;
    stage.kernel.give_namespaces(stage.pf.address, [1, 2]);
    stage
}

async fn look(stage: &Stage, claim: &VFClaim) {
    reconcile(Arc::new(claim.clone()), Arc::clone(&stage.agent)).await;
}

async fn device(stage: &Stage, claim: &VFClaim) -> Option<DeviceStatus> {
    stage.now(claim).await.status.unwrap().device
}

async fn namespace(stage: &Stage, claim: &VFClaim) -> Option<u32> {
    device(stage, claim).await?.namespace_id
}

async fn ready(stage: &Stage, claim: &VFClaim) -> (String, String) {
    let status = stage.now(claim).await.status.unwrap();
    let ready = condition(&status.conditions, type_::READY).unwrap();
    (ready.reason.clone(), ready.message.clone())
}

fn has_secret(stage: &Stage, nsid: u32) -> bool {
    let content = stage.kernel.namespace(stage.pf.address, nsid);
    content.windows(SECRET.len()).any(|part| part == SECRET)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_is_one_claims_through_restarts_and_is_handed_on_empty() {
    let stage = disks().await;
    let pf = stage.pf.address;
    let first = stage.storage_claim("a", &[1, 2]).await;
    let second = stage.storage_claim("b", &[1, 2]).await;
    let third = stage.storage_claim("c", &[1, 2]).await;
    for claim in [&first, &second, &third] {
        look(&stage, claim).await;
    }
    assert_eq!(namespace(&stage, &first).await, Some(1));
    assert_eq!(namespace(&stage, &second).await, Some(2));
    assert_eq!(device(&stage, &third).await, None);
    let (reason, words) = ready(&stage, &third).await;
    assert_eq!(reason, reason::NO_FREE_NAMESPACE, "{words}");
    assert_eq!(ready(&stage, &first).await.0, reason::VM_NOT_RUNNING);
    assert_eq!(stage.kernel.controllers_of(pf, 1), [1]);
    assert_eq!(stage.kernel.controllers_of(pf, 2), [2]);
    stage.kernel.write_namespace(pf, 1, 5000, SECRET);

    // A successor that knows nothing but the claims does nothing.
    let written = stage.kernel.writes();
    let recorded = device(&stage, &first).await;
    stage
        .agent
        .ledger
        .lock()
        .forget(first.metadata.uid.as_deref().unwrap());
    look(&stage, &first).await;
    look(&stage, &third).await;
    assert_eq!(device(&stage, &first).await, recorded);
    assert_eq!(stage.kernel.writes(), written);

    // The host is restarted: the VFs are made anew, and the data are the claim's still.
    stage.kernel.reboot();
    look(&stage, &third).await;
    assert_eq!(device(&stage, &third).await, None, "nobody has it now");
    look(&stage, &first).await;
    assert_eq!(stage.kernel.controllers_of(pf, 1), [1]);
    assert!(has_secret(&stage, 1));

    stage.delete(&first).await;
    look(&stage, &first).await;
    assert_eq!(device(&stage, &first).await, None);
    assert!(!has_secret(&stage, 1));
    look(&stage, &third).await;
    assert_eq!(namespace(&stage, &third).await, Some(1));
    assert!(!has_secret(&stage, 1));
    assert_eq!(stage.kernel.violations(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_not_erased_stays_with_its_claim() {
    let stage = disks().await;
    let pf = stage.pf.address;
    let first = stage.storage_claim("a", &[1]).await;
    let next = stage.storage_claim("b", &[1]).await;
    look(&stage, &first).await;
    // Where this format leaves it.
    stage.kernel.write_namespace(pf, 1, 65_100, SECRET);
    stage.kernel.formats(pf, Formats::Not);
    stage.delete(&first).await;
    look(&stage, &first).await;
    assert_eq!(namespace(&stage, &first).await, Some(1));
    let (reason, words) = ready(&stage, &first).await;
    assert_eq!(reason, reason::RETRYING);
    assert!(words.contains("is not empty"), "{words}");
    look(&stage, &next).await;
    assert_eq!(device(&stage, &next).await, None);

    stage.kernel.formats(pf, Formats::Truly);
    look(&stage, &first).await;
    assert_eq!(device(&stage, &first).await, None);
    look(&stage, &next).await;
    assert_eq!(namespace(&stage, &next).await, Some(1));
    assert!(!has_secret(&stage, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_with_its_vf_gone_is_erased_all_the_same() {
    let stage = disks().await;
    let pf = stage.pf.address;
    let claim = stage.storage_claim("a", &[2]).await;
    look(&stage, &claim).await;
    stage.kernel.write_namespace(pf, 2, 0, SECRET);
    stage.kernel.reboot();
    stage.delete(&claim).await;
    look(&stage, &claim).await;
    assert_eq!(device(&stage, &claim).await, None);
    assert!(!has_secret(&stage, 2));
    assert_eq!(stage.kernel.controllers_of(pf, 2), [0; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_whose_record_was_torn_off_is_given_to_nobody() {
    let stage = disks().await;
    let pf = stage.pf.address;
    let claim = stage.storage_claim("a", &[1]).await;
    look(&stage, &claim).await;
    stage.kernel.write_namespace(pf, 1, 0, SECRET);
    stage.tear_off(&claim).await;
    look(&stage, &claim).await;
    assert_eq!(stage.taken(), 0);
    let next = stage.storage_claim("b", &[1, 2]).await;
    look(&stage, &next).await;
    let got = device(&stage, &next).await.unwrap();
    assert_eq!(got.namespace_id, Some(2));
    assert_ne!(got.vf_index, 0, "that VF has the other's namespace");
    assert!(has_secret(&stage, 1));
    let last = stage.storage_claim("c", &[1]).await;
    look(&stage, &last).await;
    assert_eq!(device(&stage, &last).await, None);
    assert_eq!(ready(&stage, &last).await.0, reason::NO_FREE_NAMESPACE);
}

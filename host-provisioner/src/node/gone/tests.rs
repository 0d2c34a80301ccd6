use super::*;
use crate::node::allocate::{allocate, snapshot};
use crate::node::test_stage::Stage;

fn reference(claim: &VFClaim) -> ObjectRef<DynamicObject> {
    ObjectRef::from_obj(claim).erase()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vf_chosen_for_a_claim_that_went_meanwhile_is_free_again() {
    let stage = Stage::new().await;
    let claim = stage.claim("02:00:00:00:00:01").await;
    // The choice is in the ledger, the write meets nobody.
    stage.tear_off(&claim).await;
    let api = stage.claims();
    let (seen, _) = snapshot(&stage.agent).await.unwrap();
    let refused = allocate(&stage.agent, &api, &claim, None, &seen).await;
    assert!(refused.is_err(), "there is nothing to write to");
    assert_eq!(stage.taken(), 1);

    let mut told = stage.agent.pool_changed.subscribe();
    told.mark_unchanged();
    follow_up(Arc::clone(&stage.agent), reference(&claim)).await;
    assert_eq!(stage.taken(), 0);
    assert!(told.has_changed().unwrap(), "who waits for a VF is woken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_there_keeps_its_vf() {
    let stage = Stage::new().await;
    let claim = stage.claim("02:00:00:00:00:01").await;
    let api = stage.claims();
    let (seen, _) = snapshot(&stage.agent).await.unwrap();
    let allocated = allocate(&stage.agent, &api, &claim, None, &seen).await;
    let allocated = allocated.unwrap().unwrap();
    stage.agent.ledger.lock().observe(&allocated).unwrap();
    // As a watch that was cut may leave it.
    follow_up(Arc::clone(&stage.agent), reference(&claim)).await;
    assert_eq!(stage.taken(), 1);
}

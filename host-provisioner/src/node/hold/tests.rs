use std::collections::BTreeMap;

use common::api::{LinkState, VFClaim};
use kube::runtime::reflector::ObjectRef;

use super::*;
use crate::kernel::{MacAddr, TxRate, VlanTag};
use crate::node::ledger::VfKey;
use crate::node::test_stage::Stage;

const GRANTED: VfConfig = VfConfig {
    mac: MacAddr([2, 0, 0, 0, 0, 1]),
    vlan: Some(VlanTag::new(100, 0)),
    spoof_check: true,
    trust: false,
    ..VfConfig::CLEAN
};

fn entry(uid: &str, index: u16, attached: bool) -> Entry {
    Entry {
        vf: VfKey {
            physical_function: "n-1".into(),
            index,
        },
        claim: ClaimRef {
            namespace: "ns".into(),
            name: uid.into(),
            uid: uid.into(),
        },
        mac_address: GRANTED.mac.to_string(),
        namespace: None,
        wanted: Some(GRANTED),
        vm_uid: "vm".into(),
        pod_uid: "pod".into(),
        going: false,
        port: attached.then(|| "rp1".to_owned()),
        unanswered: None,
    }
}

fn serving(up: bool, vfs: &[(u16, Option<&str>, VfConfig)]) -> Serving {
    let vfs = vfs
        .iter()
        .map(|(index, driver, config)| (*index, (driver.map(str::to_owned), *config)))
        .collect::<BTreeMap<_, _>>();
    Serving { up, vfs }
}

fn names(claims: &[ClaimRef]) -> Vec<&str> {
    claims.iter().map(|c| c.name.as_str()).collect()
}

#[test]
fn only_attached_claims_that_are_not_served_as_granted_are_disturbed() {
    let entries = [
        entry("a", 0, true),
        entry("b", 1, true),
        entry("c", 2, false),
    ];
    let bare = VfConfig {
        vlan: None,
        ..GRANTED
    };
    let vfio = Some("vfio-pci");
    let of = |pf: Option<&Serving>| disturbed(&entries, pf);
    let good = [(0, vfio, GRANTED), (1, vfio, GRANTED)];
    assert!(of(Some(&serving(true, &good))).is_empty());
    assert_eq!(names(&of(Some(&serving(false, &good)))), ["a", "b"]);
    let drifted = serving(true, &[(0, vfio, GRANTED), (1, vfio, bare)]);
    assert_eq!(names(&of(Some(&drifted))), ["b"]);
    let mut leaving = entries.clone();
    leaving[1].going = true;
    assert!(disturbed(&leaving, Some(&drifted)).is_empty());
    let taken = serving(true, &[(0, None, GRANTED), (1, vfio, GRANTED)]);
    assert_eq!(names(&of(Some(&taken))), ["a"]);
    assert_eq!(names(&of(Some(&serving(true, &good[..1])))), ["b"]);
    assert_eq!(names(&of(None)), ["a", "b"]);
}

#[test]
fn a_drift_says_what_was_done_and_whether_it_is_a_breach() {
    let bare = VfConfig {
        vlan: None,
        ..GRANTED
    };
    let drift = Drift::of(true, &GRANTED, bare).unwrap();
    assert!(drift.is_breach());
    assert!(
        drift.to_string().contains("its VLAN was not as granted"),
        "{drift}"
    );
    let down = Drift::of(false, &GRANTED, GRANTED).unwrap();
    assert!(!down.is_breach());
    assert!(down.to_string().contains("was down"), "{down}");
    let mac = VfConfig {
        mac: MacAddr([2, 0, 0, 0, 0, 9]),
        ..GRANTED
    };
    assert!(!Drift::of(true, &GRANTED, mac).unwrap().is_breach());
    let limited = VfConfig {
        link_state: LinkState::Disable,
        rate: TxRate { min: 0, max: 500 },
        ..GRANTED
    };
    // igb forgets its rates when the speed of its link changes.
    let forgotten = Drift::of(true, &limited, GRANTED).unwrap();
    assert!(!forgotten.is_breach());
    assert!(
        forgotten
            .to_string()
            .contains("its link state and transmit rate was not as granted"),
        "{forgotten}"
    );
    assert_eq!(Drift::of(true, &GRANTED, GRANTED), None);
}

async fn next(stage: &mut Stage) -> ObjectRef<VFClaim> {
    let woken = tokio::time::timeout(Duration::from_secs(20), stage.wakes.recv());
    woken.await.expect("nobody was woken").unwrap()
}

/// A kernel that tells of a change wakes the claim whose VF is not as granted, and no other.
#[tokio::test]
async fn a_change_of_the_kernel_wakes_the_claim_that_it_disturbs() {
    let mut stage = Stage::new().await;
    let pf = stage.pf.address;
    stage.kernel.give_vfs(pf, 2);
    stage.kernel.set_link_up("ens1f0").unwrap();
    let facts = stage.kernel.physical_function(pf).unwrap();
    let name = inventory::physical_function_name(&stage.agent.node_name, &facts.identity);
    for index in [0, 1] {
        let vf = stage.kernel.virtual_functions(pf).unwrap()[usize::from(index)].address;
        let config = VfConfig {
            mac: MacAddr([2, 0, 0, 0, 0, u8::try_from(index).unwrap()]),
            ..GRANTED
        };
        stage.kernel.set_vf_config(&facts, index, &config).unwrap();
        stage.kernel.bind_vfio(vf).unwrap();
        let mut entry = entry(&format!("claim-{index}"), index, true);
        entry.vf.physical_function.clone_from(&name);
        entry.wanted = Some(config);
        stage.agent.ledger.lock().enter(entry).unwrap();
    }
    let stop = CancellationToken::new();
    let held = tokio::spawn(run(Arc::clone(&stage.agent), stop.clone()));
    // It listens once it has subscribed; until then nobody is told.
    while stage.kernel.watchers() == 0 {
        tokio::task::yield_now().await;
    }
    stage.kernel.announce(&Change::Anything);
    let vf = stage.kernel.virtual_functions(pf).unwrap()[1].address;
    tokio::time::sleep(SETTLE * 3).await;
    assert!(stage.wakes.try_recv().is_err(), "all was as granted");
    stage.kernel.give_config(vf, VfConfig::CLEAN);
    stage.kernel.announce(&Change::Interface("ens1f0".into()));
    let woken = next(&mut stage).await;
    assert_eq!(woken.name, "claim-1");
    assert_eq!(woken.extra.uid.as_deref(), Some("claim-1"));
    stage.kernel.give_vfs(pf, 0);
    stage.kernel.announce(&Change::Anything);
    let mut both = [next(&mut stage).await.name, next(&mut stage).await.name];
    both.sort();
    assert_eq!(both, ["claim-0", "claim-1"]);
    stop.cancel();
    held.await.unwrap();
}

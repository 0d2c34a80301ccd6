//! Several of everything at once: claims for more VFs and ports than there are, and two node
//! agents on one node.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::api::{PhysicalFunction, VFClaim, condition, reason, type_};
use futures::FutureExt;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, ResourceExt};

use super::support::claims::told;
use super::support::lab::MARK;
use super::support::pods::Part;
use super::support::site::{TraceEvent, TraceKind};
use super::support::{Claim, Lab, Wish, l1, watch, writes};
use super::{Scenario, release, scenario};
use crate::deploy::names::SYSTEM;
use crate::wait::{self, Probe};

/// Claims at once.
const MANY: usize = 20;
/// Root ports of the VM that are for VFs (`machine/domain.rs`).
const PORTS: usize = 4;
/// Longest until so many claims have come to rest.
const SETTLE: Duration = Duration::from_secs(300);
const EVERY: Duration = Duration::from_secs(1);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "two-agents",
            "a second node agent, started by mistake, says who has the lock and ends; nothing is written by it, and claims come and go",
            two_agents
        ),
        scenario!(
            Long,
            "burst-of-twenty",
            "twenty claims at once for seven VFs and four ports: as many as fit are attached, each with a VF of its own, the others say what they wait for and move up, and all go at once",
            burst
        ),
    ]
}

async fn burst(lab: &Lab<'_>) -> Result<()> {
    let before = Before::take(lab).await?;
    let wishes: Vec<Wish> = (0..MANY)
        .map(|n| Wish::new(&format!("burst-{n}")))
        .collect();
    let claims = try_join_all(wishes.iter().map(|wish| lab.create(wish))).await?;
    let first = settled(lab, &claims).await?;
    as_many_as_fit(lab, &first).await?;

    // The next ones move up without being made anew.
    try_join_all(first.iter().map(|claim| lab.release(claim))).await?;
    let gone = |claim: &&Claim| !first.iter().any(|went| went.uid == claim.uid);
    let rest: Vec<Claim> = claims.iter().filter(gone).cloned().collect();
    let second = settled(lab, &rest).await?;
    as_many_as_fit(lab, &second).await?;

    try_join_all(rest.iter().map(|claim| lab.delete(claim))).await?;
    try_join_all(rest.iter().map(|claim| lab.gone(claim))).await?;
    before.nothing_left(lab).await
}

/// What was there before many claims came and went.
pub(super) struct Before {
    memlock: String,
    nodes: Vec<String>,
    trace: Vec<TraceEvent>,
}

impl Before {
    /// Of a laboratory without claims.
    pub(super) async fn take(lab: &Lab<'_>) -> Result<Self> {
        Ok(Self {
            memlock: lab.qemu.memlock(&lab.l1).await?,
            nodes: lab.qemu.vfio_nodes(&lab.l1).await?,
            trace: lab.trace().await?,
        })
    }

    /// Claims, kernel, QEMU, cgroup and memlock agree that nobody has anything, and what was
    /// written meanwhile was due: VFs were made once if at all, and each was bound for one
    /// holder after another.
    pub(super) async fn nothing_left(&self, lab: &Lab<'_>) -> Result<()> {
        let copies = lab.host_claims().list(&ListParams::default()).await?.items;
        let copies: Vec<String> = copies.iter().map(ResourceExt::name_any).collect();
        ensure!(copies.is_empty(), "the host still has {copies:?}");
        let ours = lab.qemu.ours().await?;
        ensure!(ours.is_empty(), "QEMU still has {ours:?}");
        for vf in l1::pf(&lab.l1, &lab.wired.address).await?.vfs {
            release::free_and_clean(lab, &vf.address, vf.index).await?;
        }
        let now = Self::take(lab).await?;
        ensure!(
            now.memlock == self.memlock && now.nodes == self.nodes,
            "gates: {} {:?} became {} {:?}",
            self.memlock,
            self.nodes,
            now.memlock,
            now.nodes
        );
        ensure!(
            !lab.qemu.cgroup_allows(&lab.l1, "vfio").await?,
            "the rule for /dev/vfio/vfio is left"
        );
        let counts = writes::num_vfs(&self.trace, &now.trace, &lab.wired.address)?;
        ensure!(
            counts.is_empty() || counts == ["7"],
            "sriov_numvfs was written {counts:?}"
        );
        one_after_another(writes::between(&self.trace, &now.trace)?)
    }
}

/// Waits until as many of `claims` are Ready as the VM has ports, and each other one says
/// that it waits for a port or for a VF; those that are Ready.
async fn settled(lab: &Lab<'_>, claims: &[Claim]) -> Result<Vec<Claim>> {
    let api = lab.guest_claims();
    let marked = ListParams::default().labels(MARK);
    wait::until("the claims to come to rest", SETTLE, EVERY, || async {
        let now = api.list(&marked).await?.items;
        let (mut ready, mut restless) = (Vec::new(), Vec::new());
        for claim in claims {
            let of = |c: &&VFClaim| c.metadata.uid.as_deref() == Some(&claim.uid);
            let Some(seen) = now.iter().find(of) else {
                bail!("claim {} is gone", claim.name)
            };
            let all = seen.status.as_ref().map(|s| s.conditions.as_slice());
            match all.and_then(|all| condition(all, type_::READY)) {
                Some(c) if c.status == "True" => ready.push(claim.clone()),
                Some(c) if [reason::NO_FREE_VF, reason::NO_FREE_PORT].contains(&&*c.reason) => {}
                _ => restless.push(format!("{}: {}", claim.name, told(seen))),
            }
        }
        ensure!(
            ready.len() <= PORTS,
            "{} claims are Ready on {PORTS} ports",
            ready.len()
        );
        Ok(if ready.len() == PORTS && restless.is_empty() {
            Probe::Ready(ready)
        } else {
            Probe::NotYet(format!("{} are Ready; {restless:?}", ready.len()))
        })
    })
    .await
}

/// QEMU has the devices of these claims and no other, each on a VF of its own that the
/// kernel has on vfio-pci.
async fn as_many_as_fit(lab: &Lab<'_>, ready: &[Claim]) -> Result<()> {
    let ours = lab.qemu.ours().await?;
    let in_qemu: BTreeSet<String> = ours.into_iter().map(|d| d.id).collect();
    let wanted: BTreeSet<String> = ready.iter().map(Claim::qemu_id).collect();
    ensure!(
        in_qemu == wanted,
        "QEMU has {in_qemu:?}, Ready are {wanted:?}"
    );
    let kernel = l1::pf(&lab.l1, &lab.wired.address).await?;
    let mut vfs = BTreeSet::new();
    for claim in ready {
        let attached = lab.ready(claim).await?;
        let vf = kernel.vfs.iter().find(|vf| vf.address == attached.vf);
        let driver = vf.and_then(|vf| vf.driver.as_deref());
        ensure!(
            driver == Some("vfio-pci"),
            "{} is on {driver:?}",
            attached.vf
        );
        ensure!(
            vfs.insert(attached.vf.clone()),
            "{} has two claims",
            attached.vf
        );
    }
    let api: Api<PhysicalFunction> = Api::all(lab.host.clone());
    let what = "the attached VFs to be reported";
    watch::until(&api, &lab.wired.object, what, SETTLE, |p| {
        let status = p.and_then(|p| p.status.as_ref()).context("no status")?;
        let counts = &status.counts;
        Ok(if usize::from(counts.attached) == ready.len() {
            Probe::Ready(())
        } else {
            Probe::NotYet(format!("{counts:?}"))
        })
    })
    .await
}

/// Each VF was taken from one holder before it was bound for the next.
fn one_after_another(events: &[TraceEvent]) -> Result<()> {
    let mut bound: BTreeSet<&str> = BTreeSet::new();
    for event in events {
        match &event.what {
            what @ TraceKind::Bound { device, .. } if release::binds_vfio(what) => {
                ensure!(bound.insert(device), "{device} was bound twice");
            }
            TraceKind::Unbind { device, .. } | TraceKind::Released { device, .. } => {
                bound.remove(&**device);
            }
            _ => {}
        }
    }
    ensure!(bound.is_empty(), "{bound:?} were never released");
    Ok(())
}

async fn two_agents(lab: &Lab<'_>) -> Result<()> {
    let (claim, had) = lab.attach(&Wish::new("first-agents")).await?;
    let before = lab.trace().await?;
    let pods: Api<Pod> = Api::namespaced(lab.host.clone(), SYSTEM);
    let second = second_agent(lab).await?;
    let name = second.metadata.name.clone().unwrap_or_default();
    pods.create(&PostParams::default(), &second).await?;
    let said = ended(&pods, &name).await;
    let now = DeleteParams::default().grace_period(0);
    pods.delete(&name, &now).await?;
    let (code, said) = said?;
    ensure!(
        code != 0 && said.contains("another node agent holds"),
        "it ended with {code}: {said}"
    );
    let after = lab.trace().await?;
    let written = writes::between(&before, &after)?;
    ensure!(written.is_empty(), "the second agent wrote {written:?}");

    let (other, _) = lab.attach(&Wish::new("also-the-first-ones")).await?;
    lab.release(&other).await?;
    let now = lab.ready(&claim).await?;
    ensure!(
        now.vf == had.vf && now.guest_address == had.guest_address,
        "{had:?} became {now:?}"
    );
    lab.release(&claim).await
}

/// A pod as the DaemonSet's on the same node, with a port of its own and nobody to start it
/// again.
async fn second_agent(lab: &Lab<'_>) -> Result<Pod> {
    let pods = Part::Agent.pods(lab).await?;
    let first = pods.into_iter().next().context("no agent")?;
    let mut spec = first.spec.context("a pod without a spec")?;
    spec.restart_policy = Some("Never".into());
    let agent = spec.containers.first_mut().context("no container")?;
    (agent.liveness_probe, agent.readiness_probe) = (None, None);
    agent.termination_message_policy = Some("FallbackToLogsOnError".into());
    for argument in agent.args.iter_mut().flatten() {
        if argument.starts_with("--http-endpoint=") {
            *argument = "--http-endpoint=127.0.0.1:18099".into();
        }
    }
    Ok(Pod {
        metadata: ObjectMeta {
            name: Some("e2e-second-agent".into()),
            labels: Some([(MARK.into(), "yes".into())].into()),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        ..Pod::default()
    })
}

/// Waits for the pod's end: its exit code and last words.
async fn ended(pods: &Api<Pod>, name: &str) -> Result<(i32, String)> {
    let what = "the second agent to end";
    watch::until(pods, name, what, Duration::from_secs(60), |pod| {
        let status = pod.and_then(|p| p.status.as_ref());
        let containers = status.and_then(|s| s.container_statuses.as_ref());
        let state = containers.and_then(|c| c.first()?.state.clone());
        let Some(state) = state else {
            return Ok(Probe::NotYet("it has no container yet".into()));
        };
        Ok(match state.terminated {
            Some(end) => Probe::Ready((end.exit_code, end.message.unwrap_or_default())),
            None => Probe::NotYet(format!("{:?} {:?}", state.waiting, state.running)),
        })
    })
    .await
}

//! Several of everything at once: claims for more VFs and ports than there are, two VMs and two
//! PFs, and two node agents on one node.

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
use serde_json::json;

use super::support::claims::told;
use super::support::lab::MARK;
use super::support::lab::Pf;
use super::support::pods::Part;
use super::support::site::{L2_NODE, SECOND_NODE, TraceEvent, TraceKind};
use super::support::untouched::Picture;
use super::support::{Attached, Claim, Lab, Wish, l1, l2, watch, writes};
use super::{Scenario, release, restarts, scenario};
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
            Long,
            "two-vms",
            "four claims of each of two VMs at once, over two PFs: all are attached, each guest's kernel has its own VFs and no other, and both VMs are as before when they have gone",
            two_vms
        ),
        scenario!(
            "two-agents",
            "a second node agent, started by mistake, says who has the lock and ends; nothing is written by it, and claims come and go",
            two_agents
        ),
        scenario!(
            Long,
            "restart-agent-with-every-vf",
            "the node agent is killed while claims have every VF of two PFs: its successor knows them all and disturbs none, and gives the one that comes back to the next claim",
            every_vf
        ),
        scenario!(
            Long,
            "burst-of-twenty",
            "twenty claims at once for seven VFs and four ports: as many as fit are attached, each with a VF of its own, the others say what they wait for and move up, and all go at once",
            burst
        ),
    ]
}

async fn two_vms(lab: &Lab<'_>) -> Result<()> {
    let second = lab.second().await?;
    let pfs = [&lab.wired, &lab.second];
    let before = Before::take(lab, &[&lab.qemu, &second.qemu], &pfs).await?;
    let vms = [
        (L2_NODE, &lab.qemu, &lab.l2),
        (SECOND_NODE, &second.qemu, &second.l2),
    ];
    let wishes: Vec<Wish> = vms
        .iter()
        .flat_map(|(node, ..)| {
            (0..PORTS).map(move |n| Wish::new(&format!("{node}-{n}")).node(node))
        })
        .collect();
    let claims = try_join_all(wishes.iter().map(|wish| lab.create(wish))).await?;
    let ready = settled(lab, &claims, vms.len() * PORTS).await?;
    let attached = attached(lab, &ready, &pfs).await?;
    for (node, qemu, l2) in vms {
        let of = |c: &&(Claim, Attached)| c.0.name.starts_with(node);
        let own: Vec<_> = attached.iter().filter(of).collect();
        has(qemu, own.iter().map(|(claim, _)| claim)).await?;
        let wanted: BTreeSet<&str> = own.iter().map(|(_, a)| &*a.mac).collect();
        for (_, attached) in &own {
            l2::bound(l2, &attached.guest_address).await?;
        }
        let seen = l2::vfs(l2).await?;
        let seen: BTreeSet<&str> = seen.iter().filter_map(|vf| vf.mac.as_deref()).collect();
        ensure!(seen == wanted, "{node} has {seen:?}, its claims {wanted:?}");
    }
    try_join_all(claims.iter().map(|claim| lab.delete(claim))).await?;
    try_join_all(claims.iter().map(|claim| lab.gone(claim))).await?;
    before.nothing_left(lab).await
}

async fn every_vf(lab: &Lab<'_>) -> Result<()> {
    lab.manage(&lab.second, true).await?;
    let pfs = [&lab.wired, &lab.second];
    let each = u16::try_from(PORTS / pfs.len())?;
    for pf in pfs {
        lab.set_pool(pf, json!({"numVFs": each})).await?;
    }
    // A PF without VFs gets them with its first claim.
    for pf in pfs {
        let what = "as many VFs as the VM has ports for";
        lab.pool_until(pf, what, |_, s| s.num_vfs == each || s.num_vfs == 0)
            .await?;
    }
    let wishes: Vec<Wish> = (0..PORTS)
        .map(|n| Wish::new(&format!("every-{n}")))
        .collect();
    let claims = try_join_all(wishes.iter().map(|wish| lab.create(wish))).await?;
    let ready = settled(lab, &claims, PORTS).await?;
    let had = attached(lab, &ready, &pfs).await?;
    let (before, trace) = (Picture::take(lab).await?, lab.trace().await?);

    Part::Agent.restart(lab).await?;
    for (claim, had) in &had {
        let now = lab.ready(claim).await?;
        ensure!(restarts::same(had, &now), "{had:?} became {now:?}");
    }
    before.still(lab).await.context("after the restart")?;

    // The only free one is that of the claim that goes, and the others stay out of it.
    let (leaving, left) = had.first().context("nothing is attached")?;
    lab.release(leaving).await?;
    let (_, next) = lab.attach(&Wish::new("the-next")).await?;
    ensure!(
        next.vf == left.vf,
        "{} came back, {} was given",
        left.vf,
        next.vf
    );
    // It has seen all of them by now, at the latest.
    let now = lab.trace().await?;
    for pf in pfs {
        let counts = writes::num_vfs(&trace, &now, &pf.address)?;
        ensure!(
            counts.is_empty(),
            "sriov_numvfs of {} was written: {counts:?}",
            pf.address
        );
    }
    for (claim, had) in had.iter().skip(1) {
        let touched = writes::about(&trace, &now, &had.vf)?;
        ensure!(
            touched.is_empty(),
            "the successor touched {}: {touched:?}",
            had.vf
        );
        let now = lab.ready(claim).await?;
        ensure!(restarts::same(had, &now), "{had:?} became {now:?}");
        l2::bound(&lab.l2, &had.guest_address).await?;
    }
    Ok(())
}

async fn burst(lab: &Lab<'_>) -> Result<()> {
    let before = Before::take(lab, &[&lab.qemu], &[&lab.wired]).await?;
    let wishes: Vec<Wish> = (0..MANY)
        .map(|n| Wish::new(&format!("burst-{n}")))
        .collect();
    let claims = try_join_all(wishes.iter().map(|wish| lab.create(wish))).await?;
    let first = settled(lab, &claims, PORTS).await?;
    as_many_as_fit(lab, &first).await?;

    // The next ones move up without being made anew.
    try_join_all(first.iter().map(|claim| lab.release(claim))).await?;
    let gone = |claim: &&Claim| !first.iter().any(|went| went.uid == claim.uid);
    let rest: Vec<Claim> = claims.iter().filter(gone).cloned().collect();
    let second = settled(lab, &rest, PORTS).await?;
    as_many_as_fit(lab, &second).await?;

    try_join_all(rest.iter().map(|claim| lab.delete(claim))).await?;
    try_join_all(rest.iter().map(|claim| lab.gone(claim))).await?;
    before.nothing_left(lab).await
}

/// What was there before many claims came and went.
pub(super) struct Before {
    gates: Vec<(l1::Qemu, Gates)>,
    pfs: Vec<Pf>,
    trace: Vec<TraceEvent>,
}

/// What a launcher lets through.
#[derive(Debug, PartialEq, Eq)]
struct Gates {
    memlock: String,
    nodes: Vec<String>,
    /// The rule for /dev/vfio/vfio.
    container: bool,
}

impl Gates {
    async fn of(lab: &Lab<'_>, qemu: &l1::Qemu) -> Result<Self> {
        Ok(Self {
            memlock: qemu.memlock(&lab.l1).await?,
            nodes: qemu.vfio_nodes(&lab.l1).await?,
            container: qemu.cgroup_allows(&lab.l1, "vfio").await?,
        })
    }
}

impl Before {
    /// Of a laboratory without claims: of these VMs and PFs.
    pub(super) async fn take(lab: &Lab<'_>, vms: &[&l1::Qemu], pfs: &[&Pf]) -> Result<Self> {
        let mut gates = Vec::new();
        for qemu in vms.iter().copied() {
            gates.push((qemu.clone(), Gates::of(lab, qemu).await?));
        }
        Ok(Self {
            gates,
            pfs: pfs.iter().copied().cloned().collect(),
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
        for pf in &self.pfs {
            for vf in l1::pf(&lab.l1, &pf.address).await?.vfs {
                release::free_and_clean_of(lab, pf, &vf.address, vf.index).await?;
            }
        }
        for (qemu, before) in &self.gates {
            let ours = qemu.ours().await?;
            ensure!(ours.is_empty(), "{} still has {ours:?}", qemu.domain);
            let now = Gates::of(lab, qemu).await?;
            ensure!(
                now == *before && !now.container,
                "the gates of {}: {before:?} became {now:?}",
                qemu.domain
            );
        }
        let now = lab.trace().await?;
        for pf in &self.pfs {
            let counts = writes::num_vfs(&self.trace, &now, &pf.address)?;
            ensure!(
                counts.is_empty() || counts == ["7"],
                "sriov_numvfs of {} was written {counts:?}",
                pf.address
            );
        }
        one_after_another(writes::between(&self.trace, &now)?)
    }
}

/// Waits until as many of `claims` are Ready as there are `ports`, and each other one says that
/// it waits for a port or for a VF; those that are Ready.
async fn settled(lab: &Lab<'_>, claims: &[Claim], ports: usize) -> Result<Vec<Claim>> {
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
            ready.len() <= ports,
            "{} claims are Ready on {ports} ports",
            ready.len()
        );
        Ok(if ready.len() == ports && restless.is_empty() {
            Probe::Ready(ready)
        } else {
            Probe::NotYet(format!("{} are Ready; {restless:?}", ready.len()))
        })
    })
    .await
}

async fn as_many_as_fit(lab: &Lab<'_>, ready: &[Claim]) -> Result<()> {
    has(&lab.qemu, ready.iter()).await?;
    attached(lab, ready, &[&lab.wired]).await?;
    Ok(())
}

/// QEMU has the devices of these claims and no other.
async fn has(qemu: &l1::Qemu, claims: impl Iterator<Item = &Claim>) -> Result<()> {
    let ours = qemu.ours().await?;
    let in_qemu: BTreeSet<String> = ours.into_iter().map(|d| d.id).collect();
    let wanted: BTreeSet<String> = claims.map(Claim::qemu_id).collect();
    ensure!(
        in_qemu == wanted,
        "{} has {in_qemu:?}, Ready are {wanted:?}",
        qemu.domain
    );
    Ok(())
}

/// Each of these claims has a VF of its own that the kernel has on vfio-pci, and each of the
/// PFs has some of them and reports as many.
async fn attached(lab: &Lab<'_>, ready: &[Claim], pfs: &[&Pf]) -> Result<Vec<(Claim, Attached)>> {
    let mut all = Vec::new();
    let mut vfs = BTreeSet::new();
    for claim in ready {
        let attached = lab.ready(claim).await?;
        ensure!(
            vfs.insert(attached.vf.clone()),
            "{} has two claims",
            attached.vf
        );
        all.push((claim.clone(), attached));
    }
    let mut of_pfs = 0;
    for pf in pfs {
        let kernel = l1::pf(&lab.l1, &pf.address).await?.vfs;
        let own = kernel.iter().filter(|vf| vfs.contains(&vf.address));
        let drivers: Vec<_> = own.map(|vf| vf.driver.as_deref()).collect();
        ensure!(
            !drivers.is_empty() && drivers.iter().all(|driver| *driver == Some("vfio-pci")),
            "the attached VFs of {} are on {drivers:?}",
            pf.address
        );
        of_pfs += drivers.len();
        let api: Api<PhysicalFunction> = Api::all(lab.host.clone());
        let what = "the attached VFs to be reported";
        watch::until(&api, &pf.object, what, SETTLE, |p| {
            let status = p.and_then(|p| p.status.as_ref()).context("no status")?;
            let counts = &status.counts;
            Ok(if usize::from(counts.attached) == drivers.len() {
                Probe::Ready(())
            } else {
                Probe::NotYet(format!("{counts:?}"))
            })
        })
        .await?;
    }
    ensure!(of_pfs == ready.len(), "{vfs:?} are not all of these PFs");
    Ok(all)
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

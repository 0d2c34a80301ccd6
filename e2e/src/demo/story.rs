//! The story itself: who is watched while the claim goes up and while it comes back.

use std::time::Duration;

use anyhow::{Context, Result};
use common::api::{PhysicalFunction, VFClaimStatus, VfState, condition, type_};
use kube::Api;

use super::timeline::Timeline;
use crate::machine::{TraceEvent, TraceKind};
use crate::scenarios::support::claims::{ATTACH, RELEASE, told};
use crate::scenarios::support::far::{Shell, clock_offset, sh, sh_within};
use crate::scenarios::support::l2::Net;
use crate::scenarios::support::site::{GUEST_ADDRESSES, L1_NODE, L2_NODE, PEER};
use crate::scenarios::support::{Claim, Lab, Wish, l1, l2, watch, wire};
use crate::wait::Probe;

const MAC: &str = "02:5f:00:00:de:01";
const VLAN: u16 = 100;

/// How far each machine's clock is ahead of ours, in microseconds.
struct Clocks {
    l1: i64,
    l2: i64,
    /// L1's boot clock, of the write trace.
    l1_boot: i64,
}

impl Clocks {
    async fn set(lab: &Lab<'_>) -> Result<Self> {
        let (l1, e1) = clock_offset(&lab.l1).await?;
        let (l2, e2) = clock_offset(&lab.l2).await?;
        let script = "now=${EPOCHREALTIME/./}; read -r up _ </proc/uptime; up=${up/./}0000; echo $((now - 10#$up))";
        let boot: i64 = sh(&lab.l1, script).await?.parse()?;
        crate::progress::line(&format!(
            "clocks: L1's is known to {} ms, L2's to {} ms",
            e1 / 1000,
            e2 / 1000
        ));
        Ok(Self {
            l1,
            l2,
            l1_boot: l1 - boot,
        })
    }
}

/// Tells it; what is left behind on an error is tidied by the caller.
pub(super) async fn tell(lab: &Lab<'_>, t: &Timeline) -> Result<()> {
    let clocks = Clocks::set(lab).await?;
    setting(lab, t).await?;
    let life = l2::life(&lab.l2).await?;

    t.chapter("a VFClaim becomes a network card in a running VM");
    let before = lab.trace().await?;
    let wish = Wish::new("demo").mac(MAC).vlan(i64::from(VLAN));
    let claim = lab.create(&wish).await?;
    t.now(
        "claim created",
        "guest API",
        format!("{MAC}, VLAN {VLAN}, node {L2_NODE}"),
    );
    let ((), (), (), attached) = tokio::try_join!(
        milestones(lab, t, &claim),
        group_opened(lab, t, &clocks),
        guest_kernel(lab, t, &clocks),
        lab.ready(&claim),
    )?;
    t.now(
        "Ready",
        "guest API",
        format!("guest address {}", attached.guest_address),
    );
    let vf = l2::bound(&lab.l2, &attached.guest_address).await?;
    let driver = vf.driver.unwrap_or_default();
    t.now(
        "guest driver bound",
        "guest kernel",
        format!("{driver} {:?}", vf.interface),
    );
    lab.switch.reset().await?;
    let address = GUEST_ADDRESSES
        .first()
        .context("no address for the guest")?;
    let net = Net::open(&lab.l2, "e2edemo", MAC, address).await?;
    first_ping(lab, t, &clocks).await?;
    wire::only(lab, &[(MAC, Some(VLAN))]).await?;
    kernel_writes(lab, t, &clocks, &before, &attached.vf).await?;

    t.chapter("the claim is deleted and the VF goes back to the pool");
    let before = lab.trace().await?;
    lab.delete(&claim).await?;
    t.now("claim deleted", "guest API", "");
    let ((), ()) = tokio::try_join!(
        guest_lost(lab, t, &clocks, &attached.guest_address),
        async {
            lab.gone(&claim).await?;
            t.now("claim and copy gone", "both APIs", "");
            Ok(())
        }
    )?;
    back_in_pool(lab, t, &attached.vf).await?;
    kernel_writes(lab, t, &clocks, &before, &attached.vf).await?;
    drop(net);
    let now = l2::life(&lab.l2).await?;
    anyhow::ensure!(now.boot_id == life.boot_id, "the VM was restarted");
    t.now(
        "the VM ran all along",
        "guest kernel",
        format!("up {} s, same boot id", now.uptime),
    );
    Ok(())
}

async fn setting(lab: &Lab<'_>, t: &Timeline) -> Result<()> {
    t.chapter("the stage");
    let pf = l1::pf(&lab.l1, &lab.wired.address).await?;
    let detail = format!("{} on {L1_NODE}, {} VFs", lab.wired.object, pf.num_vfs);
    t.now("PF managed", "host API", detail);
    t.now("class", "host API", crate::deploy::names::CLASS);
    let (uuid, ip) = lab.node_identity(L2_NODE).await?;
    let uptime = l2::life(&lab.l2).await?.uptime;
    t.now(
        "VM running",
        "guest kernel",
        format!("{L2_NODE}, {ip}, UUID {uuid}, up {uptime} s"),
    );
    Ok(())
}

/// What a status shows of one milestone, once it does.
type Look = fn(&VFClaimStatus) -> Option<String>;

/// A claim's way through the host's API.
const MILESTONES: [(&str, Look); 6] = [
    ("admitted", |s| {
        let granted = s.admitted.as_ref()?;
        Some(format!("class {}", granted.class_name))
    }),
    ("resolved", |s| {
        Some(format!("the VM runs on {}", s.host_node.as_ref()?))
    }),
    ("allocated", |s| {
        let device = s.device.as_ref()?;
        Some(format!(
            "VF {} of {}",
            device.vf_index, device.physical_function
        ))
    }),
    ("configured", |s| {
        let prepared = condition(&s.conditions, type_::PREPARED)?;
        (prepared.status == "True").then(|| "MAC, VLAN, vfio-pci".to_owned())
    }),
    ("attachment recorded", |s| {
        Some(format!("port {}", s.attachment.as_ref()?.port))
    }),
    ("attached", |s| {
        Some(s.guest_device.as_ref()?.pci_address.clone())
    }),
];

/// Tells each milestone as it is first seen; one that is seen late does not hold up others.
async fn milestones(lab: &Lab<'_>, t: &Timeline, claim: &Claim) -> Result<()> {
    lab.copied(claim).await?;
    t.now("synced to the host", "host API", claim.host_name());
    let mut left = Vec::from(MILESTONES);
    let api = lab.host_claims();
    let what = "the claim to be attached";
    watch::until(&api, &claim.host_name(), what, ATTACH, |c| {
        let status = c.and_then(|c| c.status.as_ref());
        left.retain(|(what, look)| match status.and_then(look) {
            Some(detail) => {
                t.now(what, "host API", detail);
                false
            }
            None => true,
        });
        Ok(if left.is_empty() {
            Probe::Ready(())
        } else {
            Probe::NotYet(c.map_or("no copy".into(), told))
        })
    })
    .await
}

/// QEMU opens the VF's group in the middle of device_add.
async fn group_opened(lab: &Lab<'_>, t: &Timeline, clocks: &Clocks) -> Result<()> {
    // The read is a pause without a process: nobody writes into that pipe.
    let script = format!(
        "exec 3<> <(:); while at=${{EPOCHREALTIME/./}} open=$(ls -l /proc/{}/fd)
do [[ $open =~ /dev/vfio/[0-9]+ ]] && break; read -t 0.2 -u 3; done; echo ${{BASH_REMATCH[0]}} $at",
        lab.qemu.pid
    );
    let said = sh_within(&lab.l1, &script, ATTACH).await?;
    let (group, at) = said.split_once(' ').context("no group and time")?;
    t.at(
        at.trim().parse::<i64>()? - clocks.l1,
        "device_add",
        "L1 /proc",
        format!("QEMU opened {group}"),
    );
    Ok(())
}

/// The guest's kernel has the device on its bus.
async fn guest_kernel(lab: &Lab<'_>, t: &Timeline, clocks: &Clocks) -> Result<()> {
    let script = "shopt -s nullglob; exec 3<> <(:)
while :; do at=${EPOCHREALTIME/./}
    for d in /sys/bus/pci/devices/*; do
        [[ $(<$d/device) == 0x10ca ]] && { echo ${d##*/} $at; exit; }
    done; read -t 0.1 -u 3
done";
    seen(&lab.l2, script, t, clocks.l2, "seen by the guest kernel").await
}

async fn guest_lost(lab: &Lab<'_>, t: &Timeline, clocks: &Clocks, address: &str) -> Result<()> {
    let script = format!(
        "exec 3<> <(:); while at=${{EPOCHREALTIME/./}}; [[ -e /sys/bus/pci/devices/{address} ]]; do read -t 0.1 -u 3; done; echo {address} $at"
    );
    seen(&lab.l2, &script, t, clocks.l2, "gone from the guest").await
}

async fn seen(
    shell: &dyn Shell,
    script: &str,
    t: &Timeline,
    offset: i64,
    what: &str,
) -> Result<()> {
    let said = sh_within(shell, script, ATTACH.max(RELEASE)).await?;
    let (detail, at) = said.rsplit_once(' ').context("no time")?;
    t.at(at.parse::<i64>()? - offset, what, "guest kernel", detail);
    Ok(())
}

async fn first_ping(lab: &Lab<'_>, t: &Timeline, clocks: &Clocks) -> Result<()> {
    let limit = Duration::from_secs(60);
    let script = format!(
        "ip netns exec e2edemo ping -q -i 0.2 -c 1 -w {} {PEER} >/dev/null; echo ${{EPOCHREALTIME/./}}",
        limit.as_secs()
    );
    let at: i64 = sh_within(&lab.l2, &script, limit).await?.parse()?;
    t.at(
        at - clocks.l2,
        "first ping answered",
        "guest",
        format!("{PEER} over the VF"),
    );
    Ok(())
}

/// What the kernel of L1 noted meanwhile about the PF and the VF.
async fn kernel_writes(
    lab: &Lab<'_>,
    t: &Timeline,
    clocks: &Clocks,
    before: &[TraceEvent],
    vf: &str,
) -> Result<()> {
    let after = lab.trace().await?;
    let new = after
        .strip_prefix(before)
        .context("the write trace began anew")?;
    for e in new {
        let (what, detail) = match &e.what {
            TraceKind::NumVfs { device, value } if *device == lab.wired.address => {
                ("VFs created", format!("sriov_numvfs = {}", value.trim()))
            }
            TraceKind::Bound { device, driver } if device == vf => ("bound", driver.clone()),
            TraceKind::Released {
                device,
                driver: Some(driver),
            } if device == vf => ("released", driver.clone()),
            _ => continue,
        };
        let at = i64::try_from(e.at_us)? - clocks.l1_boot;
        t.at(at, what, "L1 kernel", detail);
    }
    Ok(())
}

async fn back_in_pool(lab: &Lab<'_>, t: &Timeline, address: &str) -> Result<()> {
    let api: Api<PhysicalFunction> = Api::all(lab.host.clone());
    let counts = watch::until(&api, &lab.wired.object, "the VF to be Free", RELEASE, |p| {
        let status = p.and_then(|p| p.status.as_ref()).context("no status")?;
        let vf = status.vfs.iter().find(|v| v.pci_address == address);
        Ok(match vf {
            Some(v) if v.state == VfState::Free => Probe::Ready(status.counts),
            other => Probe::NotYet(format!("{other:?}")),
        })
    })
    .await?;
    t.now(
        "VF back in the pool",
        "host API",
        format!("{} free", counts.free),
    );
    Ok(())
}

//! A VM whose memory is not all there and may not come back: an attachment would pin all of it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::api::{reason, type_};
use futures::FutureExt;
use serde_json::json;

use super::several::Before;
use super::support::far::sh;
use super::support::ports::Fillers;
use super::support::{Lab, Wish};
use super::{Scenario, scenario};
use crate::wait::{self, Probe};

const MIB: u64 = 1 << 20;
/// What the guest gives back to the host.
const BALLOON: u64 = 512 * MIB;
/// What its container may take beside what it has.
const ROOM: u64 = 100 * MIB;
/// Longest the guest may take to hand its pages out, each an exit of an emulated CPU.
const INFLATE: Duration = Duration::from_secs(300);
const EVERY: Duration = Duration::from_secs(1);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![scenario!(
        Long,
        "refused-without-memory",
        "the guest's balloon is filled and its container's memory limit is tight: a claim is refused with the numbers, QEMU lives on untouched, and with the limit gone the claim is served and takes what was said",
        without_memory
    )]
}

async fn without_memory(lab: &Lab<'_>) -> Result<()> {
    let before = Before::take(lab, &[&lab.qemu], &[&lab.wired]).await?;
    let device = Fillers::balloon(lab).await?;
    let all = balloon(lab).await?;
    let result = refused(lab, all - BALLOON).await;
    limit(lab, "max").await?;
    // The guest has its memory back when it has let the balloon go.
    device.unplug(lab).await?;
    result?;
    before.nothing_left(lab).await
}

async fn refused(lab: &Lab<'_>, left: u64) -> Result<()> {
    resize(lab, left).await?;
    let small = memory(lab).await?;
    limit(lab, &(small.charged + ROOM).to_string()).await?;
    let claim = lab.create(&Wish::new("big")).await?;
    let why = reason::INSUFFICIENT_MEMORY;
    let said = lab.refused(&claim, type_::ATTACHED, why).await?.message;
    let event = lab.event(&claim, why).await?;
    let [needed, room] = numbers(&said)?;
    ensure!(
        event.contains(&format!("{needed} MiB")),
        "the event says {event:?}"
    );
    // The container's file pages come and go meanwhile.
    ensure!(
        room.abs_diff(ROOM / MIB) < 50,
        "it has room for {} MiB, the claim says {room}: {said}",
        ROOM / MIB
    );
    ensure!(
        said.contains(small.cgroup.trim_start_matches('/')),
        "{said:?} does not name {}",
        small.cgroup
    );
    let ours = lab.qemu.ours().await?;
    ensure!(ours.is_empty(), "QEMU has {ours:?} all the same");
    let now = memory(lab).await?;
    ensure!(
        now.killed == small.killed,
        "the kernel killed in {}",
        now.cgroup
    );
    ensure!(
        now.resident < small.resident + ROOM,
        "QEMU grew from {} to {} bytes",
        small.resident,
        now.resident
    );

    limit(lab, "max").await?;
    lab.ready(&claim).await?;
    let full = memory(lab).await?;
    let grew = full.resident.saturating_sub(now.resident) / MIB;
    // It was refused for a reason: it would have been killed.
    ensure!(
        grew > ROOM / MIB && grew <= needed,
        "QEMU grew by {grew} MiB, {needed} were said to be needed"
    );
    lab.release(&claim).await
}

/// The first two numbers of MiB in a refusal.
fn numbers(said: &str) -> Result<[u64; 2]> {
    let words: Vec<&str> = said.split_whitespace().collect();
    let all: Vec<u64> = words
        .windows(2)
        .filter(|pair| pair.last().is_some_and(|unit| unit.starts_with("MiB")))
        .filter_map(|pair| pair.first()?.parse().ok())
        .collect();
    match all.as_slice() {
        [needed, room] => Ok([*needed, *room]),
        other => bail!("{said:?} has the numbers {other:?}"),
    }
}

/// QEMU's memory in L1, in bytes.
struct Memory {
    /// Its cgroup's path.
    cgroup: String,
    /// What the cgroup has that cannot be dropped.
    charged: u64,
    resident: u64,
    /// Kills for memory in the cgroup.
    killed: u64,
}

const CGROUP: &str = "c=$(sed -n 's/^0:://p' /proc/$pid/cgroup); d=/sys/fs/cgroup$c";

async fn memory(lab: &Lab<'_>) -> Result<Memory> {
    let script = format!(
        "pid={}; {CGROUP}
files=0; while read -r k v; do case $k in inactive_file|active_file) ((files += v));; esac; done <$d/memory.stat
while read -r k v _; do [[ $k == RssAnon: || $k == RssShmem: ]] && ((resident += v * 1024)); done </proc/$pid/status
while read -r k v; do [[ $k == oom_kill ]] && killed=$v; done <$d/memory.events
echo $c $(($(<$d/memory.current) - files)) $resident $killed",
        lab.qemu.pid
    );
    let said = sh(&lab.l1, &script).await?;
    let words: Vec<&str> = said.split_whitespace().collect();
    let [cgroup, charged, resident, killed] = words.as_slice() else {
        bail!("L1 said {said:?}")
    };
    Ok(Memory {
        cgroup: (*cgroup).to_owned(),
        charged: charged.parse()?,
        resident: resident.parse()?,
        killed: killed.parse()?,
    })
}

async fn limit(lab: &Lab<'_>, bytes: &str) -> Result<()> {
    let script = format!(
        "pid={}; {CGROUP}; echo {bytes} >$d/memory.max",
        lab.qemu.pid
    );
    sh(&lab.l1, &script).await.map(drop)
}

/// What the guest's balloon leaves it, in bytes.
async fn balloon(lab: &Lab<'_>) -> Result<u64> {
    let said = lab.qemu.qmp("query-balloon", &json!({})).await?;
    let actual = said.get("actual").and_then(serde_json::Value::as_u64);
    actual.with_context(|| format!("query-balloon said {said}"))
}

async fn resize(lab: &Lab<'_>, bytes: u64) -> Result<()> {
    lab.qemu.qmp("balloon", &json!({"value": bytes})).await?;
    wait::until("the guest's balloon", INFLATE, EVERY, || async {
        let now = balloon(lab).await?;
        Ok(if now == bytes {
            Probe::Ready(())
        } else {
            Probe::NotYet(format!("it leaves {} of {} MiB", now / MIB, bytes / MIB))
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusals_numbers() {
        let said = "attaching pins all of the VM's memory: 620 MiB more are needed, and the memory limit of /a has room for 99 MiB; raise it";
        assert_eq!(numbers(said).unwrap(), [620, 99]);
        assert!(numbers("no memory").is_err());
    }
}

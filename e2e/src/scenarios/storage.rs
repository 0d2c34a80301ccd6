//! NVMe: a namespace as a claim's guest has it, and as the next one gets it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::api::{reason, type_};
use futures::FutureExt;

use super::support::far::{Shell, sh, sh_within};
use super::support::lab::Pf;
use super::support::{Lab, Wish, kinds};
use super::{Scenario, scenario};
use crate::wait::{self, Probe};

const CLASS: &str = "e2e-disks";
/// What the first guest writes, at both ends of its namespace.
const SECRET: &str = "the-first-guests";
/// To read a whole namespace in the guest, which is slow.
const READ: Duration = Duration::from_secs(120);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![scenario!(
        "nvme-namespace-handed-on",
        "a guest reads and writes its namespace by an NVMe VF added to the running VM; it is nobody else's meanwhile, and the next guest reads nothing but zeros",
        handed_on
    )]
}

async fn handed_on(lab: &Lab<'_>) -> Result<()> {
    let pf = disks(lab).await?;
    lab.manage(&pf, true).await?;
    let done = with_disks(lab).await;
    let tidied = async {
        super::support::claims::remove_all(lab).await?;
        lab.manage(&pf, false).await
    };
    let tidied = tidied.await.context("taking the disks back");
    done.and(tidied)
}

/// The NVMe PF of L1.
async fn disks(lab: &Lab<'_>) -> Result<Pf> {
    let script = r#"for d in /sys/bus/pci/drivers/nvme/0000:*; do
    [[ -e $d/sriov_totalvfs ]] && echo ${d##*/}; done; true"#;
    let address = sh(&lab.l1, script).await?;
    ensure!(
        address.split_ascii_whitespace().count() == 1,
        "L1 has the NVMe PFs {address:?}"
    );
    Ok(Pf {
        object: kinds::physical_function(&lab.host, &address).await?,
        address,
        interface: String::new(),
    })
}

async fn with_disks(lab: &Lab<'_>) -> Result<()> {
    lab.class_of_namespaces(CLASS, &[1, 2]).await?;
    let wish = |name| Wish::new(name).class(CLASS).namespace(1);
    let (claim, first) = lab.attach(&wish("disk-first")).await?;
    ensure!(
        attached_to(lab, 1).await? == [u32::from(first.vf_index) + 1],
        "namespace 1 is attached to {:?}",
        attached_to(lab, 1).await?
    );
    let disk = disk(&lab.l2).await?;
    let size: u64 = sh(&lab.l2, &format!("blockdev --getsize64 {disk}"))
        .await?
        .parse()?;
    let last = size / 4096 - 1;
    for block in [0, last] {
        let write = format!(
            "printf %-4096s {SECRET} | dd of={disk} bs=4096 seek={block} oflag=direct conv=notrunc status=none"
        );
        sh(&lab.l2, &write).await?;
        let read = format!("dd if={disk} bs=4096 skip={block} count=1 iflag=direct status=none");
        let read = sh(&lab.l2, &read).await?;
        ensure!(read.trim() == SECRET, "block {block} reads {read:?}");
    }

    // It is one claim's.
    let next = lab.create(&wish("disk-next")).await?;
    lab.refused(&next, type_::READY, reason::NO_FREE_NAMESPACE)
        .await?;
    lab.release(&claim).await?;
    let second = lab.ready(&next).await?;
    let disk = self::disk(&lab.l2).await?;
    let compare = format!("cmp -n {size} {disk} /dev/zero && echo empty");
    let said = sh_within(&lab.l2, &compare, READ)
        .await
        .context("the next guest reads what the first one wrote")?;
    ensure!(said == "empty", "{said}");
    ensure!(
        attached_to(lab, 1).await? == [u32::from(second.vf_index) + 1],
        "the namespace is not the next claim's alone"
    );
    lab.release(&next).await?;
    let left = attached_to(lab, 1).await?;
    ensure!(left.is_empty(), "namespace 1 is still attached to {left:?}");
    Ok(())
}

/// The guest's one NVMe disk.
async fn disk(l2: &dyn Shell) -> Result<String> {
    let limit = Duration::from_secs(60);
    let every = Duration::from_millis(500);
    wait::until("an NVMe disk in the guest", limit, every, || async {
        let script = "shopt -s nullglob; for d in /dev/nvme+([0-9])n+([0-9]); do echo $d; done";
        let all = sh(l2, &format!("shopt -s extglob\n{script}")).await?;
        let mut disks = all.split_ascii_whitespace();
        Ok(match (disks.next(), disks.next()) {
            (Some(one), None) => Probe::Ready(one.to_owned()),
            _ => Probe::NotYet(format!("{all:?}")),
        })
    })
    .await
}

/// Numbers of the controllers that have a namespace, as another program says.
async fn attached_to(lab: &Lab<'_>, nsid: u32) -> Result<Vec<u32>> {
    let script = format!("nvme list-ctrl /dev/nvme0 --namespace-id={nsid}");
    let said = sh(&lab.l1, &script).await?;
    // Lines as "[   0]:0x1".
    let ids = said.lines().filter_map(|line| line.split_once("]:0x"));
    ids.map(|(_, id)| {
        u32::from_str_radix(id.trim(), 16).with_context(|| format!("{script}: {said:?}"))
    })
    .collect()
}

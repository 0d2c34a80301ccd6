//! A VF is a network card: frames leave with the right address and tag and are answered,
//! while the VM runs on and other claims come and go.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::FutureExt;

use super::support::l2::{self, Counter, Net};
use super::support::site::{GUEST_ADDRESSES, L2_NODE, PEER};
use super::support::{Attached, Lab, Wish, wire, writes};
use super::{Scenario, scenario};

/// Longest three pings may take.
const PING: Duration = Duration::from_secs(30);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "packets-flow",
            "the switch sees only frames with the claim's MAC and VLAN tag, and its answers reach the guest",
            packets_flow
        ),
        scenario!(
            "packets-flow-untagged",
            "without a VLAN the frames leave untagged, from a MAC made up for the claim",
            packets_flow_untagged
        ),
        scenario!(
            "vm-not-restarted",
            "through attach and detach the VM keeps its boot id, its QEMU and a process that counts",
            vm_not_restarted
        ),
        scenario!(
            "second-and-third-claim",
            "two more claims while the first is in use: sriov_numvfs is untouched and the first one's traffic goes on",
            second_and_third
        ),
    ]
}

/// The interface of an attached claim, in a namespace of its own.
pub(super) async fn net(lab: &Lab<'_>, attached: &Attached, number: usize) -> Result<Net> {
    l2::bound(&lab.l2, &attached.guest_address).await?;
    let address = GUEST_ADDRESSES
        .get(number)
        .context("no address left for the guest")?;
    Net::open(&lab.l2, &format!("e2e{number}"), &attached.mac, address).await
}

async fn packets_flow(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:10:01";
    let wish = Wish::new("packets").mac(mac).vlan(100);
    let (_, attached) = lab.attach(&wish).await?;
    lab.switch.reset().await?;
    net(lab, &attached, 0)
        .await?
        .ping(&lab.l2, PEER, 3, PING)
        .await?;
    wire::only(lab, &[(mac, Some(100))]).await
}

async fn packets_flow_untagged(lab: &Lab<'_>) -> Result<()> {
    let (_, attached) = lab.attach(&Wish::new("untagged")).await?;
    let mac = attached.mac.clone();
    let first = mac.get(..2).and_then(|b| u8::from_str_radix(b, 16).ok());
    let first = first.with_context(|| format!("{mac} is no MAC address"))?;
    ensure!(
        first & 3 == 2,
        "{mac} is not a locally administered unicast address"
    );
    lab.switch.reset().await?;
    net(lab, &attached, 0)
        .await?
        .ping(&lab.l2, PEER, 3, PING)
        .await?;
    wire::only(lab, &[(&mac, None)]).await
}

async fn vm_not_restarted(lab: &Lab<'_>) -> Result<()> {
    let counter = Counter::start(&lab.l2, "life").await?;
    let before = l2::life(&lab.l2).await?;
    let (pid, first) = counter.read(&lab.l2).await?;
    let (claim, _) = lab.attach(&Wish::new("life")).await?;
    let attached = counter.read(&lab.l2).await?;
    lab.release(&claim).await?;
    l2::awake(&lab.l2).await?;
    let after = l2::life(&lab.l2).await?;
    let (last_pid, last) = counter.read(&lab.l2).await?;
    ensure!(before.boot_id == after.boot_id, "the VM booted again");
    ensure!(
        after.uptime > before.uptime,
        "uptime went from {before:?} to {after:?}"
    );
    ensure!(
        pid != 0 && attached.0 == pid && last_pid == pid,
        "the counter died"
    );
    ensure!(
        first < attached.1 && attached.1 < last,
        "{first}, {}, {last}",
        attached.1
    );
    let pid = lab.machine.l2(L2_NODE).await?.qemu_pid();
    ensure!(
        pid == lab.qemu.pid,
        "QEMU is process {pid}, was {}",
        lab.qemu.pid
    );
    counter.stop(&lab.l2).await
}

async fn second_and_third(lab: &Lab<'_>) -> Result<()> {
    let macs = [
        "02:5f:00:00:20:01",
        "02:5f:00:00:20:02",
        "02:5f:00:00:20:03",
    ];
    let [first, second, third] = macs;
    let wish = |name: &str, mac: &str, vlan| Wish::new(name).mac(mac).vlan(vlan);
    let (_, attached) = lab.attach(&wish("first", first, 201)).await?;
    lab.switch.reset().await?;
    let steady = net(lab, &attached, 0).await?.ping_on(&lab.l2, PEER).await?;
    let before = lab.trace().await?;

    let (a, a_attached) = lab.attach(&wish("second", second, 202)).await?;
    let (b, b_attached) = lab.attach(&wish("third", third, 203)).await?;
    ensure!(
        a_attached.vf != b_attached.vf && a_attached.vf != attached.vf,
        "one VF given twice"
    );
    for (n, other) in [&a_attached, &b_attached].into_iter().enumerate() {
        net(lab, other, n + 1)
            .await?
            .ping(&lab.l2, PEER, 3, PING)
            .await?;
    }
    wire::only(
        lab,
        &[(first, Some(201)), (second, Some(202)), (third, Some(203))],
    )
    .await?;
    lab.release(&a).await?;
    lab.release(&b).await?;

    let after = lab.trace().await?;
    let counts = writes::num_vfs(&before, &after, &lab.wired.address)?;
    ensure!(counts.is_empty(), "sriov_numvfs was written: {counts:?}");
    let touched = writes::about(&before, &after, &attached.vf)?;
    ensure!(
        touched.is_empty(),
        "the first claim's VF was touched: {touched:?}"
    );
    let answers = steady.stop(&lab.l2).await?;
    // An emulated machine may be late with an answer now and then; an interruption of the
    // VF is seconds, and at two requests a second that is more than these.
    ensure!(
        answers.received > 10 && answers.missed <= 5,
        "the first claim's ping: {answers:?}"
    );
    Ok(())
}

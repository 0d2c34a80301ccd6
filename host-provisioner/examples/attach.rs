//! Attaches one VF, that is bound to vfio-pci already, to a running QEMU and takes it out again,
//! saying how long each step took: what the node agent does, without claims. For work on the
//! gates and the session on a real node.
//!
//! `attach PID SOCKET VF GROUP [keep]`: QEMU's process on this host, the QMP socket inside its
//! container, the VF's address, its IOMMU group; `keep` leaves the VF attached.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_provisioner::hypervisor::gates::Gates;
use host_provisioner::hypervisor::gates::host::{GatePaths, HostGates};
use host_provisioner::hypervisor::launcher::Proc;
use host_provisioner::hypervisor::qmp::QmpHypervisor;
use host_provisioner::hypervisor::{GuestView, Hypervisor, Unplug, memory, plan};

const POD: &str = "attach-by-hand";

fn done(step: &str, since: Instant) {
    println!("{:>8.3} s  {step}", since.elapsed().as_secs_f64());
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [pid, socket, vf, group, more @ ..] = arguments.as_slice() else {
        bail!("usage: attach PID SOCKET VF GROUP [keep]");
    };
    let vf = vf.parse()?;
    let group: u32 = group.parse().context("GROUP")?;
    let id = plan::device_id("by-hand");
    let gates = HostGates::new(GatePaths::default())?;
    for told in gates.recover(&|_| false)? {
        println!("recovered {told:?}");
    }
    let qemu = Proc::new("/proc").process(POD, pid.parse().context("PID")?)?;
    println!("{qemu:?}");

    let since = Instant::now();
    let session = QmpHypervisor::new(socket).connect(&qemu).await?;
    let machine = session.machine().await?;
    done("machine described", since);
    let vfio = u32::try_from(machine.vfio_devices().count())?;
    let port = plan::choose_port(&machine, plan::DEFAULT_RESERVED_PORTS)?;
    println!("port {port:?}, memory {:?}", machine.memory);
    let facts = gates.memory_facts(&qemu, machine.memory, vfio)?;
    println!("{facts:?}");
    let to_pin = memory::check(&facts)?;
    let mlocked = gates.locked_before(&qemu)?;
    let viommu = machine.viommu.is_some();
    let memlock = memory::needed_memlock(machine.memory, viommu, vfio + 1, mlocked);

    let since = Instant::now();
    let opened = gates.open(&qemu, group, memlock);
    done("gates opened", since);
    let since = Instant::now();
    let timeout = memory::attach_timeout(to_pin, machine.memory);
    let added = match opened {
        Ok(()) => session
            .device_add(&id, vf, &port.id, timeout)
            .await
            .context("device_add"),
        Err(e) => Err(e.into()),
    };
    done("device_add", since);
    let since = Instant::now();
    gates.close_device(POD, group)?;
    done("gates of the group closed", since);
    if let Err(e) = added {
        gates.close_all(POD)?;
        return Err(e);
    }

    let since = Instant::now();
    loop {
        match session.guest_view(&id).await? {
            GuestView::Configured { address } => {
                done(&format!("configured by the guest at {address}"), since);
                break;
            }
            other if since.elapsed() > Duration::from_secs(20) => {
                done(&format!("{other:?}"), since);
                break;
            }
            // query-pci has no event for a guest's writes to config space.
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    if more.iter().any(|m| m == "keep") {
        return Ok(());
    }
    let since = Instant::now();
    let unplug = session.device_del(&id, Duration::from_secs(60)).await?;
    done(&format!("device_del: {unplug:?}"), since);
    if unplug == Unplug::Deleted {
        gates.close_all(POD)?;
        done("all gates closed", since);
    }
    Ok(())
}

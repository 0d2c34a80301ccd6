//! The emulated host L1, the tenant's VMs in it (L2), and the switch on the managed PF's
//! wire. L1 is a QEMU process of this machine and a node of the host's cluster; a VM is
//! libvirt and QEMU in an unprivileged pod on L1, and a node of the guest's cluster.

mod channel;
mod device_plugin;
mod device_plugin_api;
mod domain;
mod frame;
mod image;
mod initramfs;
mod l1;
mod l2;
mod mend;
mod network;
mod newc;
mod objects;
mod pulse;
mod qemu;
mod switch;
mod trace;

use anyhow::{Context, Result};

pub use channel::Output;
pub use device_plugin::{DevicePluginArgs, serve as device_plugin};
pub use domain::Vm;
pub use frame::Kind as FrameKind;
pub use l1::{L1, NODE, SWITCH_ADDRESSES};
pub use l2::L2;
pub use pulse::{Pulse, give_up_vm};
pub use switch::{Count, Seen, Stats, Switch, SwitchArgs, serve as switch};
pub use trace::{TraceEvent, TraceKind};

use crate::context::DataCentre;
use crate::paths::Paths;
use crate::{kubernetes_images, node_image};

/// The machines that run.
#[derive(Clone)]
pub struct Machine {
    l1: L1,
    dc: Clusters,
}

/// Clients of both clusters.
#[derive(Clone)]
struct Clusters {
    host: crate::clusters::Cluster,
    guest: crate::clusters::Cluster,
}

impl Machine {
    /// The host machine.
    #[must_use]
    pub fn l1(&self) -> &L1 {
        &self.l1
    }

    /// A running VM of the namespace [`domain::NAMESPACE`].
    pub async fn l2(&self, name: &str) -> Result<L2> {
        l2::find(&self.l1, &self.dc.host, name).await
    }

    /// Whether the VM's launcher is still the one it had: a launcher's container ends with
    /// its QEMU and is not started again.
    pub async fn runs(&self, vm: &L2) -> Result<bool> {
        l2::runs(&self.dc.host, vm).await
    }

    /// Starts a VM on L1 and, as `vm` says, joins it to the guest's cluster.
    pub async fn start_vm(&self, vm: &Vm) -> Result<L2> {
        l2::up(&self.l1, &self.dc.host, &self.dc.guest, vm).await
    }

    /// Ends a VM and removes its objects.
    pub async fn stop_vm(&self, name: &str) -> Result<()> {
        l2::down(&self.dc.host, &self.dc.guest, name).await
    }

    /// The far end of the managed PF's wire.
    #[must_use]
    pub fn switch(&self) -> Switch {
        l1::switch()
    }
}

/// Starts L1 and waits until it is a Ready node. What runs stays.
pub async fn host(dc: &DataCentre) -> Result<L1> {
    l2::define(&dc.host).await?;
    let image = image(dc)?;
    let l1 = l1::up(dc, &image).await?;
    l1::join(&l1, &dc.host).await?;
    Ok(l1)
}

/// Starts the first VM on L1 and waits until it is a Ready node. What runs stays.
pub async fn vm(dc: &DataCentre, l1: L1) -> Result<Machine> {
    l2::prepare(&l1, &dc.host, &dc.ctx.paths).await?;
    let machine = Machine {
        l1,
        dc: Clusters {
            host: dc.host.clone(),
            guest: dc.guest.clone(),
        },
    };
    machine.start_vm(&Vm::first()).await?;
    Ok(machine)
}

/// The machines that [`up`] left running.
pub fn find(dc: &DataCentre) -> Result<Machine> {
    Ok(Machine {
        l1: L1::at(&dc.ctx.paths, &image(dc)?),
        dc: Clusters {
            host: dc.host.clone(),
            guest: dc.guest.clone(),
        },
    })
}

/// Whether L1 ended without having been taken down.
pub fn died(paths: &Paths) -> Result<bool> {
    l1::died(paths)
}

/// Ends L1 and all in it. Works on what was half-started too.
pub fn down(paths: &Paths) -> Result<()> {
    l1::down(paths)
}

fn image(dc: &DataCentre) -> Result<image::Image> {
    let (paths, tools) = (&dc.ctx.paths, &dc.ctx.tools);
    let rootfs = node_image::rootfs(paths)?;
    let archives = kubernetes_images::ensure(paths, tools, &rootfs)?;
    let images = ["pause", "kube-proxy"].map(|n| archives.join(format!("{n}.tar")));
    image::ensure(paths, tools, &images).context("the machine image")
}

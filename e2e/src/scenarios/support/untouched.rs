//! "Nothing changed in kernel and QEMU": a picture of both before and after, compared.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::l1::{self, KernelPf, PciDevice, VfSettings};
use super::lab::Lab;
use super::site::TraceEvent;

/// Everything a refused claim must leave as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Kernel's count, VFs and drivers, and VF settings, by PF address.
    kernel: BTreeMap<String, (KernelPf, BTreeMap<u16, VfSettings>)>,
    /// The trace of writes, whole.
    trace: Vec<TraceEvent>,
    qemu: Vec<PciDevice>,
    memlock: String,
    nodes: Vec<String>,
}

impl Picture {
    pub async fn take(lab: &Lab<'_>) -> Result<Self> {
        let l1 = &lab.l1;
        let mut kernel = BTreeMap::new();
        for pf in [&lab.wired, &lab.uplink, &lab.shared] {
            let seen = l1::pf(l1, &pf.address).await?;
            let settings = l1::vf_settings(l1, &pf.interface).await?;
            kernel.insert(pf.address.clone(), (seen, settings));
        }
        Ok(Self {
            kernel,
            trace: lab.trace().await?,
            qemu: lab.qemu.pci(l1).await?,
            memlock: lab.qemu.memlock(l1).await?,
            nodes: lab.qemu.vfio_nodes(l1).await?,
        })
    }

    /// An error that says what differs, if anything does.
    pub async fn still(&self, lab: &Lab<'_>) -> Result<()> {
        let now = Self::take(lab).await?;
        if now == *self {
            return Ok(());
        }
        let mut said = Vec::new();
        if now.trace != self.trace {
            let new = now.trace.strip_prefix(&*self.trace).unwrap_or(&now.trace);
            said.push(format!("writes: {new:?}"));
        }
        if now.kernel != self.kernel {
            said.push(format!("kernel: {:?} became {:?}", self.kernel, now.kernel));
        }
        if now.qemu != self.qemu {
            said.push(format!("QEMU: {:?} became {:?}", self.qemu, now.qemu));
        }
        if now.memlock != self.memlock || now.nodes != self.nodes {
            said.push(format!(
                "gates: {} {:?} became {} {:?}",
                self.memlock, self.nodes, now.memlock, now.nodes
            ));
        }
        bail!("something was changed: {}", said.join("; "))
    }
}

//! "Nothing changed in kernel and QEMU": a picture of both before and after, compared.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::far;
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
        let pfs = [&lab.wired, &lab.uplink, &lab.shared, &lab.second];
        let mut scripts = vec![lab.qemu.memlock_script(), lab.qemu.nodes_script()];
        for pf in pfs {
            scripts.push(l1::pf_script(&pf.address));
            scripts.push(l1::settings_script(&pf.interface));
        }
        let (said, trace, qemu) =
            tokio::try_join!(far::several(&lab.l1, &scripts), lab.trace(), lab.qemu.pci(),)?;
        let [memlock, nodes, functions @ ..] = said.as_slice() else {
            bail!("L1 said {said:?}")
        };
        let mut kernel = BTreeMap::new();
        for (pf, said) in pfs.iter().zip(functions.chunks_exact(2)) {
            let [seen, settings] = said else { continue };
            let seen = (l1::read_pf(seen)?, l1::read_settings(settings)?);
            kernel.insert(pf.address.clone(), seen);
        }
        Ok(Self {
            kernel,
            trace,
            qemu,
            memlock: memlock.clone(),
            nodes: l1::read_nodes(nodes),
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

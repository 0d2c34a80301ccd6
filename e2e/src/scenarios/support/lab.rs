//! The laboratory of a scenario: clients of both clusters, shells on both machines, the
//! switch, and the PFs by what they are for. Opening one and closing it both put
//! away whatever a scenario, also one that was killed, made and marked with [`MARK`].

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use common::api::PhysicalFunction;
use futures::future::BoxFuture;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{Mutex, OnceCell};

use super::far::{Shell, sh};
use super::site::{self, Switch, TraceEvent};
use super::{claims, kinds, l1, pool, ports, second, stops};
use crate::context::DataCentre;
use crate::machine::{self, L1, L2, Machine};

/// Whether the last scenario of this process tidied up; at its start nobody knows.
static LEFT_TIDY: AtomicBool = AtomicBool::new(false);
/// The PFs, found once in a process: their objects, addresses and names follow from L1's
/// command line, and each look costs an emulated machine a second.
static FOUND: OnceCell<[Pf; 4]> = OnceCell::const_new();
/// Label of every object that a scenario makes, so that all can be found and removed.
pub const MARK: &str = "e2e.sriov.harvesterhci.io/scenario";

/// A PF of L1: its object and where the kernel has it.
#[derive(Clone, Debug)]
pub struct Pf {
    /// Name of the `PhysicalFunction`.
    pub object: String,
    pub address: String,
    pub interface: String,
}

/// What a scenario works with.
pub struct Lab<'a> {
    pub dc: &'a DataCentre,
    pub host: Client,
    pub guest: Client,
    pub machine: Machine,
    pub l1: L1,
    pub l2: L2,
    pub switch: Switch,
    /// The PF whose wire is the switch; managed.
    pub wired: Pf,
    /// The PF with L1's default route.
    pub uplink: Pf,
    /// The PF behind a port without ACS.
    pub shared: Pf,
    /// A PF on no wire, for the scenarios that need a second one to be managed.
    pub second: Pf,
    pub qemu: l1::Qemu,
}

/// The body of a scenario.
pub type Body = for<'a> fn(&'a Lab<'a>) -> BoxFuture<'a, Result<()>>;

/// Runs `body` in a laboratory that is clean before and after; what cannot be cleaned
/// fails the scenario that left it.
pub async fn run(dc: &DataCentre, body: Body) -> Result<()> {
    let lab = Lab::open(dc).await.context("opening the laboratory")?;
    if !LEFT_TIDY.swap(false, Ordering::SeqCst) {
        lab.tidy()
            .await
            .context("before the scenario: tidying up after an earlier one")?;
    }
    let result = body(&lab).await;
    // The VM may be another one by now.
    let tidied = async { Lab::open(dc).await?.tidy().await };
    let tidied = tidied.await.context("after the scenario: tidying up");
    LEFT_TIDY.store(tidied.is_ok(), Ordering::SeqCst);
    match (result, tidied) {
        (Err(e), Err(t)) => Err(e.context(format!("and {t:#}"))),
        (result, tidied) => result.and(tidied),
    }
}

impl<'a> Lab<'a> {
    /// Finds every part; the managed PF is managed from here on.
    pub async fn open(dc: &'a DataCentre) -> Result<Self> {
        let (host, l1) = (dc.host.client(), machine::find(dc)?.l1().clone());
        let pfs = Pfs {
            host: &host,
            l1: &l1,
        };
        let all = FOUND.get_or_try_init(|| pfs.all()).await?.clone();
        Self::with(dc, all).await
    }

    /// Where L1 has one PF alone, whose driver was not there when it booted.
    pub async fn open_bare(dc: &'a DataCentre) -> Result<Self> {
        let (host, l1) = (dc.host.client(), machine::find(dc)?.l1().clone());
        let pfs = Pfs {
            host: &host,
            l1: &l1,
        };
        let [wired, ..] = site::PF_MACS;
        let one = pfs.by_mac(wired).await?;
        // Nothing of such a scenario is about the others.
        Self::with(dc, [one.clone(), one.clone(), one.clone(), one]).await
    }

    async fn with(dc: &'a DataCentre, pfs: [Pf; 4]) -> Result<Self> {
        let (host, guest) = (dc.host.client(), dc.guest.client());
        let machine = machine::find(dc)?;
        let l1 = machine.l1().clone();
        let l2 = Self::vm(&machine).await?;
        let [wired, uplink, shared, second] = pfs;
        let qemu = l1::Qemu::of(&l2, site::L2_DOMAIN);
        let switch = machine.switch();
        let lab = Self {
            machine,
            dc,
            host,
            guest,
            l1,
            l2,
            switch,
            wired,
            uplink,
            shared,
            second,
            qemu,
        };
        lab.manage(&lab.wired, true).await?;
        Ok(lab)
    }

    /// The VM; looked for in L1 only when its launcher is not the one of the last look.
    async fn vm(machine: &Machine) -> Result<L2> {
        static KNOWN: Mutex<Option<L2>> = Mutex::const_new(None);
        let mut known = KNOWN.lock().await;
        if let Some(vm) = known.as_ref()
            && machine.runs(vm).await?
        {
            return Ok(vm.clone());
        }
        let vm = machine.l2(site::L2_NODE).await?;
        *known = Some(vm.clone());
        Ok(vm)
    }

    /// Every write to sriov_numvfs and every driver bound or released since L1's boot.
    pub async fn trace(&self) -> Result<Vec<TraceEvent>> {
        self.l1.write_trace().await
    }

    /// An administrator's consent to a PF, or its end.
    pub async fn manage(&self, pf: &Pf, managed: bool) -> Result<()> {
        let api: Api<PhysicalFunction> = Api::all(self.host.clone());
        let patch = Patch::Merge(json!({"spec": {"managed": managed}}));
        api.patch(&pf.object, &PatchParams::default(), &patch)
            .await
            .with_context(|| format!("setting managed of {}", pf.object))?;
        Ok(())
    }

    /// Removes what carries [`MARK`], and checks that the machine is as a fresh one: no
    /// device of ours in QEMU, nobody on a VF.
    pub async fn tidy(&self) -> Result<()> {
        // Pings and counters first: a busy device is slow to leave the guest.
        let units = "systemctl stop 'e2e-*'; rm -f /run/e2e-*
for n in $(ip netns list); do case $n in e2e*) ip netns del $n;; esac; done; true";
        let holders = format!(
            "systemctl stop 'e2e-*'; rm -f /run/e2e-*; {}",
            stops::disarm()
        );
        tokio::try_join!(sh(&self.l2, units), sh(&self.l1, &holders))?;
        claims::remove_all(self).await?;
        second::remove(self).await?;
        kinds::remove_all(self).await?;
        pool::restore(self).await?;
        let (mut all, kernel) =
            tokio::try_join!(self.qemu.pci(), l1::pf(&self.l1, &self.wired.address))?;
        if ports::any(&all) {
            ports::remove_all(self).await?;
            all = self.qemu.pci().await?;
        }
        let left = l1::ours(all);
        for pf in [&self.uplink, &self.shared, &self.second] {
            self.manage(pf, false).await?;
        }
        if !left.is_empty() {
            // Once, or every scenario after this one would fail for it.
            ports::take_out(self, "what no claim has to leave the VM", l1::is_ours).await?;
            bail!("QEMU still had {left:?}, which no claim has; they were taken out");
        }
        let busy: Vec<_> = kernel
            .vfs
            .into_iter()
            .filter(|v| v.driver.as_deref().is_some_and(|d| d != "vfio-pci"))
            .collect();
        if !busy.is_empty() {
            bail!("VFs are left to other drivers: {busy:?}");
        }
        Ok(())
    }
}

struct Pfs<'a> {
    host: &'a Client,
    l1: &'a dyn Shell,
}

impl Pfs<'_> {
    async fn all(&self) -> Result<[Pf; 4]> {
        let [wired, uplink, shared, second] = site::PF_MACS;
        Ok([
            self.by_mac(wired).await?,
            self.by_mac(uplink).await?,
            self.by_mac(shared).await?,
            self.by_mac(second).await?,
        ])
    }

    /// The PF with this hardware address: where the kernel has it, then its object.
    async fn by_mac(&self, mac: &str) -> Result<Pf> {
        let script = format!(
            "for n in /sys/class/net/*; do [[ $(<$n/address) == {mac} && -e $n/device/sriov_totalvfs ]] || continue
d=$(readlink -f $n/device); echo ${{d##*/}} ${{n##*/}}; done"
        );
        let text = sh(self.l1, &script).await?;
        let (address, interface) = text
            .split_once(' ')
            .with_context(|| format!("L1 has no PF with hardware address {mac}"))?;
        let object = kinds::physical_function(self.host, address).await?;
        Ok(Pf {
            object,
            address: address.to_owned(),
            interface: interface.to_owned(),
        })
    }
}

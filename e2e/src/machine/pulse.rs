//! Whether the emulated machines still are the ones that were set up. The emulator was seen
//! to lose them (docs/status.md); a scenario that met that says nothing about our programs.

use std::time::Duration;

use anyhow::Result;

use super::{Machine, Vm, find};
use crate::context::DataCentre;

/// Longest a machine may take to answer before it counts as lost.
const ANSWER: Duration = Duration::from_secs(60);
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

/// The life of L1 that a run began with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulse {
    boot_id: String,
}

impl Pulse {
    /// Takes it, of machines that are well.
    pub async fn take(dc: &DataCentre) -> Result<Self> {
        let boot_id = boot_id(&find(dc)?).await?;
        Ok(Self { boot_id })
    }

    /// What shows that a machine was lost, if anything does: L1 is silent or booted anew, or
    /// the VM's kernel is silent while its QEMU runs. A VM that booted anew, or whose QEMU
    /// has ended, may be our doing and is not among it.
    pub async fn lost(&self, dc: &DataCentre) -> Option<String> {
        // What keeps the harness from looking is no loss of the emulator's.
        let machine = find(dc).ok()?;
        match boot_id(&machine).await {
            Err(e) => return Some(format!("L1 does not answer: {e:#}")),
            Ok(now) if now != self.boot_id => return Some("L1 has booted anew".into()),
            Ok(_) => {}
        }
        for vm in [Vm::first(), Vm::second()] {
            if let Some(seen) = silent(&machine, &vm.name).await {
                return Some(seen);
            }
        }
        None
    }
}

/// That the VM's QEMU runs and its kernel does not answer.
async fn silent(machine: &Machine, name: &str) -> Option<String> {
    let vm = machine.l2(name).await.ok()?;
    let answer = vm.run_with("true", &[], ANSWER).await;
    // Its QEMU may have ended while we waited.
    machine.l2(name).await.ok()?;
    answer
        .err()
        .map(|e| format!("the kernel of {name} does not answer: {e:#}"))
}

/// Takes the VMs away of which one was lost, so that only they are set up anew; an error if L1
/// is not well either.
pub async fn give_up_vm(dc: &DataCentre) -> Result<()> {
    let machine = find(dc)?;
    boot_id(&machine).await?;
    for vm in [Vm::first(), Vm::second()] {
        machine.stop_vm(&vm.name).await?;
    }
    Ok(())
}

async fn boot_id(machine: &Machine) -> Result<String> {
    let said = machine.l1().run_with(BOOT_ID, &[], ANSWER).await?;
    Ok(said.ok(BOOT_ID)?.text())
}

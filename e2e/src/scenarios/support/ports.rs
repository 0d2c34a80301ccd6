//! Devices of the harness's own in a VM's root ports, plugged by QMP.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::l1::PciDevice;
use super::lab::Lab;
use crate::wait::{self, Probe};

const PREFIX: &str = "e2e-fill-";

/// The devices stay until [`Fillers::unplug`], or until the laboratory is tidied.
pub struct Fillers;

impl Fillers {
    /// A small device in every free port.
    pub async fn plug(lab: &Lab<'_>) -> Result<Self> {
        Self::plug_into(lab, "virtio-rng-pci", usize::MAX).await
    }

    /// A balloon in one of them, as KubeVirt's VMs have from their start.
    pub async fn balloon(lab: &Lab<'_>) -> Result<Self> {
        Self::plug_into(lab, "virtio-balloon-pci", 1).await
    }

    async fn plug_into(lab: &Lab<'_>, driver: &str, most: usize) -> Result<Self> {
        let buses = lab.qemu.qmp("query-pci", &json!({})).await?;
        let mut ports = Vec::new();
        for bus in buses.as_array().into_iter().flatten() {
            free_ports(bus.get("devices"), &mut ports);
        }
        ensure!(!ports.is_empty(), "the VM has no free port to fill");
        for port in ports.iter().take(most) {
            let device = json!({"driver": driver, "id": format!("{PREFIX}{port}"), "bus": port});
            lab.qemu.qmp("device_add", &device).await?;
        }
        taken_up(lab).await?;
        Ok(Self)
    }

    pub async fn unplug(self, lab: &Lab<'_>) -> Result<()> {
        remove_all(lab).await
    }
}

/// Waits until the guest has given every filler its addresses: until then QEMU's device
/// list still changes by itself.
async fn taken_up(lab: &Lab<'_>) -> Result<()> {
    let every = Duration::from_millis(500);
    let limit = Duration::from_secs(60);
    wait::until("the guest to take the fillers up", limit, every, || async {
        let all = lab.qemu.pci().await?;
        let waiting: Vec<&str> = all
            .iter()
            .filter(|d| is_filler(d) && d.regions.contains(&-1))
            .map(|d| d.id.as_str())
            .collect();
        Ok(if waiting.is_empty() {
            Probe::Ready(())
        } else {
            Probe::NotYet(format!("{waiting:?}"))
        })
    })
    .await
}

/// Whether a filler is among these devices.
pub(super) fn any(devices: &[PciDevice]) -> bool {
    devices.iter().any(is_filler)
}

fn is_filler(device: &PciDevice) -> bool {
    device.id.starts_with(PREFIX)
}

/// Removes every filler.
pub(super) async fn remove_all(lab: &Lab<'_>) -> Result<()> {
    take_out(lab, "the fillers to leave", is_filler).await
}

/// Takes devices out of the VM; the guest takes part, so each is waited for.
pub(super) async fn take_out(
    lab: &Lab<'_>,
    what: &str,
    which: fn(&PciDevice) -> bool,
) -> Result<()> {
    let every = Duration::from_secs(1);
    // The guest may miss a request while it still takes the device up: a slot's button
    // can be pressed again after some seconds (PCIe 6.7.1.5).
    let again = Duration::from_secs(10);
    let mut asked: Option<std::time::Instant> = None;
    wait::until(what, Duration::from_secs(120), every, || {
        let due = asked.is_none_or(|t| t.elapsed() >= again);
        if due {
            asked = Some(std::time::Instant::now());
        }
        async move {
            let all = lab.qemu.pci().await?;
            let left: Vec<&str> = all
                .iter()
                .filter(|d| which(d))
                .map(|d| d.id.as_str())
                .collect();
            if left.is_empty() {
                return Ok(Probe::Ready(()));
            }
            let mut state = format!("{left:?}");
            if due {
                for id in &left {
                    // "Already in the process of unplug" is no failure.
                    if let Err(e) = lab.qemu.qmp("device_del", &json!({"id": id})).await {
                        state = format!("{state}, {id}: {e:#}");
                    }
                }
            }
            Ok(Probe::NotYet(state))
        }
    })
    .await
}

/// Names of root ports with nothing behind them.
fn free_ports(devices: Option<&Value>, into: &mut Vec<String>) {
    for d in devices.and_then(Value::as_array).into_iter().flatten() {
        let Some(bridge) = d.get("pci_bridge") else {
            continue;
        };
        let behind = bridge.get("devices").and_then(Value::as_array);
        let id = d.get("qdev_id").and_then(Value::as_str).unwrap_or_default();
        if behind.is_none_or(Vec::is_empty) && !id.is_empty() {
            into.push(id.to_owned());
        }
        free_ports(bridge.get("devices"), into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_free_when_nothing_is_behind_it() {
        let devices = json!([
            {"qdev_id": "pci.1", "pci_bridge": {"devices": [{"qdev_id": "net0"}]}},
            {"qdev_id": "pci.2", "pci_bridge": {}},
            {"qdev_id": "pci.3", "pci_bridge": {"devices": []}},
            {"qdev_id": "vga"},
        ]);
        let mut ports = Vec::new();
        free_ports(Some(&devices), &mut ports);
        assert_eq!(ports, ["pci.2", "pci.3"]);
    }
}

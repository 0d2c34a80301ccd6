//! Somebody else who has VFs: a process of L1 that holds their vfio groups open, as a VM
//! that we know nothing of would.

use anyhow::{Context, Result, ensure};

use super::far::sh;
use super::l1;
use super::lab::Lab;

const UNIT: &str = "e2e-hold";

/// The groups are held until [`OthersHold::end`], or until the laboratory is tidied.
pub struct OthersHold {
    /// The VFs that it bound to vfio-pci for that.
    bound: Vec<String>,
}

impl OthersHold {
    /// Holds every VF of the wired PF.
    pub async fn all(lab: &Lab<'_>) -> Result<Self> {
        Self::hold(lab, None).await
    }

    /// Holds every VF of the wired PF but the one at `address`.
    pub async fn all_but(lab: &Lab<'_>, address: &str) -> Result<Self> {
        Self::hold(lab, Some(address)).await
    }

    async fn hold(lab: &Lab<'_>, but: Option<&str>) -> Result<Self> {
        let l1 = &lab.l1;
        let pf = format!("/sys/bus/pci/devices/{}", lab.wired.address);
        let create = format!(
            "if [[ $(<{pf}/sriov_numvfs) == 0 ]]; then echo 0 >{pf}/sriov_drivers_autoprobe; echo 7 >{pf}/sriov_numvfs; fi"
        );
        sh(l1, &create).await?;
        let mut groups = Vec::new();
        let mut bound = Vec::new();
        for vf in l1::pf(l1, &lab.wired.address).await?.vfs {
            if Some(vf.address.as_str()) == but {
                continue;
            }
            let a = &vf.address;
            let bind = format!(
                "echo vfio-pci >/sys/bus/pci/devices/{a}/driver_override
[[ -e /sys/bus/pci/devices/{a}/driver ]] || echo {a} >/sys/bus/pci/drivers_probe
echo >/sys/bus/pci/devices/{a}/driver_override"
            );
            sh(l1, &bind).await?;
            if vf.driver.is_none() {
                bound.push(vf.address.clone());
            }
            groups.push(
                vf.group
                    .with_context(|| format!("{a} has no IOMMU group"))?,
            );
        }
        ensure!(!groups.is_empty(), "there is no VF to hold");
        // The agent has a group open for a moment when it looks whose it is, and
        // the kernel announces to nobody that it let go.
        let opens: Vec<String> = groups
            .iter()
            .map(|g| format!("hold /dev/vfio/{g}"))
            .collect();
        let script = format!(
            "systemctl reset-failed {UNIT} 2>/dev/null
systemd-run -q --unit={UNIT} --service-type=notify --property=NotifyAccess=all \
bash -uc 'hold() {{
  for ((n = 0; n < 50; n++)); do exec {{fd}}<>\"$1\" && return; sleep 0.1; done
  echo \"$1 stays busy\"; exit 1
}}
{}; systemd-notify --ready; exec sleep infinity' || {{ journalctl -u {UNIT} -o cat -n 20 >&2; exit 1; }}",
            opens.join("; ")
        );
        sh(l1, &script).await.context("holding the groups")?;
        Ok(Self { bound })
    }

    /// Lets go, and leaves the VFs as they were.
    pub async fn end(self, lab: &Lab<'_>) -> Result<()> {
        let script = format!(
            "systemctl stop {UNIT}; for a in {}; do echo $a >/sys/bus/pci/drivers/vfio-pci/unbind; done",
            self.bound.join(" ")
        );
        sh(&lab.l1, &script).await?;
        Ok(())
    }
}

//! Somebody else who has VFs: a process of L1 that holds their vfio groups open, or one that
//! uses a device, as a VM that we know nothing of would.

use anyhow::{Context, Result, ensure};

use super::far::sh;
use super::l1;
use super::lab::Lab;

const UNIT: &str = "e2e-hold";

/// The groups are held until [`OthersHold::end`], or until the laboratory is tidied.
pub struct OthersHold {
    vfs: Vec<String>,
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
        let mut vfs = Vec::new();
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
            vfs.push(vf.address.clone());
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
        Ok(Self { vfs, bound })
    }

    /// The VFs that it holds.
    #[must_use]
    pub fn vfs(&self) -> &[String] {
        &self.vfs
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

const USER_UNIT: &str = "e2e-use";

/// Opens `$group` and its device `$vf` as QEMU does, says so, and keeps both. The requests are
/// those of linux/vfio.h: VFIO_GROUP_SET_CONTAINER, VFIO_SET_IOMMU (VFIO_TYPE1_IOMMU) and
/// VFIO_GROUP_GET_DEVICE_FD.
const USE: &str = r#"use Fcntl; my ($group, $vf) = @ARGV;
sysopen(my $c, "/dev/vfio/vfio", O_RDWR) or die "container: $!";
sysopen(my $g, "/dev/vfio/$group", O_RDWR) or die "group: $!";
ioctl($g, 0x3b68, pack("i", fileno $c)) or die "set container: $!";
ioctl($c, 0x3b66, 1) or die "set iommu: $!";
my $d = ioctl($g, 0x3b6a, "$vf\0") or die "device: $!";
system("systemd-notify", "--ready") == 0 or die "notify";
sleep;
"#;

/// A process that uses a VF's device, which the kernel does not take from it.
pub struct DeviceUser(());

impl DeviceUser {
    /// The VF is on vfio-pci and its group is not open.
    pub async fn take(lab: &Lab<'_>, vf: &str, group: u32) -> Result<Self> {
        let script = format!(
            "systemctl reset-failed {USER_UNIT} 2>/dev/null
systemd-run -q --unit={USER_UNIT} --service-type=notify --property=NotifyAccess=all \
perl -e '{USE}' {group} {vf} || {{ journalctl -u {USER_UNIT} -o cat -n 20 >&2; exit 1; }}"
        );
        sh(&lab.l1, &script).await.context("using the device")?;
        Ok(Self(()))
    }

    /// Lets go.
    pub async fn end(self, lab: &Lab<'_>) -> Result<()> {
        let script = format!("systemctl stop {USER_UNIT}");
        sh(&lab.l1, &script).await.map(drop)
    }
}

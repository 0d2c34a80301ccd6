//! QEMU's DEVICE_DELETED events as libvirt hears them, with their time on L1's boot clock,
//! so that they can be compared with the write trace.

use std::time::Duration;

use anyhow::{Context, Result};

use super::far::sh;
use super::lab::Lab;
use crate::wait::{self, Probe};

const UNIT: &str = "e2e-device-deleted";

/// A listener in L1 that notes every event from now on.
pub struct Deletions;

impl Deletions {
    /// Starts listening; returns when libvirt has taken the registration.
    pub async fn listen(lab: &Lab<'_>) -> Result<Self> {
        let l1 = &lab.l1;
        // The monitor line carries QEMU's own time of the event, in its `timestamp`; virsh
        // prints when it heard of it, which is never earlier.
        let virsh = lab.qemu.virsh(&format!(
            "qemu-monitor-event {} --event DEVICE_DELETED --loop --timestamp",
            lab.qemu.domain
        ));
        let script = format!(
            "systemctl reset-failed {UNIT} 2>/dev/null; rm -f /run/{UNIT}
systemd-run -q --unit={UNIT} --property=StandardOutput=truncate:/run/{UNIT} stdbuf -oL {virsh}"
        );
        sh(l1, &script).await?;
        let every = Duration::from_millis(300);
        wait::until("virsh to listen", Duration::from_secs(90), every, || async {
            // Connected: the client holds a socket besides its standard streams, which
            // systemd may have made the journal's.
            let look = format!(
                "pid=$(systemctl show -P MainPID {UNIT}); [[ $pid != 0 ]] || {{ systemctl status {UNIT}; exit 1; }}
for fd in /proc/$pid/fd/*; do (( ${{fd##*/}} > 2 )) && readlink $fd; done | grep -c ^socket: || true"
            );
            let sockets: u32 = sh(l1, &look).await?.parse()?;
            Ok(if sockets >= 1 { Probe::Ready(()) } else { Probe::NotYet("no connection yet".into()) })
        })
        .await?;
        Ok(Self)
    }

    /// When the event for device `id` was heard, in microseconds of L1's boot clock. A little
    /// late rather than early: what came before it in truth may seem to, not the reverse.
    pub async fn of(&self, lab: &Lab<'_>, id: &str) -> Result<u64> {
        let l1 = &lab.l1;
        let what = format!("DEVICE_DELETED of {id}");
        let every = Duration::from_millis(300);
        let line = wait::until(&what, Duration::from_secs(10), every, || async {
            let text = sh(l1, &format!("cat /run/{UNIT}")).await?;
            let found = text
                .lines()
                .find(|l| l.contains(id) && l.contains("\"device\""));
            Ok(found.map_or_else(
                || Probe::NotYet(text.clone()),
                |l| Probe::Ready(l.to_owned()),
            ))
        })
        .await?;
        let stamp = line.split(": event").next().unwrap_or_default();
        // Both clocks read at once; the boot clock runs through suspends, as uptime does.
        let script = format!(
            "now=${{EPOCHREALTIME/./}}; read -r up _ </proc/uptime; up=${{up/./}}0000
then=$(date -d '{stamp}' +%s%6N); echo $((10#$up - (now - then)))"
        );
        let at: i64 = sh(l1, &script)
            .await?
            .parse()
            .with_context(|| line.clone())?;
        sh(l1, &format!("systemctl stop {UNIT}; rm -f /run/{UNIT}")).await?;
        // Uptime counts hundredths of a second.
        Ok(u64::try_from(at.saturating_sub(20_000))?)
    }
}

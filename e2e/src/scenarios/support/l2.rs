//! The far end in the guest: what the VM's own kernel has, and traffic over its VFs. Each
//! VF's interface gets a network namespace of its own, so that several with the same
//! peer do not share routes.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::far::{Shell, sh, sh_within};
use crate::wait::{self, Probe};

/// A VF in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestVf {
    pub address: String,
    pub driver: Option<String>,
    pub interface: Option<String>,
    pub mac: Option<String>,
}

/// Every device of the igb's VF kind that the guest's kernel has. An interface counts once
/// udev is done with it: until then it may be renamed at any moment.
pub async fn vfs(l2: &dyn Shell) -> Result<Vec<GuestVf>> {
    let script = r#"shopt -s nullglob
for d in /sys/bus/pci/devices/*; do
    [[ $(<$d/vendor) == 0x8086 && $(<$d/device) == 0x10ca ]] || continue
    name=-; mac=-
    driver=$(readlink $d/driver) || driver=-
    # One that is just going has no address any more: it is not there.
    for n in $d/net/*; do
        m=$(<$n/address); [[ $m && -e /run/udev/data/n$(<$n/ifindex) ]] && name=${n##*/} mac=$m
    done 2>/dev/null
    echo "${d##*/} ${driver##*/} $name $mac"
done"#;
    read_vfs(&sh(l2, script).await?)
}

fn read_vfs(text: &str) -> Result<Vec<GuestVf>> {
    let some = |s: &str| (s != "-").then(|| s.to_owned());
    text.lines()
        .map(|line| {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            match words.as_slice() {
                [address, driver, interface, mac] => Ok(GuestVf {
                    address: (*address).to_owned(),
                    driver: some(driver),
                    interface: some(interface),
                    mac: some(mac),
                }),
                _ => bail!("not a line about a device: {line:?}"),
            }
        })
        .collect()
}

/// The VF at `address`, once the guest's driver has it: the claim is Ready when the guest
/// configured the device, and its driver binds a little later.
pub async fn bound(l2: &dyn Shell, address: &str) -> Result<GuestVf> {
    let what = format!("the guest's driver to bind {address}");
    let limit = Duration::from_secs(60);
    wait::until(&what, limit, Duration::from_millis(500), || async {
        let all = vfs(l2).await?;
        let found = all
            .iter()
            .find(|v| v.address == address && v.interface.is_some());
        Ok(found.map_or_else(
            || Probe::NotYet(format!("{all:?}")),
            |v| Probe::Ready(v.clone()),
        ))
    })
    .await
}

/// Waits until the guest's kernel has no device at `address`.
pub async fn gone(l2: &dyn Shell, address: &str) -> Result<()> {
    let what = format!("{address} to leave the guest");
    let limit = Duration::from_secs(60);
    wait::until(&what, limit, Duration::from_millis(500), || async {
        let all = vfs(l2).await?;
        let there = all.iter().any(|v| v.address == address);
        Ok(if there {
            Probe::NotYet(format!("{all:?}"))
        } else {
            Probe::Ready(())
        })
    })
    .await
}

/// A namespace of the guest in which one VF's interface is, with an address.
#[derive(Clone, Debug)]
pub struct Net {
    name: String,
    pub interface: String,
}

impl Net {
    /// Moves the interface whose hardware address is `mac` into namespace `name` and gives
    /// it `address` (with a prefix).
    pub async fn open(l2: &dyn Shell, name: &str, mac: &str, address: &str) -> Result<Self> {
        let found = vfs(l2).await?;
        let vf = found.iter().find(|v| v.mac.as_deref() == Some(mac));
        let vf = vf.with_context(|| format!("the guest has no VF with MAC {mac}: {found:?}"))?;
        let interface = vf
            .interface
            .clone()
            .with_context(|| format!("{} has no network interface", vf.address))?;
        let script = format!(
            "ip netns add {name}; ip link set {interface} netns {name}; n='ip -n {name}'
$n link set lo up; $n address add {address} dev {interface}; $n link set {interface} up"
        );
        sh(l2, &script).await?;
        Ok(Self {
            name: name.to_owned(),
            interface,
        })
    }

    /// Pings `peer` until it has answered `count` times; an error if it does not in `limit`.
    pub async fn ping(
        &self,
        l2: &dyn Shell,
        peer: &str,
        count: u32,
        limit: Duration,
    ) -> Result<()> {
        let script = format!(
            "ip netns exec {} ping -q -i 0.3 -c {count} -w {} {peer}",
            self.name,
            limit.as_secs()
        );
        sh_within(l2, &script, limit + Duration::from_secs(20)).await?;
        Ok(())
    }

    /// The guest's own change of its interface's hardware address; an error says what its
    /// kernel answered.
    pub async fn set_mac(&self, l2: &dyn Shell, mac: &str) -> Result<()> {
        let script = format!(
            "ip -n {} link set {} address {mac}",
            self.name, self.interface
        );
        sh(l2, &script).await?;
        Ok(())
    }

    /// Begins a ping that goes on by itself, noting every answer.
    pub async fn ping_on(&self, l2: &dyn Shell, peer: &str) -> Result<Steady> {
        let unit = format!("e2e-ping-{}", self.name);
        let script = format!(
            "systemctl reset-failed {unit} 2>/dev/null; rm -f /run/{unit}
systemd-run -q --unit={unit} --property=StandardOutput=truncate:/run/{unit} \
ip netns exec {} ping -D -O -i 0.5 {peer}",
            self.name
        );
        sh(l2, &script).await?;
        Ok(Steady { unit })
    }

    /// Gives the interface back and removes the namespace.
    pub async fn close(&self, l2: &dyn Shell) -> Result<()> {
        sh(l2, &format!("ip netns del {}", self.name)).await?;
        Ok(())
    }
}

/// A ping that runs until it is stopped.
#[derive(Clone, Debug)]
pub struct Steady {
    unit: String,
}

/// What a steady ping saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answers {
    pub received: u64,
    /// Requests whose answer did not come before the next request (`ping -O`).
    pub missed: u64,
}

impl Steady {
    pub async fn answers(&self, l2: &dyn Shell) -> Result<Answers> {
        let text = sh(l2, &format!("cat /run/{}", self.unit)).await?;
        Ok(read_answers(&text))
    }

    /// Ends it and says what it saw in all.
    pub async fn stop(&self, l2: &dyn Shell) -> Result<Answers> {
        let answers = self.answers(l2).await?;
        sh(
            l2,
            &format!("systemctl stop {0}; rm -f /run/{0}", self.unit),
        )
        .await?;
        Ok(answers)
    }
}

fn read_answers(text: &str) -> Answers {
    let count = |what: &str| {
        let n = text.lines().filter(|l| l.contains(what)).count();
        u64::try_from(n).unwrap_or(u64::MAX)
    };
    Answers {
        received: count(" bytes from "),
        missed: count("no answer yet"),
    }
}

/// What must not change while a VM goes on running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    pub boot_id: String,
    /// Seconds since its boot, rounded down.
    pub uptime: u64,
}

/// Waits for the VM to answer: one that was restarted does not while it boots.
pub async fn awake(l2: &dyn Shell) -> Result<()> {
    let limit = Duration::from_secs(180);
    wait::until(
        "the VM to answer",
        limit,
        Duration::from_secs(1),
        || async {
            let answer = l2.said("true", Duration::from_secs(10)).await;
            Ok(Probe::of(answer.map(|_| Some(())), "silent"))
        },
    )
    .await
}

pub async fn life(l2: &dyn Shell) -> Result<Life> {
    let text = sh(
        l2,
        "read -r up _ </proc/uptime; echo $(</proc/sys/kernel/random/boot_id) ${up%.*}",
    )
    .await?;
    let (boot_id, uptime) = text.split_once(' ').context("no boot id and uptime")?;
    Ok(Life {
        boot_id: boot_id.to_owned(),
        uptime: uptime.parse()?,
    })
}

/// A process of the guest that counts; how far it is.
#[derive(Clone, Debug)]
pub struct Counter {
    unit: String,
}

impl Counter {
    /// Starts one: bash alone, one step a fifth of a second.
    pub async fn start(l2: &dyn Shell, name: &str) -> Result<Self> {
        let unit = format!("e2e-counter-{name}");
        let script = format!(
            "systemctl reset-failed {unit} 2>/dev/null; rm -f /run/{unit}
systemd-run -q --unit={unit} bash -c 'mkfifo /run/{unit}.pipe; exec 3<>/run/{unit}.pipe
while :; do echo $((++n)) >/run/{unit}; read -t 0.2 -u 3; done'"
        );
        sh(l2, &script).await?;
        Ok(Self { unit })
    }

    /// Process id and count; the same process as long as the id stays.
    pub async fn read(&self, l2: &dyn Shell) -> Result<(u32, u64)> {
        let script = format!(
            "systemctl show -P MainPID {0}; cat /run/{0} 2>/dev/null || echo 0",
            self.unit
        );
        let text = sh(l2, &script).await?;
        let (pid, count) = text.split_once('\n').context("no pid and count")?;
        // The file is empty for a moment at each step.
        Ok((pid.trim().parse()?, count.trim().parse().unwrap_or(0)))
    }

    pub async fn stop(&self, l2: &dyn Shell) -> Result<()> {
        sh(
            l2,
            &format!(
                "systemctl stop {0}; rm -f /run/{0} /run/{0}.pipe",
                self.unit
            ),
        )
        .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_lines() {
        let all =
            read_vfs("0000:05:00.0 igbvf enp5s0 02:00:00:00:00:01\n0000:06:00.0 - - -").unwrap();
        assert_eq!(all[0].driver.as_deref(), Some("igbvf"));
        assert_eq!(all[1].mac, None);
        assert!(read_vfs("bash: x").is_err());
        assert_eq!(read_vfs("").unwrap(), []);
    }

    #[test]
    fn answers_of_ping() {
        let text = "PING 10.9.0.1\n[1.2] 64 bytes from 10.9.0.1: icmp_seq=1 ttl=64 time=2 ms\n\
            [1.7] no answer yet for icmp_seq=2\n[2.2] 64 bytes from 10.9.0.1: icmp_seq=3\n";
        assert_eq!(
            read_answers(text),
            Answers {
                received: 2,
                missed: 1
            }
        );
    }
}

//! The record that L1 keeps, from boot on, of every write to sriov_numvfs and of every
//! driver that was bound to or released from a device (files/harness-trace writes it).
//! Pure: text in, events out.

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub enum TraceKind {
    /// A value was written to the device's sriov_numvfs.
    NumVfs { device: String, value: String },
    /// A device's address was written to drivers_probe.
    Probe { device: String },
    /// A device's address was written to a driver's bind file.
    Bind { driver: String, device: String },
    /// A device's address was written to a driver's unbind file.
    Unbind { driver: String, device: String },
    /// The kernel has bound a driver, for whatever reason.
    Bound { driver: String, device: String },
    /// The kernel releases a device from its driver; none if it had none.
    Released {
        driver: Option<String>,
        device: String,
    },
}

/// One line of the trace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TraceEvent {
    /// Microseconds since L1's boot (the kernel's boot clock).
    pub at_us: u64,
    /// Name and thread id of who did it.
    pub task: String,
    pub pid: u32,
    #[serde(flatten)]
    pub what: TraceKind,
}

/// Events of a whole trace, in the kernel's order.
pub fn parse(text: &str) -> Result<Vec<TraceEvent>> {
    let mut events = Vec::new();
    let mut rest = text;
    // A value written with its newline is printed with it, so an event may span lines:
    // it ends where its quotes are even.
    while !rest.is_empty() {
        let end = event_end(rest);
        let (line, next) = rest.split_at(end);
        rest = next;
        if line.trim().is_empty() || line.starts_with("CPU:") || line.contains("LOST") {
            if line.contains("LOST") {
                bail!("the trace lost events: {}", line.trim());
            }
            continue;
        }
        events.push(event(line).with_context(|| format!("trace line {line:?}"))?);
    }
    Ok(events)
}

fn event_end(text: &str) -> usize {
    let mut quoted = false;
    for (i, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '\n' if !quoted => return i + 1,
            _ => {}
        }
    }
    text.len()
}

/// `  bash-2817  [001] .....   191.972732: numvfs: (fn+0x4/0x180) device="…" value="7\n"`
fn event(line: &str) -> Result<TraceEvent> {
    let (who, tail) = line.split_once(" [").context("no cpu")?;
    let (task, pid) = who.trim().rsplit_once('-').context("no thread id")?;
    let (head, fields) = tail.split_once("(").context("no probe")?;
    let mut words = head.split_whitespace().rev();
    let name = words.next().context("no name")?.trim_end_matches(':');
    let at = words.next().context("no time")?.trim_end_matches(':');
    let (seconds, micros) = at.split_once('.').context("time has no fraction")?;
    let field = |key: &str| -> Result<String> {
        optional(fields, key)?.with_context(|| format!("no {key}"))
    };
    let what = match name {
        "numvfs" => TraceKind::NumVfs {
            device: field("device")?,
            value: field("value")?,
        },
        "probe" => TraceKind::Probe {
            device: field("value")?,
        },
        "bind" => TraceKind::Bind {
            driver: field("driver")?,
            device: field("value")?,
        },
        "unbind" => TraceKind::Unbind {
            driver: field("driver")?,
            device: field("value")?,
        },
        "bound" => TraceKind::Bound {
            driver: field("driver")?,
            device: field("device")?,
        },
        "released" => TraceKind::Released {
            driver: optional(fields, "driver")?,
            device: field("device")?,
        },
        other => bail!("unknown event {other}"),
    };
    Ok(TraceEvent {
        at_us: seconds.parse::<u64>()? * 1_000_000 + micros.parse::<u64>()?,
        task: task.to_owned(),
        pid: pid.parse()?,
        what,
    })
}

/// A field's value; a pointer that was null prints as `(fault)` and is none.
fn optional(fields: &str, key: &str) -> Result<Option<String>> {
    let Some((_, value)) = fields.split_once(&format!(" {key}=")) else {
        return Ok(None);
    };
    if value.starts_with("(fault)") {
        return Ok(None);
    }
    let value = value.strip_prefix('"').context("value is not quoted")?;
    let (value, _) = value.split_once('"').context("value does not end")?;
    Ok(Some(value.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_real_kernel() {
        let text = "            bash-2817    [001] .N...   191.972732: numvfs: (sriov_numvfs_store+0x4/0x180) device=\"0000:01:00.0\" value=\"7\n\"\n            \
            vf-node-x-2817    [000] .....   196.877299: bound: (driver_bound+0x0/0xb0) device=\"0000:01:10.0\" driver=\"vfio-pci\"\n            \
            bash-2817    [000] .....   197.191909: released: (device_release_driver+0x4/0x20) device=\"0000:01:10.0\" driver=(fault)\n";
        let events = parse(text).unwrap();
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].at_us, 191_972_732);
        assert_eq!(
            events[0].what,
            TraceKind::NumVfs {
                device: "0000:01:00.0".into(),
                value: "7".into()
            }
        );
        assert_eq!(events[1].task, "vf-node-x");
        assert_eq!(
            events[2].what,
            TraceKind::Released {
                driver: None,
                device: "0000:01:10.0".into()
            }
        );
    }

    #[test]
    fn lost_or_unknown_lines_are_errors() {
        assert!(parse("CPU:0 [LOST 5 EVENTS]\n").is_err());
        assert!(parse(" a-1 [000] ..... 1.000001: other: (f+0x0/0x1) device=\"x\"\n").is_err());
    }
}

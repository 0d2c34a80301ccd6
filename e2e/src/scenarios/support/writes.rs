//! What the write trace of L1 says happened between two looks at it.

use anyhow::{Context, Result};

use super::site::{TraceEvent, TraceKind};

/// Events that `after` has and `before` had not.
pub fn between<'t>(before: &[TraceEvent], after: &'t [TraceEvent]) -> Result<&'t [TraceEvent]> {
    after
        .strip_prefix(before)
        .context("the trace began anew: did L1 boot again?")
}

/// The values written to sriov_numvfs of the PF at `address`.
pub fn num_vfs(before: &[TraceEvent], after: &[TraceEvent], address: &str) -> Result<Vec<String>> {
    let written = between(before, after)?
        .iter()
        .filter_map(|e| match &e.what {
            TraceKind::NumVfs { device, value } if device == address => {
                Some(value.trim().to_owned())
            }
            _ => None,
        });
    Ok(written.collect())
}

/// Events about the device at `address`.
pub fn about(
    before: &[TraceEvent],
    after: &[TraceEvent],
    address: &str,
) -> Result<Vec<TraceEvent>> {
    let all = between(before, after)?.iter();
    Ok(all
        .filter(|e| device(&e.what) == address)
        .cloned()
        .collect())
}

fn device(what: &TraceKind) -> &str {
    match what {
        TraceKind::NumVfs { device, .. }
        | TraceKind::Probe { device }
        | TraceKind::Bind { device, .. }
        | TraceKind::Unbind { device, .. }
        | TraceKind::Bound { device, .. }
        | TraceKind::Released { device, .. } => device,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(at_us: u64, value: &str) -> TraceEvent {
        let what = TraceKind::NumVfs {
            device: "0000:01:00.0".into(),
            value: value.into(),
        };
        TraceEvent {
            at_us,
            task: "a".into(),
            pid: 1,
            what,
        }
    }

    #[test]
    fn only_what_is_new_counts() {
        let before = [write(1, "7")];
        let after = [write(1, "7"), write(2, "0")];
        assert_eq!(num_vfs(&before, &after, "0000:01:00.0").unwrap(), ["0"]);
        assert!(num_vfs(&before, &after, "0000:02:00.0").unwrap().is_empty());
        assert_eq!(about(&before, &after, "0000:01:00.0").unwrap().len(), 1);
        assert!(between(&after, &before).is_err());
    }
}

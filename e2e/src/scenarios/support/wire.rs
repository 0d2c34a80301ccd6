//! The far end of the wire: which frames the switch saw, by source and tag.

use anyhow::{Result, bail};

use super::lab::Lab;
use super::site::{PF_MACS, Stats};

/// Frames of one source: how many came with each tag, and how many were answered.
pub fn tags(stats: &Stats, mac: &str) -> Vec<(Option<u16>, u64, u64)> {
    stats
        .counts
        .iter()
        .filter(|c| c.kind.source == mac)
        .map(|c| (c.kind.vlan, c.frames, c.answered))
        .collect()
}

/// An error unless, since the switch's last reset, each of `sources` sent frames, all of
/// them with its tag, some of them answered, and nobody else but the PF itself sent any.
pub async fn only(lab: &Lab<'_>, sources: &[(&str, Option<u16>)]) -> Result<()> {
    check(&lab.switch.stats().await?, sources)
}

fn check(stats: &Stats, sources: &[(&str, Option<u16>)]) -> Result<()> {
    let [pf, ..] = PF_MACS;
    for c in &stats.counts {
        let source = c.kind.source.as_str();
        if source == pf {
            continue;
        }
        match sources.iter().find(|(mac, _)| *mac == source) {
            None => bail!("the switch saw a frame of nobody's: {c:?}"),
            Some((_, tag)) if *tag != c.kind.vlan => {
                bail!("{source} is to be tagged {tag:?}, and the switch saw {c:?}")
            }
            Some(_) => {}
        }
    }
    for (mac, _) in sources {
        if !tags(stats, mac)
            .iter()
            .any(|(_, _, answered)| *answered > 0)
        {
            bail!(
                "the switch answered no frame of {mac}; it saw {:?}",
                stats.counts
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(frames: &[(&str, Option<u16>, u64)]) -> Stats {
        let counts: Vec<_> = frames
            .iter()
            .map(|(source, vlan, answered)| {
                serde_json::json!({
                    "source": source, "destination": "ff:ff:ff:ff:ff:ff", "vlan": vlan,
                    "priority": null, "etherType": 2048, "frames": 3, "answered": answered,
                })
            })
            .collect();
        serde_json::from_value(serde_json::json!({
            "counts": counts, "last": [], "malformed": 0, "sendErrors": 0,
        }))
        .unwrap()
    }

    #[test]
    fn tag_source_and_answers_are_all_checked() {
        let a = "02:00:00:00:00:0a";
        let want: &[_] = &[(a, Some(100))];
        check(&stats(&[(a, Some(100), 1)]), want).unwrap();
        assert!(check(&stats(&[(a, None, 1)]), want).is_err());
        assert!(check(&stats(&[(a, Some(100), 1), (a, None, 0)]), want).is_err());
        assert!(check(&stats(&[(a, Some(100), 0)]), want).is_err());
        assert!(check(&stats(&[]), want).is_err());
        assert!(
            check(
                &stats(&[(a, Some(100), 1), ("02:00:00:00:00:0b", None, 0)]),
                want
            )
            .is_err()
        );
        check(&stats(&[(a, Some(100), 1), (PF_MACS[0], None, 0)]), want).unwrap();
    }
}

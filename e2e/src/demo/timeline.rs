//! Moments with a name, printed as they become known and kept for a table.

use std::sync::{Arc, Mutex, PoisonError};

use crate::progress;
use crate::scenarios::support::far::now_us;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Moment {
    /// Microseconds since the epoch, by this machine's clock.
    at: i64,
    what: String,
    /// Where it was seen.
    by: &'static str,
    detail: String,
}

#[derive(Debug, Default)]
struct Chapters {
    /// Title and moments, in the order they were begun.
    all: Vec<(String, i64, Vec<Moment>)>,
}

/// Shared by everyone who looks.
#[derive(Clone, Debug, Default)]
pub(super) struct Timeline {
    inner: Arc<Mutex<Chapters>>,
}

impl Timeline {
    fn locked(&self) -> std::sync::MutexGuard<'_, Chapters> {
        // A panicking writer leaves the list whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a chapter: times in it count from now.
    pub(super) fn chapter(&self, title: &str) {
        progress::line(&format!("--- {title}"));
        self.locked()
            .all
            .push((title.to_owned(), now_us(), Vec::new()));
    }

    /// Something that is seen now.
    pub(super) fn now(&self, what: &str, by: &'static str, detail: impl Into<String>) {
        self.at(now_us(), what, by, detail);
    }

    /// Something that was at `at`, by this machine's clock.
    pub(super) fn at(&self, at: i64, what: &str, by: &'static str, detail: impl Into<String>) {
        let moment = Moment {
            at,
            what: what.to_owned(),
            by,
            detail: detail.into(),
        };
        let mut chapters = self.locked();
        if let Some((_, begun, moments)) = chapters.all.last_mut() {
            let since = seconds(at - *begun);
            progress::line(&format!("{since:>8}  {what:<28} {}", moment.detail));
            moments.push(moment);
        }
    }

    /// The table: every moment in the order of time, with the time since the moment before.
    pub(super) fn table(&self) -> String {
        let mut out = String::new();
        for (title, begun, moments) in &self.locked().all {
            let mut sorted = moments.clone();
            sorted.sort_by_key(|m| m.at);
            out.push_str(&format!("{title}\n"));
            out.push_str(&format!(
                "{:>9} {:>9}  {:<28} {:<12} {}\n",
                "at", "took", "what", "seen by", ""
            ));
            let mut last = *begun;
            for m in &sorted {
                out.push_str(&format!(
                    "{:>9} {:>9}  {:<28} {:<12} {}\n",
                    seconds(m.at - begun),
                    seconds(m.at - last),
                    m.what,
                    m.by,
                    m.detail
                ));
                last = m.at;
            }
            out.push('\n');
        }
        out
    }
}

fn seconds(us: i64) -> String {
    let ms = us.div_euclid(1000);
    let sign = if ms < 0 { "-" } else { "" };
    format!("{sign}{}.{:03} s", ms.abs() / 1000, ms.abs() % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_time() {
        let t = Timeline::default();
        t.chapter("up");
        let begun = t.locked().all[0].1;
        t.at(begun + 2_500_000, "second", "kernel", "");
        t.at(begun + 1_000_000, "first", "API", "x");
        let table = t.table();
        let lines: Vec<&str> = table.lines().collect();
        assert!(
            lines[2].contains("first") && lines[2].contains("1.000 s"),
            "{table}"
        );
        assert!(
            lines[3].contains("second") && lines[3].contains("1.500 s"),
            "{table}"
        );
        assert!(
            table.lines().all(|l| l == l.trim_end() || l.ends_with(' ')),
            "{table}"
        );
    }

    #[test]
    fn seconds_have_a_sign() {
        assert_eq!(seconds(-1_500), "-0.002 s");
        assert_eq!(seconds(61_250_000), "61.250 s");
    }
}

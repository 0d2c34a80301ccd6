//! Runs the tests: cargo's own first, then the scenarios, and counts them as one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::context::DataCentre;
use crate::exec::Cmd;
use crate::machine::Pulse;
use crate::paths::Paths;
use crate::progress::{self, clock};
use crate::scenarios::Scenario;
use crate::{debian, interrupt, tools};

/// How many tests went which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: u64,
    pub failed: u64,
}

impl Count {
    /// Both counts added.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
        }
    }

    /// The summary line.
    #[must_use]
    pub fn line(self) -> String {
        format!("{} passed, {} failed", self.passed, self.failed)
    }
}

/// Longest the whole of cargo's tests may take, compilation included.
const UNIT: Duration = Duration::from_secs(60 * 60);

/// The cargo that runs us, else the one of `PATH`.
pub(crate) fn cargo() -> Cmd {
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// A package whose tests wait rather than compute (looks of a minute apart): they run beside
/// all others.
const WAITS: &str = "guest-syncer";

/// Runs `cargo test` of the workspace with the API server's programs at hand.
pub fn unit(paths: &Paths) -> Result<Count> {
    // The monitor's tests talk to a real QEMU, the netlink tests use ip, the initramfs's cpio,
    // those of the mutants git.
    debian::ensure(paths, &["iproute2", "qemu-system-x86", "cpio", "git"])?;
    let most = ["--workspace", "--exclude", WAITS];
    let rest = ["--package", WAITS];
    let count = progress::step("unit and API-server tests (cargo test --workspace)", |_| {
        // First, so that neither waits for the other's compiler.
        for which in [&most[..], &rest[..]] {
            let built = tests(paths, "cargo-test-build", &[which, &["--no-run"]].concat())?;
            if !built.status.success() {
                return Ok(built.count());
            }
        }
        let (most, rest) = std::thread::scope(|scope| {
            let beside = scope.spawn(|| tests(paths, "cargo-test-waiting", &rest));
            let most = tests(paths, "cargo-test", &most);
            (most, beside.join())
        });
        let rest = rest.map_err(|_| anyhow::anyhow!("the thread of {WAITS}'s tests panicked"))?;
        Ok::<_, anyhow::Error>(most?.count().and(rest?.count()))
    })?;
    anyhow::ensure!(count != Count::default(), "cargo test ran nothing");
    progress::line(&format!("cargo's tests: {}", count.line()));
    Ok(count)
}

/// What a `cargo test` did.
struct Tested {
    status: std::process::ExitStatus,
    seen: Seen,
    log: PathBuf,
    stderr: String,
}

fn tests(paths: &Paths, log: &str, which: &[&str]) -> Result<Tested> {
    let log = paths.run_logs().join(format!("{log}.log"));
    let out = cargo()
        .args(["test", "--no-fail-fast", "--color=never"])
        .args(which)
        .cwd(paths.source())
        .env("KUBEBUILDER_ASSETS", tools::assets(paths))
        .stdout_file(&log)
        .timeout(UNIT)
        .status()?;
    let text = std::fs::read_to_string(&log).with_context(|| log.display().to_string())?;
    Ok(Tested {
        status: out.status,
        seen: read_libtest(&text),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        log,
    })
}

impl Tested {
    /// Its tests; what failed is said.
    fn count(self) -> Count {
        for name in &self.seen.failures {
            progress::line(&format!("FAILED {name}"));
        }
        if self.seen.ignored > 0 {
            progress::line(&format!(
                "{} tests are ignored: they count as failed",
                self.seen.ignored
            ));
        }
        let mut count = self.seen.count;
        count.failed += self.seen.ignored;
        if !self.status.success() {
            let log = self.log.display();
            progress::line(&format!("cargo test {}; see {log}", self.status));
            if count.failed == 0 {
                // It did not compile, or a test program died before it could count.
                count.failed = 1;
                progress::line(&last_lines(&self.stderr, 30));
            }
        }
        count
    }
}

fn last_lines(text: &str, n: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(n)..)
        .unwrap_or_default()
        .join("\n")
}

/// What libtest's output says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) count: Count,
    ignored: u64,
    pub(crate) failures: Vec<String>,
}

/// Adds up the `test result:` lines; every test program ends with one.
pub(crate) fn read_libtest(text: &str) -> Seen {
    let mut seen = Seen::default();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("test result: ") {
            for part in rest.split([';', '.']) {
                let mut words = part.split_ascii_whitespace();
                let n = words.next().and_then(|w| w.parse::<u64>().ok());
                match (n, words.next()) {
                    (Some(n), Some("passed")) => seen.count.passed += n,
                    (Some(n), Some("failed")) => seen.count.failed += n,
                    (Some(n), Some("ignored")) => seen.ignored += n,
                    _ => {}
                }
            }
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|l| l.strip_suffix(" ... FAILED"))
        {
            seen.failures.push(name.to_owned());
        }
    }
    seen
}

/// How a row of scenarios ended.
#[derive(Debug)]
pub struct Ran {
    pub count: Count,
    /// What showed that an emulated machine was lost, and the number of the scenario that met
    /// it: neither that one nor those after it are counted.
    pub lost: Option<(usize, String)>,
}

/// Runs `scenarios` one after another; a failed one does not stop the others, unless a machine
/// was lost under it. Without `pulse` there are no machines.
pub async fn scenarios(
    dc: &DataCentre,
    scenarios: &[Scenario],
    pulse: Option<&Pulse>,
) -> Result<Ran> {
    let mut count = Count::default();
    for (number, s) in scenarios.iter().enumerate() {
        let begun = Instant::now();
        let step = progress::Step::begin(&format!("{}: {}", s.name, s.shows));
        let result = tokio::select! {
            r = tokio::time::timeout(s.when.limit(), (s.run)(dc)) => r
                .unwrap_or_else(|_| Err(anyhow::anyhow!("did not end within {:?}", s.when.limit()))),
            stop = interrupt::wait() => return Err(stop.into()),
        };
        let took = clock(begun.elapsed());
        let Err(e) = result else {
            step.done();
            println!("ok      {} ({took})", s.name);
            count.passed += 1;
            continue;
        };
        drop(step);
        if let Some(pulse) = pulse
            && let Some(seen) = pulse.lost(dc).await
        {
            println!("LOST    {} ({took}): {seen}; what it met: {e:#}", s.name);
            let lost = Some((number, seen));
            return Ok(Ran { count, lost });
        }
        println!("FAILED  {} ({took}): {e:#}", s.name);
        count.failed += 1;
    }
    Ok(Ran { count, lost: None })
}

/// The last lines of a run: where the logs are if something failed, then the counts.
pub fn summary(count: Count, logs: &Path) {
    if count.failed > 0 {
        println!("logs of every part: {}", logs.display());
    }
    println!("{}", count.line());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_up_every_program_and_names_what_failed() {
        let text = "running 2 tests\ntest a::b ... ok\ntest a::c ... FAILED\n\
            test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n\
            test result: ok. 40 passed; 0 failed; 2 ignored; 0 measured; 7 filtered out; finished in 1.00s\n";
        let seen = read_libtest(text);
        assert_eq!(
            seen.count,
            Count {
                passed: 41,
                failed: 1
            }
        );
        assert_eq!(seen.ignored, 2);
        assert_eq!(seen.failures, ["a::c"]);
    }

    #[test]
    fn summary_line() {
        assert_eq!(
            Count {
                passed: 3,
                failed: 0
            }
            .line(),
            "3 passed, 0 failed"
        );
    }
}

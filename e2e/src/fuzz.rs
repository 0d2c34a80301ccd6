//! `cargo e2e fuzz`: compiles the room `fuzz` with libFuzzer and with counters in the workspace's
//! own crates, and runs its targets from the kept inputs. Works below the run's log folder; the
//! checkout changes only when new inputs are to be kept.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::exec::{Cmd, Output};
use crate::paths::Paths;
use crate::runner::{Count, cargo};
use crate::{debian, interrupt, progress};

/// libFuzzer's own part is C++ and is compiled once; the rest is the workspace.
const BUILD: Duration = Duration::from_secs(30 * 60);
/// A minimisation runs each input once.
const MERGE: Duration = Duration::from_secs(30 * 60);
/// One input that takes longer is a finding (libFuzzer's `-timeout`), in seconds.
const SLOW: u64 = 20;

/// How many new inputs one run keeps for a target: the checkout stays small.
const MOST_ADDED: usize = 8;

/// What is to be run.
#[derive(Debug)]
pub struct Wish<'a> {
    /// Names of targets; all if none.
    pub targets: &'a [String],
    pub minutes: f64,
    /// Add what is new to the kept inputs, minimised.
    pub keep: bool,
}

/// Runs the targets, as many at once as there are cores. Counts one as failed when it found
/// something.
pub fn run(paths: &Paths, wish: &Wish<'_>) -> Result<Count> {
    let seconds = Duration::try_from_secs_f64(wish.minutes * 60.0).context("--minutes")?;
    ensure!(seconds >= Duration::from_secs(1), "--minutes is too short");
    let corpus = paths.source().join("fuzz/corpus");
    let targets = matching(&names(&corpus)?, wish.targets)?;
    // libFuzzer is compiled from C++.
    debian::ensure(paths, &["g++"])?;
    let program = progress::step("compiling the fuzzers", |_| build(paths))?;
    let fuzzer = Fuzzer {
        program: &program,
        corpus: &corpus,
        work: paths.run_logs(),
        seconds,
    };
    let queue = Mutex::new(VecDeque::from(targets));
    let next = || {
        queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    let worker = || -> Result<Count> {
        let mut count = Count::default();
        while let Some(target) = next() {
            count = count.and(fuzzer.run(&target, wish.keep)?);
        }
        Ok(count)
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_fold(Count::default(), |count, w| {
            let one = w.join();
            let one = one.map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            Ok(count.and(one?))
        })
    })
}

/// The targets: each has a folder of kept inputs.
fn names(corpus: &Path) -> Result<Vec<String>> {
    let listed = std::fs::read_dir(corpus).with_context(|| corpus.display().to_string())?;
    let mut names = Vec::new();
    for entry in listed {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn matching(all: &[String], wanted: &[String]) -> Result<Vec<String>> {
    if wanted.is_empty() {
        return Ok(all.to_vec());
    }
    for name in wanted {
        ensure!(
            all.contains(name),
            "there is no target {name}; there are {}",
            all.join(", ")
        );
    }
    Ok(wanted.to_vec())
}

/// Compiles, and answers with the program in a place where no later build replaces it.
fn build(paths: &Paths) -> Result<PathBuf> {
    let out = cargo()
        .args(["build", "--locked", "--message-format=json"])
        .args(["--package", "fuzz", "--features", "libfuzzer"])
        // The workspace's crates alone: dependencies stay those of ordinary builds.
        .env(
            "RUSTC_WORKSPACE_WRAPPER",
            paths.source().join("fuzz/coverage.sh"),
        )
        .cwd(paths.source())
        .timeout(BUILD)
        .run()?;
    let built = executable(&out.text()).context("cargo names no program of the room fuzz")?;
    let program = paths.run_logs().join("fuzz");
    std::fs::copy(&built, &program).with_context(|| built.display().to_string())?;
    Ok(program)
}

#[derive(Deserialize)]
struct Artifact {
    executable: Option<PathBuf>,
    target: ArtifactTarget,
}

#[derive(Deserialize)]
struct ArtifactTarget {
    name: String,
}

/// The program among cargo's messages.
fn executable(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Artifact>(line).ok())
        .filter(|artifact| artifact.target.name == "fuzz")
        .find_map(|artifact| artifact.executable)
}

struct Fuzzer<'a> {
    program: &'a Path,
    corpus: &'a Path,
    work: &'a Path,
    seconds: Duration,
}

impl Fuzzer<'_> {
    fn libfuzzer(&self, target: &str) -> Cmd {
        Cmd::new(self.program)
            .env("VF_FUZZ_TARGET", target)
            .args([&format!("-timeout={SLOW}"), "-rss_limit_mb=3000"])
    }

    fn run(&self, target: &str, keep: bool) -> Result<Count> {
        let kept = self.corpus.join(target);
        let new = self.work.join(format!("{target}-new"));
        let crashes = self.work.join(format!("{target}-found"));
        for folder in [&new, &crashes] {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let step = progress::Step::begin(&format!("fuzzing {target}"));
        let out = self
            .libfuzzer(target)
            .arg(format!("-max_total_time={}", self.seconds.as_secs()))
            .arg("-print_final_stats=1")
            .arg(format!("-artifact_prefix={}/", crashes.display()))
            .args([&new, &kept])
            .timeout(self.seconds + Duration::from_secs(120))
            .status()?;
        let report = Report::read(&String::from_utf8_lossy(&out.stderr));
        if let Some(found) = names(&crashes)?.first() {
            drop(step);
            said(target, &crashes.join(found), &out);
            return Ok(Count {
                passed: 0,
                failed: 1,
            });
        }
        ensure!(
            out.status.success(),
            "{target} {}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr)
        );
        step.done();
        println!("ok      {target}: {report}");
        if keep {
            self.keep(target, &kept, &new)?;
        }
        Ok(Count {
            passed: 1,
            failed: 0,
        })
    }

    /// Adds to the kept inputs a few new ones: those that reach most of what none of them does.
    fn keep(&self, target: &str, kept: &Path, new: &Path) -> Result<()> {
        interrupt::check()?;
        let merged = self.work.join(format!("{target}-merged"));
        std::fs::create_dir_all(&merged)?;
        let before = names(kept)?;
        for name in &before {
            std::fs::copy(kept.join(name), merged.join(name))?;
        }
        // By what is reached, not by how often: else hundreds would be new.
        self.libfuzzer(target)
            .args(["-set_cover_merge=1", "-use_counters=0"])
            .args([&merged, new])
            .timeout(MERGE)
            .run()?;
        let mut added = Vec::new();
        for name in names(&merged)?.into_iter().filter(|n| !before.contains(n)) {
            added.push((std::fs::metadata(merged.join(&name))?.modified()?, name));
        }
        // The greedy cover writes the ones that reach most first.
        added.sort();
        added.truncate(MOST_ADDED);
        for (_, name) in &added {
            std::fs::copy(merged.join(name), kept.join(name))?;
        }
        let count = added.len();
        progress::line(&format!(
            "{target}: {count} inputs added to {}",
            kept.display()
        ));
        Ok(())
    }
}

/// What was found, and what to do with it.
fn said(target: &str, input: &Path, out: &Output) {
    let text = String::from_utf8_lossy(&out.stderr);
    // A panic's place and its words, or libFuzzer's own line.
    let mut lines = text
        .lines()
        .skip_while(|l| !l.contains("panicked at") && !l.contains("ERROR: libFuzzer"));
    let words: Vec<&str> = lines.by_ref().take(3).collect();
    println!("FAILED  {target}: {}", words.join("\n        "));
    println!(
        "        replay: cargo run -p fuzz -- {target} {}\n        \
         once mended, the input belongs into fuzz/corpus/{target}",
        input.display()
    );
}

/// What libFuzzer says at its end.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    executions: u64,
    per_second: u64,
    added: u64,
    /// Counters reached: edges of the compiled code.
    coverage: u64,
}

impl Report {
    fn read(text: &str) -> Self {
        let stat = |name: &str| {
            let of = |line: &str| {
                line.strip_prefix("stat::")?
                    .strip_prefix(name)?
                    .strip_prefix(':')?
                    .trim()
                    .parse()
                    .ok()
            };
            text.lines().find_map(of).unwrap_or(0)
        };
        let coverage = text
            .rsplit_once(" cov: ")
            .and_then(|(_, rest)| rest.split_ascii_whitespace().next()?.parse().ok());
        Self {
            executions: stat("number_of_executed_units"),
            per_second: stat("average_exec_per_sec"),
            added: stat("new_units_added"),
            coverage: coverage.unwrap_or(0),
        }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} executions ({} a second), {} edges reached, {} new inputs",
            self.executions, self.per_second, self.coverage, self.added
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libfuzzers_end_is_read() {
        let text = "#2\tINITED cov: 5 ft: 6 corp: 1/1b exec/s: 0 rss: 30Mb\n\
            #71\tDONE   cov: 2606 ft: 4444 corp: 9/19Kb lim: 2656 exec/s: 7 rss: 40Mb\n\
            stat::number_of_executed_units: 71\nstat::average_exec_per_sec:     7\n\
            stat::new_units_added:          3\n";
        let report = Report::read(text);
        let want = Report {
            executions: 71,
            per_second: 7,
            added: 3,
            coverage: 2606,
        };
        assert_eq!(report, want);
        assert_eq!(Report::read("nothing"), Report::default());
    }

    #[test]
    fn cargos_messages_name_the_program() {
        let text = "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"fuzz\"},\"executable\":null}\n\
            {\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"common\"},\"executable\":\"/x/y\"}\n\
            {\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"fuzz\"},\"executable\":\"/x/fuzz\"}\n\
            {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(executable(text), Some(PathBuf::from("/x/fuzz")));
    }

    #[test]
    fn the_targets_are_the_folders_and_no_others() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let all = names(&root.join("fuzz/corpus")).unwrap();
        assert!(all.contains(&"qmp".to_owned()));
        assert_eq!(matching(&all, &[]).unwrap(), all);
        let error = matching(&all, &["qmq".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("qmp"), "{error}");
    }
}

//! Breaks the code on purpose, by small patches, and expects the test that guards it to go
//! red. Works on a copy of the tree; the checkout stays as it is.
//!
//! A patch begins with header lines:
//!
//! ```text
//! # why: what the broken code would do to somebody
//! # red: test PACKAGE NAME          (a test of the library whose name contains NAME)
//! # red: test PACKAGE/FILE NAME     (a test of tests/FILE)
//! # red: scenario NAME: WORDS       (on the data centre, with the broken code deployed; the
//! #                                  scenario's error must contain WORDS)
//! # group: GROUP                    (scenarios only: the group's breaks do not touch each
//! #                                  other and are built and deployed together)
//! # fresh: yes                      (scenarios only: the break shows in a data centre that
//! #                                  was set up with it)
//! ```
//!
//! A data centre that ran before is given the checkout's code again; one that was set up
//! for this is taken down.

mod header;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::docker::Docker;
use crate::exec::Cmd;
use crate::paths::Paths;
use crate::runner::{Count, cargo, read_libtest};
use crate::{debian, interrupt, progress, tools};
use header::{Header, Red};

const BUILD: Duration = Duration::from_secs(45 * 60);
const RUN: Duration = Duration::from_secs(60 * 60);

/// A break and what must notice it.
#[derive(Clone, Debug)]
struct Mutant {
    name: String,
    patch: PathBuf,
    header: Header,
}

/// Applies every patch of which name or group contains one of `words` (all if none). Counts
/// a patch as passed when its test went red.
///
/// The tree is copied once; each batch of patches is taken back after its test. Both leave
/// changed files with new times, without which cargo would take an earlier break for built.
pub fn run(paths: &Paths, words: &[String]) -> Result<Count> {
    let mut count = Count::default();
    debian::ensure(paths, &["patch"])?;
    let mutants = mutants(&paths.source().join("e2e/mutants"), words)?;
    let copy = Copy::make(paths)?;
    let mut site = Site::default();
    for (name, batch) in batches(mutants) {
        interrupt::check()?;
        let results = progress::step(&format!("mutants: {name}"), |step| {
            copy.broken(&batch, || match &batch.first().map(|m| &m.header.red) {
                Some(Red::Scenario { .. }) => scenarios(paths, &copy, &batch, &mut site, step),
                _ => batch.iter().map(|m| Ok(test(&copy, m, step))).collect(),
            })
        });
        // What keeps a whole batch from being tried says nothing about any of it.
        let results = results.unwrap_or_else(|e| {
            let all = batch.iter().map(|_| Err(anyhow::anyhow!("{e:#}")));
            all.collect()
        });
        for (mutant, result) in batch.iter().zip(results) {
            match result {
                Ok(()) => {
                    println!("red     {}", mutant.name);
                    count.passed += 1;
                }
                Err(e) => {
                    println!("FAILED  {}: {e:#}", mutant.name);
                    count.failed += 1;
                }
            }
        }
    }
    site.restore(paths)?;
    Ok(count)
}

/// What is applied and built together: a group of scenarios' mutants, or one test's.
fn batches(mutants: Vec<Mutant>) -> BTreeMap<String, Vec<Mutant>> {
    let mut batches: BTreeMap<String, Vec<Mutant>> = BTreeMap::new();
    for m in mutants {
        let group = m.header.group.clone().unwrap_or_else(|| m.name.clone());
        batches.entry(group).or_default().push(m);
    }
    batches
}

fn mutants(dir: &Path, words: &[String]) -> Result<Vec<Mutant>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let patch = entry?.path();
        if patch.extension().is_none_or(|e| e != "patch") {
            continue;
        }
        let name = patch.file_stem().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        let header = Header::read(&std::fs::read_to_string(&patch)?)
            .with_context(|| format!("the header of {}", patch.display()))?;
        let group = header.group.as_deref().unwrap_or_default();
        let wanted = |w: &String| name.contains(w.as_str()) || group.contains(w.as_str());
        if words.is_empty() || words.iter().any(wanted) {
            found.push(Mutant {
                name,
                patch,
                header,
            });
        }
    }
    if found.is_empty() {
        bail!("no patch in {} matches {words:?}", dir.display());
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// A copy of the checkout that may be broken.
struct Copy {
    tree: PathBuf,
    target: PathBuf,
    assets: PathBuf,
}

impl Copy {
    /// Makes it hold the checkout's files, tracked or new, with new times: an earlier run
    /// may have been ended in the middle of a break. Only the workspace's crates are built
    /// anew.
    fn make(paths: &Paths) -> Result<Self> {
        let tree = paths.cache().join("mutants/tree");
        if tree.exists() {
            std::fs::remove_dir_all(&tree)?;
        }
        std::fs::create_dir_all(&tree)?;
        let list = "cd \"$1\" && git ls-files -z --cached --others --exclude-standard \
            --deduplicate | tar --null --ignore-failed-read -T - -cf - | tar -xmf - -C \"$2\"";
        let [from, to] = [paths.source(), &tree].map(|p| p.to_string_lossy());
        Cmd::sh(list, &[&from, &to]).run()?;
        Ok(Self {
            tree,
            target: paths.cache().join("target"),
            assets: tools::assets(paths),
        })
    }

    /// Does `work` with all of `batch` applied, and takes them back.
    fn broken<T>(&self, batch: &[Mutant], work: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut applied = Vec::new();
        let mut result = Ok(());
        for m in batch {
            result = self.apply(&m.patch, false);
            if result.is_err() {
                break;
            }
            applied.push(m);
        }
        let result = result.and_then(|()| work());
        for m in applied.into_iter().rev() {
            self.apply(&m.patch, true)?;
        }
        result
    }

    /// Applies a patch, or takes it back.
    fn apply(&self, patch: &Path, back: bool) -> Result<()> {
        let strict = ["-p1", "--batch", "--fuzz=0", "--no-backup-if-mismatch"];
        let mut cmd = Cmd::new("patch").args(strict);
        if back {
            cmd = cmd.arg("-R");
        }
        cmd.arg("-i").arg(patch).cwd(&self.tree).run()?;
        Ok(())
    }

    /// Cargo in the copy.
    fn cargo(&self, args: &[&str]) -> Cmd {
        cargo()
            .args(args)
            .cwd(&self.tree)
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_MANIFEST_DIR", self.tree.join("e2e"))
            .env("KUBEBUILDER_ASSETS", &self.assets)
    }
}

fn test(copy: &Copy, mutant: &Mutant, step: &progress::Step) -> Result<()> {
    let Red::Test {
        package,
        target,
        name,
    } = &mutant.header.red
    else {
        bail!("it is no test's");
    };
    step.note("building");
    let mut test = vec!["test", "-p", package];
    match target {
        Some(target) => test.extend(["--test", target]),
        None => test.push("--lib"),
    }
    // A patch that does not compile shows nothing about the test.
    let build = [&test[..], &["-q", "--no-run"]].concat();
    copy.cargo(&build)
        .timeout(BUILD)
        .run()
        .context("it does not compile")?;
    step.note("testing");
    test.extend(["--no-fail-fast", "--color=never", name]);
    let out = copy.cargo(&test).timeout(RUN).status()?;
    let seen = read_libtest(&String::from_utf8_lossy(&out.stdout));
    ensure!(
        seen.failures.iter().any(|f| f.contains(name)),
        "no test called like {name} failed ({})",
        seen.count.line()
    );
    Ok(())
}

/// Runs the scenarios of a batch on a data centre that has its breaks: a result for each.
fn scenarios(
    paths: &Paths,
    copy: &Copy,
    batch: &[Mutant],
    site: &mut Site,
    step: &progress::Step,
) -> Result<Vec<Result<()>>> {
    let mut wanted = Vec::new();
    for m in batch {
        match &m.header.red {
            Red::Scenario { name, words } => wanted.push((name.as_str(), words.as_str())),
            Red::Test { .. } => bail!("{} is a test's and has a group", m.name),
        }
    }
    step.note("building");
    copy.cargo(&["build", "-q", "-p", "e2e"])
        .timeout(BUILD)
        .run()
        .context("it does not compile")?;
    step.note("the data centre");
    site.ready(paths, batch.iter().any(|m| m.header.fresh))?;
    step.note("running the scenarios");
    let names: Vec<&str> = wanted.iter().map(|(name, _)| *name).collect();
    let out = copy
        .cargo(&[&["e2e", "test"], &names[..]].concat())
        .timeout(RUN)
        .status()?;
    let text = String::from_utf8_lossy(&out.stdout);
    Ok(wanted
        .into_iter()
        .map(|(name, words)| went_red(&text, name, words))
        .collect())
}

/// Whether the run whose output is `text` says that the scenario failed for these words.
fn went_red(text: &str, name: &str, words: &str) -> Result<()> {
    let about = |line: &str| line.split_ascii_whitespace().nth(1) == Some(name);
    let at = text.lines().position(|l| {
        let ended = l.starts_with("FAILED ") || l.starts_with("ok ");
        ended && about(l)
    });
    let at = at.with_context(|| format!("scenario {name} did not come to an end"))?;
    let mut rest = text.lines().skip(at);
    let first = rest.next().unwrap_or_default();
    ensure!(first.starts_with("FAILED "), "scenario {name} did not fail");
    // An error may have lines of its own.
    let next = |l: &&str| !["ok ", "FAILED ", "LOST "].iter().any(|s| l.starts_with(s));
    let said: Vec<&str> = std::iter::once(first)
        .chain(rest.take_while(next))
        .collect();
    let said = said.join("\n");
    ensure!(
        said.contains(words),
        "scenario {name} failed, but not with {words:?}: {said}"
    );
    Ok(())
}

/// The data centre that is broken.
#[derive(Default)]
struct Site {
    /// Whether one ran before anything was broken; not known before the first look.
    ran_before: Option<bool>,
}

impl Site {
    /// One that runs, or none where the scenarios' own run is to set it up.
    fn ready(&mut self, paths: &Paths, fresh: bool) -> Result<()> {
        let runs = Docker::find(paths)?.is_some();
        self.ran_before.get_or_insert(runs);
        match (runs, fresh) {
            (true, true) => e2e(paths, "down"),
            (false, false) => e2e(paths, "up"),
            (true, false) | (false, true) => Ok(()),
        }
    }

    /// As it was before, with the checkout's code.
    fn restore(&self, paths: &Paths) -> Result<()> {
        match self.ran_before {
            None => Ok(()),
            Some(true) => e2e(paths, "up"),
            Some(false) => e2e(paths, "down"),
        }
    }
}

/// A verb of the checkout's own harness.
fn e2e(paths: &Paths, verb: &str) -> Result<()> {
    progress::step(&format!("cargo e2e {verb}, of the checkout"), |_| {
        cargo()
            .args(["e2e", verb])
            .cwd(paths.source())
            .timeout(RUN)
            .run()
    })?;
    Ok(())
}

#[cfg(test)]
mod tests;

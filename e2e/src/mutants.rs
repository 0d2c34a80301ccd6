//! Breaks the code on purpose, one small patch at a time, and expects the test that
//! guards it to go red. Works on a copy of the tree; the checkout stays as it is.
//!
//! A patch begins with header lines:
//!
//! ```text
//! # why: what the broken code would do to somebody
//! # red: test PACKAGE NAME        (a test of the library whose name contains NAME)
//! # red: test PACKAGE/FILE NAME   (a test of tests/FILE)
//! # red: scenario NAME            (on the running data centre, with the broken code deployed)
//! ```
//!
//! Afterwards the data centre is given the checkout's code again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::docker::Docker;
use crate::exec::Cmd;
use crate::paths::Paths;
use crate::runner::{Count, cargo, read_libtest};
use crate::{debian, interrupt, progress, tools};

const BUILD: Duration = Duration::from_secs(45 * 60);
const RUN: Duration = Duration::from_secs(60 * 60);

/// The test that must go red.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Red {
    Test {
        package: String,
        /// A file of the package's `tests`; its library if none.
        target: Option<String>,
        name: String,
    },
    Scenario {
        name: String,
    },
}

/// Applies every patch whose file name contains one of `words` (all if none). Counts a
/// patch as passed when its test went red.
///
/// The tree is copied once; each patch is taken back after its test. Both leave changed
/// files with new times, without which cargo would take an earlier break for built.
pub fn run(paths: &Paths, words: &[String]) -> Result<Count> {
    let mut count = Count::default();
    debian::ensure(paths, &["patch"])?;
    let patches = patches(&paths.source().join("e2e/mutants"), words)?;
    let tree = paths.cache().join("mutants");
    copy(paths.source(), &tree)?;
    let mut broke_the_data_centre = false;
    for patch in &patches {
        interrupt::check()?;
        let text = std::fs::read_to_string(patch)?;
        broke_the_data_centre |= matches!(header(&text), Some(Red::Scenario { .. }));
        let name = patch
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let result = progress::step(&format!("mutant {name}"), |step| {
            apply(&tree, patch, false)?;
            let result = one(paths, &tree, patch, step);
            apply(&tree, patch, true)?;
            result
        });
        match result {
            Ok(()) => {
                println!("red     {name}");
                count.passed += 1;
            }
            Err(e) => {
                println!("FAILED  {name}: {e:#}");
                count.failed += 1;
            }
        }
    }
    if broke_the_data_centre {
        progress::step("deploying the checkout's code again", |_| {
            cargo()
                .args(["e2e", "up"])
                .cwd(paths.source())
                .timeout(RUN)
                .run()
        })?;
    }
    Ok(count)
}

/// Applies a patch to the copy, or takes it back.
fn apply(tree: &Path, patch: &Path, back: bool) -> Result<()> {
    let mut cmd = Cmd::new("patch").args(["-p1", "--batch", "--fuzz=0", "--no-backup-if-mismatch"]);
    if back {
        cmd = cmd.arg("-R");
    }
    cmd.arg("-i").arg(patch).cwd(tree.join("tree")).run()?;
    Ok(())
}

fn patches(dir: &Path, words: &[String]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let wanted = words.is_empty() || words.iter().any(|w| name.contains(w.as_str()));
        if wanted && path.extension().is_some_and(|e| e == "patch") {
            found.push(path);
        }
    }
    found.sort();
    if found.is_empty() {
        bail!("no patch in {} matches {words:?}", dir.display());
    }
    Ok(found)
}

/// Makes `tree` hold the checkout's files, tracked or new, with new times: an earlier run
/// may have been ended in the middle of a break. Only the workspace's crates are built anew.
fn copy(source: &Path, tree: &Path) -> Result<()> {
    std::fs::create_dir_all(tree)?;
    let old = tree.join("tree");
    if old.exists() {
        std::fs::remove_dir_all(&old)?;
    }
    std::fs::create_dir(&old)?;
    let list = "cd \"$1\" && git ls-files -z --cached --others --exclude-standard \
        --deduplicate | tar --null --ignore-failed-read -T - -cf - | tar -xmf - -C \"$2\"";
    Cmd::sh(list, &[&source.to_string_lossy(), &old.to_string_lossy()]).run()?;
    Ok(())
}

fn one(paths: &Paths, tree: &Path, patch: &Path, step: &progress::Step) -> Result<()> {
    let text = std::fs::read_to_string(patch)?;
    let red = header(&text).context("no header `# red: test PACKAGE NAME` or `scenario NAME`")?;
    let dir = tree.join("tree");
    let in_tree = |cmd: Cmd| {
        cmd.cwd(&dir)
            .env("CARGO_TARGET_DIR", tree.join("target"))
            .env("CARGO_MANIFEST_DIR", dir.join("e2e"))
            .env("KUBEBUILDER_ASSETS", tools::assets(paths))
    };
    match red {
        Red::Test {
            package,
            target,
            name,
        } => {
            step.note("building");
            let mut test = vec!["test", "-p", &package];
            match &target {
                Some(target) => test.extend(["--test", target]),
                None => test.push("--lib"),
            }
            // A patch that does not compile shows nothing about the test.
            in_tree(cargo().args(&test).args(["-q", "--no-run"]))
                .timeout(BUILD)
                .run()
                .context("it does not compile")?;
            step.note("testing");
            test.extend(["--no-fail-fast", "--color=never", &name]);
            let out = in_tree(cargo().args(&test)).timeout(RUN).status()?;
            let seen = read_libtest(&String::from_utf8_lossy(&out.stdout));
            anyhow::ensure!(
                seen.failures.iter().any(|f| f.contains(&name)),
                "no test called like {name} failed ({})",
                seen.count.line()
            );
        }
        Red::Scenario { name } => {
            anyhow::ensure!(
                Docker::find(paths)?.is_some(),
                "a scenario's mutant needs a data centre to break: cargo e2e up"
            );
            step.note("building");
            let build = ["build", "-q", "-p", "e2e"];
            in_tree(cargo().args(build))
                .timeout(BUILD)
                .run()
                .context("it does not compile")?;
            step.note("running the scenario");
            let out = in_tree(cargo().args(["e2e", "test", &name]))
                .timeout(RUN)
                .status()?;
            let failed = String::from_utf8_lossy(&out.stdout).lines().any(|l| {
                l.strip_prefix("FAILED  ")
                    .is_some_and(|l| l.starts_with(&name))
            });
            anyhow::ensure!(failed, "scenario {name} did not fail");
        }
    }
    Ok(())
}

fn header(text: &str) -> Option<Red> {
    let line = text.lines().find_map(|l| l.strip_prefix("# red: "))?;
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    match words.as_slice() {
        ["test", package, name] => {
            let (package, target) = match package.split_once('/') {
                Some((package, target)) => (package, Some(target.to_owned())),
                None => (*package, None),
            };
            Some(Red::Test {
                package: package.to_owned(),
                target,
                name: (*name).to_owned(),
            })
        }
        ["scenario", name] => Some(Red::Scenario {
            name: (*name).to_owned(),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_lines() {
        let test = header("# why: x\n# red: test common pci::rejects\n--- a/x\n");
        let want = Red::Test {
            package: "common".into(),
            target: None,
            name: "pci::rejects".into(),
        };
        assert_eq!(test, Some(want));
        assert_eq!(
            header("# red: scenario attach\n"),
            Some(Red::Scenario {
                name: "attach".into()
            })
        );
        let api = header("# red: test host-provisioner/controller quota\n");
        assert!(matches!(api, Some(Red::Test { target: Some(t), .. }) if t == "controller"));
        assert_eq!(header("--- a/x\n"), None);
        assert_eq!(header("# red: nothing\n"), None);
    }

    #[test]
    fn every_patch_of_the_tree_applies_and_says_what_goes_red() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        for patch in patches(&dir.join("mutants"), &[]).unwrap() {
            let text = std::fs::read_to_string(&patch).unwrap();
            let red = header(&text);
            assert!(red.is_some(), "{}", patch.display());
            if let Some(Red::Scenario { name }) = red {
                let scenarios = crate::scenarios::all();
                assert!(scenarios.iter().any(|s| s.name.contains(&name)), "{name}");
            }
            Cmd::new("git")
                .args(["apply", "--check"])
                .arg(&patch)
                .cwd(dir.join(".."))
                .run()
                .unwrap();
        }
    }
}

//! Breaks the code on purpose, one small patch at a time, and expects the test that
//! guards it to go red. Works on a copy of the tree; the checkout stays as it is.
//!
//! A patch begins with header lines:
//!
//! ```text
//! # why: what the broken code would do to somebody
//! # red: test PACKAGE NAME        (a cargo test whose name contains NAME)
//! # red: scenario NAME            (a scenario, on a data centre of its own code)
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec::Cmd;
use crate::paths::Paths;
use crate::runner::{Count, cargo, read_libtest};
use crate::{progress, tools};

const BUILD: Duration = Duration::from_secs(45 * 60);
const RUN: Duration = Duration::from_secs(60 * 60);

/// The test that must go red.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Red {
    Test { package: String, name: String },
    Scenario { name: String },
}

/// Applies every patch whose file name contains one of `words` (all if none). Counts a
/// patch as passed when its test went red.
pub fn run(paths: &Paths, words: &[String]) -> Result<Count> {
    let mut count = Count::default();
    let patches = patches(&paths.source().join("e2e/mutants"), words)?;
    let tree = paths.cache().join("mutants");
    for patch in &patches {
        let name = patch
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let result = progress::step(&format!("mutant {name}"), |step| {
            step.note("copying the tree");
            copy(paths.source(), &tree)?;
            one(paths, &tree, patch, step)
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
    Ok(count)
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

/// Makes `tree` hold the checkout's files, tracked or new. Files keep their times, so that
/// cargo rebuilds only what a patch touched.
fn copy(source: &Path, tree: &Path) -> Result<()> {
    std::fs::create_dir_all(tree)?;
    let old = tree.join("tree");
    if old.exists() {
        std::fs::remove_dir_all(&old)?;
    }
    std::fs::create_dir(&old)?;
    let list = "cd \"$1\" && git ls-files -z --cached --others --exclude-standard \
        --deduplicate | tar --null --ignore-failed-read -T - -cf - | tar -xf - -C \"$2\"";
    Cmd::sh(list, &[&source.to_string_lossy(), &old.to_string_lossy()]).run()?;
    Ok(())
}

fn one(paths: &Paths, tree: &Path, patch: &Path, step: &progress::Step) -> Result<()> {
    let text = std::fs::read_to_string(patch)?;
    let red = header(&text).context("no header `# red: test PACKAGE NAME` or `scenario NAME`")?;
    let dir = tree.join("tree");
    Cmd::new("patch")
        .args(["-p1", "--batch", "--fuzz=0", "-i"])
        .arg(patch)
        .cwd(&dir)
        .run()?;
    let in_tree = |cmd: Cmd| {
        cmd.cwd(&dir)
            .env("CARGO_TARGET_DIR", tree.join("target"))
            .env("CARGO_MANIFEST_DIR", dir.join("e2e"))
            .env("KUBEBUILDER_ASSETS", tools::assets(paths))
    };
    match red {
        Red::Test { package, name } => {
            step.note("building");
            // A patch that does not compile shows nothing about the test.
            let build = ["test", "-q", "-p", &package, "--no-run"];
            in_tree(cargo().args(build))
                .timeout(BUILD)
                .run()
                .context("it does not compile")?;
            step.note("testing");
            let test = [
                "test",
                "-p",
                &package,
                "--no-fail-fast",
                "--color=never",
                &name,
            ];
            let out = in_tree(cargo().args(test)).timeout(RUN).status()?;
            let seen = read_libtest(&String::from_utf8_lossy(&out.stdout));
            anyhow::ensure!(
                seen.failures.iter().any(|f| f.contains(&name)),
                "no test called like {name} failed ({})",
                seen.count.line()
            );
        }
        Red::Scenario { name } => {
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
        ["test", package, name] => Some(Red::Test {
            package: (*package).to_owned(),
            name: (*name).to_owned(),
        }),
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
            name: "pci::rejects".into(),
        };
        assert_eq!(test, Some(want));
        assert_eq!(
            header("# red: scenario attach\n"),
            Some(Red::Scenario {
                name: "attach".into()
            })
        );
        assert_eq!(header("--- a/x\n"), None);
        assert_eq!(header("# red: nothing\n"), None);
    }

    #[test]
    fn every_patch_of_the_tree_says_what_goes_red() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("mutants");
        for patch in patches(&dir, &[]).unwrap() {
            let text = std::fs::read_to_string(&patch).unwrap();
            assert!(header(&text).is_some(), "{}", patch.display());
        }
    }
}

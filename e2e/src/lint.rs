//! Checks the dependencies against `deny.toml`: licences, banned crates, sources. The same
//! file serves cargo-deny; this check needs nothing that must be built first.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::exec::Cmd;
use crate::paths::Paths;
use crate::runner::cargo;

#[derive(Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
    graph: Graph,
}

#[derive(Deserialize)]
struct Licenses {
    allow: HashSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Deserialize)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

#[derive(Deserialize)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

/// Everything wrong with the dependencies, one line each; and how many were looked at.
pub fn check(paths: &Paths) -> Result<(usize, Vec<String>)> {
    let rules = rules(paths.source())?;
    let mut seen = 0;
    let mut wrong = BTreeSet::new();
    for target in &rules.graph.targets {
        let out = metadata(target).cwd(paths.source()).run()?;
        let graph: Metadata = serde_json::from_slice(&out.stdout).context("cargo metadata")?;
        let used: HashSet<&str> = graph.resolve.nodes.iter().map(|n| n.id.as_str()).collect();
        let used: Vec<&Package> = graph
            .packages
            .iter()
            .filter(|p| used.contains(p.id.as_str()))
            .collect();
        seen = seen.max(used.len());
        wrong.extend(used.into_iter().flat_map(|p| judge(&rules, p)));
    }
    anyhow::ensure!(seen > 0, "cargo metadata names no package");
    Ok((seen, wrong.into_iter().collect()))
}

fn metadata(target: &str) -> Cmd {
    cargo().args([
        "metadata",
        "--format-version=1",
        "--locked",
        // The fuzzers' libFuzzer is optional.
        "--all-features",
        "--filter-platform",
        target,
    ])
}

fn rules(source: &Path) -> Result<Rules> {
    let path = source.join("deny.toml");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    toml::from_str(&text).with_context(|| path.display().to_string())
}

fn judge(rules: &Rules, p: &Package) -> Vec<String> {
    let mut wrong = Vec::new();
    let who = format!("{} {}", p.name, p.version);
    match &p.license {
        None => wrong.push(format!("{who}: names no licence")),
        Some(l) => match allowed(l, &rules.licenses.allow) {
            Some(true) => {}
            Some(false) => wrong.push(format!("{who}: licence {l} is not allowed")),
            None => wrong.push(format!("{who}: cannot read licence {l:?}")),
        },
    }
    if let Some(ban) = rules.bans.deny.iter().find(|b| b.name == p.name) {
        wrong.push(format!("{who}: banned, {}", ban.reason));
    }
    // A package without a source lies in this workspace.
    if let Some(source) = &p.source {
        let registry = source.strip_prefix("registry+");
        if !registry.is_some_and(|r| rules.sources.allow_registry.iter().any(|a| a == r)) {
            wrong.push(format!("{who}: comes from {source}"));
        }
    }
    wrong
}

/// Whether an SPDX expression can be met with the allowed licences; nothing if it is none.
/// `/` is an old way to write OR.
fn allowed(expression: &str, allow: &HashSet<String>) -> Option<bool> {
    let text = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let mut at = 0;
    let result = any(&words, &mut at, allow)?;
    (at == words.len()).then_some(result)
}

fn any(words: &[&str], at: &mut usize, allow: &HashSet<String>) -> Option<bool> {
    let mut result = every(words, at, allow)?;
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        result |= every(words, at, allow)?;
    }
    Some(result)
}

fn every(words: &[&str], at: &mut usize, allow: &HashSet<String>) -> Option<bool> {
    let mut result = term(words, at, allow)?;
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        result &= term(words, at, allow)?;
    }
    Some(result)
}

fn term(words: &[&str], at: &mut usize, allow: &HashSet<String>) -> Option<bool> {
    let word = *words.get(*at)?;
    *at += 1;
    if word == "(" {
        let result = any(words, at, allow)?;
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return closed.then_some(result);
    }
    if ["AND", "OR", "WITH", ")"].contains(&word) {
        return None;
    }
    if words.get(*at) == Some(&"WITH") {
        let exception = words.get(*at + 1)?;
        *at += 2;
        return Some(allow.contains(&format!("{word} WITH {exception}")));
    }
    Some(allow.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(expression: &str) -> Option<bool> {
        let allow = ["MIT", "Apache-2.0 WITH LLVM-exception", "ISC"].map(String::from);
        allowed(expression, &allow.into_iter().collect())
    }

    #[test]
    fn licence_expressions() {
        for (text, want) in [
            ("MIT", Some(true)),
            ("GPL-3.0", Some(false)),
            ("GPL-3.0 OR MIT", Some(true)),
            ("GPL-3.0/MIT", Some(true)),
            ("GPL-3.0 AND MIT", Some(false)),
            ("ISC AND (GPL-3.0 OR MIT)", Some(true)),
            ("MIT OR ISC AND GPL-3.0", Some(true)),
            ("Apache-2.0 WITH LLVM-exception", Some(true)),
            ("Apache-2.0", Some(false)),
            ("", None),
            ("MIT OR", None),
            ("(MIT", None),
            ("MIT ISC", None),
        ] {
            assert_eq!(eval(text), want, "{text}");
        }
    }

    #[test]
    fn a_package_is_judged_by_licence_name_and_source() {
        let rules = rules(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap();
        let package = |name: &str, license: Option<&str>, source: &str| Package {
            id: String::new(),
            name: name.into(),
            version: "1.0.0".into(),
            license: license.map(Into::into),
            source: Some(source.into()),
        };
        let index = "registry+https://github.com/rust-lang/crates.io-index";
        assert!(judge(&rules, &package("a", Some("MIT"), index)).is_empty());
        assert_eq!(judge(&rules, &package("a", None, index)).len(), 1);
        assert_eq!(
            judge(&rules, &package("a", Some("GPL-3.0"), index)).len(),
            1
        );
        assert_eq!(
            judge(&rules, &package("serde_yaml", Some("MIT"), index)).len(),
            1
        );
        assert_eq!(
            judge(&rules, &package("a", Some("MIT"), "git+https://x/y")).len(),
            1
        );
    }
}

use super::*;
use std::collections::BTreeSet;

fn all() -> Vec<Mutant> {
    mutants(&source().join("e2e/mutants"), &[]).unwrap()
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files that a patch changes.
fn files(patch: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(patch).unwrap();
    let changed = text.lines().filter_map(|l| l.strip_prefix("+++ b/"));
    changed.map(|l| l.trim_end().to_owned()).collect()
}

#[test]
fn the_patches_of_a_batch_apply_one_after_another() {
    for (name, batch) in batches(all()) {
        let dir = tempfile::tempdir().unwrap();
        for file in batch.iter().flat_map(|m| files(&m.patch)) {
            let to = dir.path().join(&file);
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(source().join(&file), &to).unwrap_or_else(|e| panic!("{file}: {e}"));
        }
        for m in &batch {
            assert!(!files(&m.patch).is_empty(), "{}", m.name);
            let apply = Cmd::new("git").arg("apply").arg(&m.patch).cwd(dir.path());
            if let Err(e) = apply.run() {
                panic!("{} of {name}: {e:#}", m.name);
            }
        }
    }
}

#[test]
fn every_scenario_has_a_mutant_and_every_mutant_a_scenario() {
    let broken: BTreeSet<String> = all()
        .into_iter()
        .filter_map(|m| match m.header.red {
            Red::Scenario { name, .. } => Some(name),
            Red::Test { .. } => None,
        })
        .collect();
    let scenarios = crate::scenarios::all();
    let scenarios: BTreeSet<String> = scenarios.iter().map(|s| s.name.to_owned()).collect();
    assert_eq!(broken, scenarios);
}

#[test]
fn a_batch_is_a_group_or_one_alone() {
    let mutant = |name: &str, group: Option<&str>| {
        let group = group.map_or(String::new(), |g| format!("# group: {g}\n"));
        let text = format!("# why: x\n# red: scenario {name}: x\n{group}");
        Mutant {
            name: name.into(),
            patch: PathBuf::new(),
            header: Header::read(&text).unwrap(),
        }
    };
    let batches = batches(vec![
        mutant("a", Some("g")),
        mutant("b", None),
        mutant("c", Some("g")),
    ]);
    let names: Vec<Vec<&str>> = batches
        .values()
        .map(|b| b.iter().map(|m| m.name.as_str()).collect())
        .collect();
    assert_eq!(names, [vec!["b"], vec!["a", "c"]]);
}

#[test]
fn red_is_the_scenario_failed_in_these_words() {
    let text = "ok      one (0:10)\n\
        FAILED  two (0:11): the kernel has 6 VFs:\nand a second line\n\
        FAILED  three (0:12): late\n[1:00] ... two: something\n";
    assert!(went_red(text, "two", "6 VFs").is_ok());
    assert!(went_red(text, "two", "second line").is_ok());
    let of_another = went_red(text, "two", "late").unwrap_err().to_string();
    assert!(of_another.contains("not with"), "{of_another}");
    let green = went_red(text, "one", "x").unwrap_err().to_string();
    assert!(green.contains("did not fail"), "{green}");
    let not_run = went_red(text, "four", "x").unwrap_err().to_string();
    assert!(not_run.contains("did not come"), "{not_run}");
}

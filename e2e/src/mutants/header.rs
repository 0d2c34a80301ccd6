//! What a patch says of itself before its first hunk. Pure.

use anyhow::{Context, Result, bail, ensure};

/// The test that must go red.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Red {
    Test {
        package: String,
        /// A file of the package's `tests`; its library if none.
        target: Option<String>,
        name: String,
    },
    Scenario {
        name: String,
        /// Part of the error that this break and no other causes.
        words: String,
    },
}

/// The header lines of a patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) red: Red,
    pub(super) group: Option<String>,
    pub(super) fresh: bool,
}

impl Header {
    /// Reads the lines before the first file.
    pub(super) fn read(text: &str) -> Result<Self> {
        let lines = || text.lines().take_while(|l| l.starts_with("# "));
        let field = |key: &str| {
            lines().find_map(|l| l.strip_prefix("# ")?.strip_prefix(key)?.strip_prefix(": "))
        };
        ensure!(field("why").is_some(), "no `# why: …`");
        let red = red(field("red").context("no `# red: …`")?)?;
        let group = field("group").map(str::to_owned);
        let fresh = match field("fresh") {
            None => false,
            Some("yes") => true,
            Some(other) => bail!("`# fresh: {other}`: yes, or no such line"),
        };
        ensure!(
            matches!(red, Red::Scenario { .. }) || (group.is_none() && !fresh),
            "group and fresh are for scenarios"
        );
        Ok(Self { red, group, fresh })
    }
}

fn red(text: &str) -> Result<Red> {
    if let Some(rest) = text.strip_prefix("scenario ") {
        let (name, words) = rest
            .split_once(": ")
            .context("`# red: scenario NAME: WORDS`")?;
        return Ok(Red::Scenario {
            name: name.to_owned(),
            words: words.trim().to_owned(),
        });
    }
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let ["test", package, name] = words.as_slice() else {
        bail!("`# red: test PACKAGE NAME` or `# red: scenario NAME: WORDS`, not {text:?}");
    };
    let (package, target) = match package.split_once('/') {
        Some((package, target)) => (package, Some(target.to_owned())),
        None => (*package, None),
    };
    Ok(Red::Test {
        package: package.to_owned(),
        target,
        name: (*name).to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tests_lines() {
        let h = Header::read("# why: x\n# red: test common pci::rejects\n--- a/x\n").unwrap();
        let want = Red::Test {
            package: "common".into(),
            target: None,
            name: "pci::rejects".into(),
        };
        assert_eq!((h.red, h.group, h.fresh), (want, None, false));
        let api = Header::read("# why: x\n# red: test host-provisioner/controller quota\n");
        assert!(matches!(api.unwrap().red, Red::Test { target: Some(t), .. } if t == "controller"));
    }

    #[test]
    fn a_scenarios_lines() {
        let text = "# why: x\n# group: up\n# fresh: yes\n# red: scenario attach: kernel has: 6\n";
        let h = Header::read(text).unwrap();
        let want = Red::Scenario {
            name: "attach".into(),
            words: "kernel has: 6".into(),
        };
        assert_eq!(
            (h.red, h.group.as_deref(), h.fresh),
            (want, Some("up"), true)
        );
    }

    #[test]
    fn what_is_missing_or_misplaced_is_said() {
        for text in [
            "--- a/x\n",
            "# red: test common x\n",
            "# why: x\n# red: nothing\n",
            "# why: x\n# red: scenario attach\n",
            "# why: x\n# red: test common x\n# group: up\n",
            "# why: x\n# fresh: maybe\n# red: scenario a: b\n",
            "# why: x\n--- a/x\n# red: test common x\n",
        ] {
            assert!(Header::read(text).is_err(), "{text}");
        }
    }
}

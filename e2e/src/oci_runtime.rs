//! An OCI runtime that runs `runc` with fewer wishes, for a machine whose own capability
//! set is incomplete (a container or a restricted VM).
//!
//! `docker run --privileged` asks for every capability, a lowered oom_score_adj and
//! higher rlimits; runc fails if the bounding set lacks one. The wrapper takes out of
//! the bundle what the machine cannot give and then becomes runc.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use serde_json::Value;

/// Capabilities by bit number, as in linux/capability.h.
const NAMES: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The capabilities a process of this machine can have at most.
#[derive(Clone, Copy, Debug)]
pub struct Bounding(u64);

impl Bounding {
    /// Reads the calling process's own.
    pub fn current() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/self/status")?;
        Self::parse(&text).context("/proc/self/status has no CapBnd")
    }

    fn parse(status: &str) -> Option<Self> {
        let hex = status.lines().find_map(|l| l.strip_prefix("CapBnd:"))?;
        u64::from_str_radix(hex.trim(), 16).ok().map(Self)
    }

    /// Whether it has `name`, such as `CAP_SYS_RESOURCE`.
    #[must_use]
    pub fn has(self, name: &str) -> bool {
        let short = name.strip_prefix("CAP_").unwrap_or(name);
        NAMES
            .iter()
            .position(|n| *n == short)
            .is_some_and(|bit| self.0 >> bit & 1 == 1)
    }
}

/// Whether containers here need the wrapper.
pub fn needed() -> Result<bool> {
    Ok(!Bounding::current()?.has("CAP_SYS_RESOURCE"))
}

/// The hidden subcommand: `args` are runc's. Returns only on failure.
pub fn main(args: &[OsString]) -> Result<()> {
    let bounding = Bounding::current()?;
    let words: Vec<String> = args
        .iter()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    for (path, pointer) in files(&words) {
        rewrite(&path, pointer, bounding)
            .with_context(|| format!("adapting {}", path.display()))?;
    }
    Err(anyhow!(Command::new("runc").args(args).exec()).context("starting runc"))
}

/// The files that describe a process: the bundle's configuration on create and run, and
/// the process file on exec; with where in it the process is.
fn files(args: &[String]) -> Vec<(PathBuf, &'static str)> {
    let value = |names: &[&str]| {
        args.iter().enumerate().find_map(|(i, a)| {
            names.iter().find_map(|n| {
                if a == n {
                    args.get(i + 1).cloned()
                } else {
                    a.strip_prefix(&format!("{n}=")).map(String::from)
                }
            })
        })
    };
    let mut found = Vec::new();
    if args.iter().any(|a| a == "create" || a == "run") {
        let bundle = value(&["--bundle", "-b"]).unwrap_or_else(|| ".".into());
        found.push((Path::new(&bundle).join("config.json"), "/process"));
    }
    if args.iter().any(|a| a == "exec")
        && let Some(process) = value(&["--process", "-p"])
    {
        found.push((PathBuf::from(process), ""));
    }
    found
}

fn rewrite(path: &Path, pointer: &str, bounding: Bounding) -> Result<()> {
    let mut doc: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    if let Some(process) = doc.pointer_mut(pointer) {
        restrict(process, bounding);
        std::fs::write(path, serde_json::to_vec(&doc)?)?;
    }
    Ok(())
}

fn restrict(process: &mut Value, bounding: Bounding) {
    if let Some(Value::Object(sets)) = process.get_mut("capabilities") {
        for set in sets.values_mut() {
            if let Value::Array(names) = set {
                names.retain(|n| n.as_str().is_some_and(|n| bounding.has(n)));
            }
        }
    }
    if bounding.has("CAP_SYS_RESOURCE") {
        return;
    }
    // Raising a hard limit and lowering the score are what SYS_RESOURCE is for.
    if let Value::Object(fields) = process {
        fields.remove("rlimits");
        if fields
            .get("oomScoreAdj")
            .and_then(Value::as_i64)
            .is_some_and(|s| s < 0)
        {
            fields.insert("oomScoreAdj".into(), 0.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn strings(s: &[&str]) -> Vec<String> {
        s.iter().map(|x| (*x).to_owned()).collect()
    }

    #[test]
    fn takes_out_only_what_the_machine_lacks() {
        let all = (1u64 << NAMES.len()) - 1;
        let without = Bounding(all & !(1 << 24));
        let process = json!({
            "capabilities": {"bounding": ["CAP_SYS_ADMIN", "CAP_SYS_RESOURCE"]},
            "rlimits": [1], "oomScoreAdj": -500, "args": ["x"],
        });
        let mut p = process.clone();
        restrict(&mut p, without);
        assert_eq!(
            p,
            json!({"capabilities": {"bounding": ["CAP_SYS_ADMIN"]}, "oomScoreAdj": 0, "args": ["x"]})
        );
        let mut p = process.clone();
        restrict(&mut p, Bounding(all));
        assert_eq!(p, process);
    }

    #[test]
    fn finds_the_files_in_runc_command_lines() {
        let create = strings(&["--root", "/r", "create", "--bundle", "/b", "id"]);
        assert_eq!(
            files(&create),
            [(PathBuf::from("/b/config.json"), "/process")]
        );
        let exec = strings(&["exec", "--process=/p.json", "--detach", "id"]);
        assert_eq!(files(&exec), [(PathBuf::from("/p.json"), "")]);
        assert!(files(&strings(&["delete", "id"])).is_empty());
    }

    #[test]
    fn bounding_set_by_name() {
        let b = Bounding::parse("Name:\tx\nCapBnd:\t0000000000200000\n").unwrap();
        assert!(b.has("CAP_SYS_ADMIN") && !b.has("CAP_CHOWN") && !b.has("CAP_NO_SUCH"));
    }
}

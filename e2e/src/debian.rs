//! Debian packages the harness needs: installs what is missing, changes nothing else.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec::Cmd;
use crate::{cache, paths::Paths, progress};

/// Installs those of `packages` that are missing.
pub fn ensure(paths: &Paths, packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    // apt's own lock makes a second apt fail, not wait.
    let _lock = cache::lock(paths, "apt")?;
    progress::step(
        &format!("installing Debian packages: {}", missing.join(" ")),
        |_| {
            let apt = || {
                Cmd::new("apt-get")
                    .args(["-y", "-q", "-o", "DPkg::Lock::Timeout=300"])
                    .env("DEBIAN_FRONTEND", "noninteractive")
                    .timeout(Duration::from_secs(1200))
            };
            apt().arg("update").run().context("apt-get update")?;
            apt()
                .args(["install", "--no-install-recommends"])
                .args(&missing)
                .run()?;
            Ok(())
        },
    )
}

/// Installs `package` unless `program` is in `PATH` already, from wherever it came: a
/// vendor's Docker must not be replaced by Debian's.
pub fn ensure_program(paths: &Paths, program: &str, package: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join(program).is_file()) {
        return Ok(());
    }
    ensure(paths, &[package])
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut missing = Vec::new();
    for p in packages {
        let out = Cmd::new("dpkg-query")
            .args(["-W", "-f", "${db:Status-Abbrev}", p])
            .unlogged()
            .status()
            .context("this needs a Debian machine")?;
        match out.status.code() {
            Some(0) if out.text().starts_with("ii") => {}
            Some(0 | 1) => missing.push(*p),
            _ => bail!("dpkg-query: {}", String::from_utf8_lossy(&out.stderr)),
        }
    }
    Ok(missing)
}

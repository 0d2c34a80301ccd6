//! Our own programs as static binaries: what runs in the data centre does not depend on the
//! libraries that it finds there. Runs cargo, writes into the cache.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::exec::Cmd;
use crate::paths::Paths;
use crate::{debian, progress};

const TARGET: &str = "x86_64-unknown-linux-musl";
/// Of the workspace's Cargo.toml: between a debug build, which an emulated machine runs
/// too slowly, and a release build, which takes too long to wait for.
const PROFILE: &str = "image";

/// Compiles all programs of `packages`, static, with `features` (`package/feature`), and
/// returns their folder. The target folder
/// is the cache's own: `cargo e2e` may be running out of the checkout's, and as another user.
pub(crate) fn compile(paths: &Paths, packages: &[&str], features: &[&str]) -> Result<PathBuf> {
    debian::ensure(paths, &["musl-tools"])?;
    ensure_target()?;
    let target_dir = paths.cache().join("target");
    forget_other_checkouts(paths, &target_dir)?;
    let named = packages.iter().flat_map(|p| ["-p", p]);
    progress::step(
        &format!("compiling {}, static", packages.join(" and ")),
        |_| {
            cargo()
                .args([
                    "build",
                    "--locked",
                    "--target",
                    TARGET,
                    "--profile",
                    PROFILE,
                ])
                .args(named)
                .arg("--bins")
                .args(["--features", &features.join(",")])
                .arg("--target-dir")
                .arg(&target_dir)
                .cwd(paths.source())
                .timeout(Duration::from_secs(3600))
                .run()
        },
    )?;
    Ok(target_dir.join(TARGET).join(PROFILE))
}

/// Cargo takes a file that is older than what was compiled for unchanged, and the packages of
/// two checkouts for the same. So what another checkout has compiled is removed first.
fn forget_other_checkouts(paths: &Paths, target_dir: &Path) -> Result<()> {
    let mark = target_dir.join("programs-built-from");
    let source = paths.source().to_string_lossy();
    if std::fs::read_to_string(&mark).is_ok_and(|was| was == source) {
        return Ok(());
    }
    cargo()
        .args(["clean", "--workspace", "--target", TARGET])
        .args(["--profile", PROFILE, "--target-dir"])
        .arg(target_dir)
        .cwd(paths.source())
        .run()?;
    std::fs::create_dir_all(target_dir)?;
    std::fs::write(&mark, source.as_bytes())?;
    Ok(())
}

/// The cargo that started this program, without what it told only to this program.
fn cargo() -> Cmd {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut cmd = Cmd::new(program);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cmd = cmd.env_remove(name);
        }
    }
    cmd
}

/// The standard library for [`TARGET`]: rustup has it, other toolchains may bring it.
fn ensure_target() -> Result<()> {
    let sysroot = Cmd::new("rustc").args(["--print", "sysroot"]).text()?;
    let library = Path::new(&sysroot).join("lib/rustlib").join(TARGET);
    if library.is_dir() {
        return Ok(());
    }
    let add = Cmd::new("rustup")
        .args(["target", "add", TARGET])
        .timeout(Duration::from_secs(600))
        .run();
    if let Err(e) = add {
        bail!(
            "the Rust toolchain in {sysroot} has no {TARGET} and rustup could not add it: {e}; \
             install that target of the toolchain"
        );
    }
    Ok(())
}

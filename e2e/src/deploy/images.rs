//! The project's two programs as container images: static binaries, one each on an empty
//! root, tagged with the hash of what they hold. Runs cargo, writes into the cache.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::archive;
use crate::cache::{self, Key};
use crate::exec::Cmd;
use crate::node_image::install;
use crate::paths::Paths;
use crate::{debian, progress};

const TARGET: &str = "x86_64-unknown-linux-musl";
/// Of the workspace's Cargo.toml: between a debug build, which an emulated machine runs
/// too slowly, and a release build, which takes too long to wait for.
const PROFILE: &str = "image";
/// The kubelet leaves names of this registry alone, and nothing is ever pulled from it.
const REGISTRY: &str = "localhost/vf-provisioner";

/// An image archive and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub repository: String,
    pub tag: String,
    /// Read by `ctr images import`.
    pub archive: PathBuf,
}

impl Image {
    /// `repository:tag`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}:{}", self.repository, self.tag)
    }
}

/// Both images.
#[derive(Clone, Debug)]
pub struct Images {
    pub host_provisioner: Image,
    pub guest_syncer: Image,
}

/// Compiles what changed and packs it.
pub fn build(paths: &Paths) -> Result<Images> {
    let bin = compile(paths)?;
    Ok(Images {
        host_provisioner: pack(paths, &bin, "host-provisioner")?,
        guest_syncer: pack(paths, &bin, "guest-syncer")?,
    })
}

/// The folder of the two programs. The target folder is the cache's own: `cargo e2e` may
/// be running out of the checkout's, and as another user.
fn compile(paths: &Paths) -> Result<PathBuf> {
    debian::ensure(paths, &["musl-tools"])?;
    ensure_target()?;
    let target_dir = paths.cache().join("target");
    progress::step("compiling the two programs, static", |_| {
        cargo()
            .args([
                "build",
                "--locked",
                "--target",
                TARGET,
                "--profile",
                PROFILE,
            ])
            .args(["-p", "host-provisioner", "-p", "guest-syncer", "--bins"])
            .arg("--target-dir")
            .arg(&target_dir)
            .cwd(paths.source())
            .timeout(Duration::from_secs(3600))
            .run()
    })?;
    Ok(target_dir.join(TARGET).join(PROFILE))
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

fn pack(paths: &Paths, bin: &Path, program: &str) -> Result<Image> {
    let binary = bin.join(program);
    let key = Key::new()
        .file(&binary)
        .context("cargo built no such program")?;
    let repository = format!("{REGISTRY}/{program}");
    let tag = key.hex();
    let name = format!("{repository}:{tag}");
    let dir = cache::artefact(paths, &format!("image-{program}"), &key, |out| {
        let dir = tempfile::tempdir_in(out)?;
        let root = dir.path().join("root");
        std::fs::create_dir(&root)?;
        // tempfile's mode would keep every other user out of the image.
        std::fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        install(&binary, &root.join(program))?;
        let image = archive::Image {
            name: &name,
            entrypoint: &[&format!("/{program}")],
            ..archive::Image::default()
        };
        archive::write(&root, &image, &out.join("image.tar"))
    })?;
    Ok(Image {
        repository,
        tag,
        archive: dir.join("image.tar"),
    })
}

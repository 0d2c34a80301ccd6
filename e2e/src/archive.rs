//! Container images without an engine or a registry: one layer from a folder, written as
//! an archive that `docker load` and `ctr images import` read.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::exec::Cmd;

/// What an image is called and how it starts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Image<'a> {
    /// `repository:tag`.
    pub name: &'a str,
    pub entrypoint: &'a [&'a str],
    pub env: &'a [&'a str],
    /// `uid` or `uid:gid`; root if empty.
    pub user: &'a str,
}

/// Writes the folder `root` as image `image` into the file `out`. Files keep their mode
/// and owner; times are dropped, so that one content gives one image.
pub fn write(root: &Path, image: &Image<'_>, out: &Path) -> Result<()> {
    let parent = out.parent().context("an archive needs a folder")?;
    let dir = tempfile::tempdir_in(parent)?;
    let layer = dir.path().join("layer.tar");
    let tar = || Cmd::new("tar").timeout(Duration::from_secs(600));
    tar()
        .args([
            "--sort=name",
            "--mtime=@0",
            "--numeric-owner",
            "--format=gnu",
            "-cf",
        ])
        .arg(&layer)
        .arg("-C")
        .arg(root)
        .arg(".")
        .run()?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {"Entrypoint": image.entrypoint, "Env": image.env, "User": image.user},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer)?)]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "e2e"}],
    });
    let config = serde_json::to_vec(&config)?;
    let name = format!("{}.json", hex(&Sha256::digest(&config)));
    std::fs::write(dir.path().join(&name), config)?;
    let manifest = json!([{"Config": name, "RepoTags": [image.name], "Layers": ["layer.tar"]}]);
    std::fs::write(
        dir.path().join("manifest.json"),
        serde_json::to_vec(&manifest)?,
    )?;
    tar()
        .args([
            "--mtime=@0",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "-cf",
        ])
        .arg(out)
        .arg("-C")
        .arg(dir.path())
        .args(["manifest.json", &name, "layer.tar"])
        .run()?;
    Ok(())
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(buffer.get(..n).unwrap_or_default());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

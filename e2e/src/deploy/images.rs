//! The project's two programs as container images: static binaries, one each on an empty
//! root, tagged with the hash of what they hold. Runs cargo, writes into the cache.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::archive;
use crate::cache::{self, Key};
use crate::node_image::install;
use crate::paths::Paths;
use crate::programs;

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

/// Compiles what changed and packs it. Unlike the released image the host-provisioner's has
/// points at which scenarios stop it.
pub fn build(paths: &Paths) -> Result<Images> {
    let packages = ["host-provisioner", "guest-syncer"];
    let bin = programs::compile(paths, &packages, &["host-provisioner/crash-points"])?;
    Ok(Images {
        host_provisioner: pack(paths, &bin, "host-provisioner")?,
        guest_syncer: pack(paths, &bin, "guest-syncer")?,
    })
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

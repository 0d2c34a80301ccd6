//! What is loaded into L1's QEMU before it starts: a mended VMRUN (e2e/tools/svm-mend).

use std::path::PathBuf;

use anyhow::Result;

use crate::cache::{self, Key};
use crate::debian;
use crate::exec::Cmd;
use crate::paths::Paths;

/// The shared object, compiled unless it is in the cache. It needs no library.
pub(super) fn ensure(paths: &Paths) -> Result<PathBuf> {
    debian::ensure(paths, &["gcc", "libc6-dev"])?;
    let source = paths.source().join("e2e/tools/svm-mend/svm-mend.c");
    let key = Key::new().file(&source)?;
    let dir = cache::artefact(paths, "svm-mend", &key, |out| {
        Cmd::new("gcc")
            .args(["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"])
            .args(["-nostartfiles", "-nodefaultlibs", "-o"])
            .arg(out.join("svm-mend.so"))
            .arg(&source)
            .run()?;
        Ok(())
    })?;
    Ok(dir.join("svm-mend.so"))
}

//! What was loaded with which parameters, kept on the host for a successor. Below `/run`, so
//! that it ends with the boot, as the modules do.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use super::plan::Loaded;
use crate::kernel::modules::ModuleName;

/// The file, and what is in it.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    modules: BTreeMap<String, Loaded>,
}

impl Record {
    /// Reads the file. One that cannot be read is taken for none: then hidden parameters of
    /// loaded modules are not known.
    pub(super) fn new(path: PathBuf) -> Self {
        let modules = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error),
        };
        let modules = modules.unwrap_or_else(|error| {
            tracing::warn!(%error, path = %path.display(), "not read");
            BTreeMap::new()
        });
        Self { path, modules }
    }

    pub(super) fn of(&self, module: &ModuleName) -> Option<&Loaded> {
        self.modules.get(module.as_str())
    }

    /// # Errors
    /// The file could not be written; what was kept before still is.
    pub(super) fn keep(&mut self, module: ModuleName, loaded: Loaded) -> io::Result<()> {
        self.modules.insert(module.as_str().to_owned(), loaded);
        let new = self.path.with_extension("new");
        fs::write(&new, serde_json::to_vec(&self.modules)?)?;
        fs::rename(&new, &self.path)
    }
}

//! Servers that tests are done with, for the tests after them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::etcd::Snapshot;
use crate::process::Process;
use crate::{Error, crds};

/// How long one that is about to come back is waited for, rather than starting another: the
/// test that it was lent to may hold it for longer than one thinks.
const RETURN: Duration = Duration::from_secs(2);

static REST: Mutex<Rest> = Mutex::new(Rest {
    free: Vec::new(),
    returning: 0,
});
static BACK: Notify = Notify::const_new();

struct Rest {
    free: Vec<Kept>,
    /// Dropped, in a runtime that has not ended.
    returning: usize,
}

fn rest() -> MutexGuard<'static, Rest> {
    REST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server with what is needed to lend it.
struct Kept {
    process: Process,
    /// `None`: it is not for others.
    new: Option<New>,
}

/// What it was when it was new.
struct New {
    folders: Vec<PathBuf>,
    data: Snapshot,
}

/// A server in somebody's hands: of a test, and of a task of its runtime.
pub(crate) struct Loan {
    url: String,
    /// Until it ends.
    kept: Option<Kept>,
    /// The test has let go of it.
    returning: AtomicBool,
}

impl Loan {
    fn of(process: Process, new: Option<New>) -> Arc<Self> {
        Arc::new(Self {
            url: process.url().to_owned(),
            kept: Some(Kept { process, new }),
            returning: false.into(),
        })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn process(&self) -> Result<&Process, Error> {
        let kept = self.kept.as_ref().ok_or(Error::Stopped)?;
        Ok(&kept.process)
    }

    /// The test lets go of it.
    pub(crate) fn returns(&self) {
        if self.kept.as_ref().is_some_and(|kept| kept.new.is_some()) {
            rest().returning += 1;
            self.returning.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let lendable = |kept: &Kept| kept.new.is_some() && kept.process.running();
        let kept = self.kept.take().filter(lendable);
        let mut rest = rest();
        if self.returning.load(Ordering::Relaxed) {
            rest.returning -= 1;
        }
        rest.free.extend(kept);
        drop(rest);
        BACK.notify_one();
    }
}

/// One that is for nobody else.
pub(crate) async fn own() -> Result<Arc<Loan>, Error> {
    Ok(Loan::of(Process::start().await?, None))
}

/// One with the CRDs of these folders, and nothing else that a new one has not.
pub(crate) async fn lend(folders: &[&Path]) -> Result<Arc<Loan>, Error> {
    let kept = match back(folders).await? {
        Some(kept) => kept,
        None => fresh(folders).await?,
    };
    let loan = Loan::of(kept.process, kept.new);
    // A runtime drops its tasks when it ends, and no other of them runs any more.
    let held = Arc::clone(&loan);
    tokio::spawn(async move {
        let _held = held;
        std::future::pending::<()>().await;
    });
    Ok(loan)
}

/// One that came back, put back to what it was.
async fn back(folders: &[&Path]) -> Result<Option<Kept>, Error> {
    let mut waited = false;
    loop {
        let (found, returning) = {
            let mut rest = rest();
            let fits = |kept: &Kept| kept.new.as_ref().is_some_and(|new| new.folders == folders);
            let at = rest.free.iter().position(fits);
            (at.map(|at| rest.free.swap_remove(at)), rest.returning)
        };
        if let Some(kept) = found {
            if let Some(new) = &kept.new
                && kept.process.running()
                && new.data.restore(kept.process.etcd()).await?
            {
                return Ok(Some(kept));
            }
            eprintln!("a test left an API server that cannot be lent again");
        } else if returning > 0 && !waited {
            waited = tokio::time::timeout(RETURN, BACK.notified()).await.is_err();
        } else {
            return Ok(None);
        }
    }
}

async fn fresh(folders: &[&Path]) -> Result<Kept, Error> {
    let process = Process::start().await?;
    let admin = process.admin().await?;
    for folder in folders {
        crds::install(&admin, folder).await?;
    }
    let data = Snapshot::take(process.etcd()).await?;
    let folders = folders.iter().map(|f| f.to_path_buf()).collect();
    Ok(Kept {
        process,
        new: Some(New { folders, data }),
    })
}

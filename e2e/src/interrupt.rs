//! Ctrl-C and SIGTERM, turned into one flag that every wait of the harness looks at.
//!
//! The first signal makes running steps fail with [`Interrupted`]; the caller then
//! disarms the flag and tears down, so that the tear-down's own programs run. While
//! it runs, further signals are only acknowledged: a half-done tear-down is what the
//! harness promises not to leave behind.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Programs that are waited for, in any thread.
static RUNNING: AtomicUsize = AtomicUsize::new(0);
static TEARING_DOWN: AtomicBool = AtomicBool::new(false);
static REQUESTED: std::sync::LazyLock<watch::Sender<bool>> =
    std::sync::LazyLock::new(|| watch::Sender::new(false));

/// The user asked to stop.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Starts listening; call once, inside the runtime, before any step.
pub fn install() -> std::io::Result<()> {
    let mut int = signal(SignalKind::interrupt())?;
    let mut term = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
            if TEARING_DOWN.load(Ordering::SeqCst) {
                crate::progress::line("already tearing down; please wait");
            } else {
                crate::progress::line("interrupted: stopping what runs, then tearing down");
                REQUESTED.send_replace(true);
            }
        }
    });
    Ok(())
}

/// Whether a stop was asked for and not yet handed to the tear-down.
#[must_use]
pub fn requested() -> bool {
    *REQUESTED.borrow()
}

/// An error if a stop was asked for; for loops that start no program.
pub fn check() -> Result<(), Interrupted> {
    if requested() {
        Err(Interrupted)
    } else {
        Ok(())
    }
}

/// Resolves when a stop is asked for.
pub async fn wait() -> Interrupted {
    let mut seen = REQUESTED.subscribe();
    // The sender is a static, so the wait can only end with the value.
    let _ = seen.wait_for(|stop| *stop).await;
    Interrupted
}

/// A program that is waited for, for as long as this lives.
pub(crate) struct Running(());

impl Running {
    pub(crate) fn begin() -> Self {
        RUNNING.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// From here on programs run again and signals are only acknowledged. Those that run beside
/// have seen the request and ended before.
pub fn begin_teardown() {
    TEARING_DOWN.store(true, Ordering::SeqCst);
    while requested() && RUNNING.load(Ordering::SeqCst) > 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
    REQUESTED.send_replace(false);
}

//! What the harness is doing, with elapsed times: a live line on a terminal, plain
//! lines elsewhere. Writes to stderr only, so that stdout stays for results.

use std::future::Future;
use std::io::{IsTerminal, Write};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A step shorter than this shows nothing but its result.
const SHOW_AFTER: Duration = Duration::from_secs(2);
/// How often a plain (not terminal) output says that a step still runs.
const PLAIN_EVERY: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_millis(250);

struct Active {
    id: u64,
    what: String,
    note: String,
    started: Instant,
    said: Option<Instant>,
}

struct Screen {
    begun: Instant,
    tty: bool,
    next: u64,
    active: Vec<Active>,
    ticking: bool,
    live: bool,
}

static SCREEN: LazyLock<Mutex<Screen>> = LazyLock::new(|| {
    Mutex::new(Screen {
        begun: Instant::now(),
        tty: std::io::stderr().is_terminal(),
        next: 0,
        active: Vec::new(),
        ticking: false,
        live: false,
    })
});

fn screen() -> MutexGuard<'static, Screen> {
    // A panicking writer leaves nothing half-changed that matters for display.
    SCREEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `m:ss.t` since `d` began.
#[must_use]
pub fn clock(d: Duration) -> String {
    let s = d.as_secs();
    format!("{}:{:02}.{}", s / 60, s % 60, d.subsec_millis() / 100)
}

impl Screen {
    fn print(&mut self, text: &str) {
        let mut err = std::io::stderr().lock();
        let clear = if self.live { "\r\x1b[K" } else { "" };
        // Nothing sensible can be done when stderr is gone.
        let _ = writeln!(err, "{clear}{text}");
        self.live = false;
    }

    fn tick(&mut self) {
        let begun = self.begun;
        if self.tty {
            let shown: Vec<String> = self
                .active
                .iter()
                .filter(|a| a.started.elapsed() >= SHOW_AFTER)
                .map(|a| {
                    let note = if a.note.is_empty() {
                        String::new()
                    } else {
                        format!(" ({})", a.note)
                    };
                    format!("{}{note} {}", a.what, clock(a.started.elapsed()))
                })
                .collect();
            if shown.is_empty() {
                return;
            }
            let mut text = format!("[{}] ... {}", clock(begun.elapsed()), shown.join(" | "));
            if let Some((cut, _)) = text.char_indices().nth(width()) {
                text.truncate(cut);
            }
            let mut err = std::io::stderr().lock();
            let _ = write!(err, "\r\x1b[K{text}");
            let _ = err.flush();
            self.live = true;
            return;
        }
        let mut lines = Vec::new();
        for a in &mut self.active {
            let since = a.said.unwrap_or(a.started).elapsed();
            let due = if a.said.is_none() {
                SHOW_AFTER
            } else {
                PLAIN_EVERY
            };
            if since >= due {
                a.said = Some(Instant::now());
                let note = if a.note.is_empty() {
                    String::new()
                } else {
                    format!(": {}", a.note)
                };
                let at = clock(begun.elapsed());
                lines.push(format!(
                    "[{at}] ... {}{note} ({})",
                    a.what,
                    clock(a.started.elapsed())
                ));
            }
        }
        for l in lines {
            self.print(&l);
        }
    }
}

fn width() -> usize {
    std::env::var("COLUMNS")
        .ok()
        .and_then(|c| c.parse().ok())
        .unwrap_or(118)
}

/// A step under way; dropping it without [`Step::done`] records it as failed.
pub struct Step {
    id: u64,
    finished: bool,
}

impl Step {
    /// Begins a step called `what`.
    #[must_use]
    pub fn begin(what: &str) -> Self {
        let mut s = screen();
        let id = s.next;
        s.next += 1;
        s.active.push(Active {
            id,
            what: what.to_owned(),
            note: String::new(),
            started: Instant::now(),
            said: None,
        });
        if !s.ticking {
            s.ticking = true;
            std::thread::spawn(|| {
                loop {
                    std::thread::sleep(TICK);
                    screen().tick();
                }
            });
        }
        Self {
            id,
            finished: false,
        }
    }

    /// What of the step is being done now, shown beside its name.
    pub fn note(&self, note: impl Into<String>) {
        if let Some(a) = screen().active.iter_mut().find(|a| a.id == self.id) {
            a.note = note.into();
        }
    }

    /// Ends the step well and returns how long it took.
    pub fn done(mut self) -> Duration {
        self.finish("ok")
    }

    fn finish(&mut self, how: &str) -> Duration {
        self.finished = true;
        let mut s = screen();
        let Some(at) = s.active.iter().position(|a| a.id == self.id) else {
            return Duration::ZERO;
        };
        let a = s.active.remove(at);
        let took = a.started.elapsed();
        let now = clock(s.begun.elapsed());
        s.print(&format!("[{now}] {how:<6} {} ({})", a.what, clock(took)));
        took
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.finished {
            self.finish("FAILED");
        }
    }
}

/// Runs `f` as a step.
pub fn step<T, E>(what: &str, f: impl FnOnce(&Step) -> Result<T, E>) -> Result<T, E> {
    let s = Step::begin(what);
    let r = f(&s)?;
    s.done();
    Ok(r)
}

/// Awaits `f` as a step.
pub async fn step_async<T, E>(what: &str, f: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let s = Step::begin(what);
    let r = f.await?;
    s.done();
    Ok(r)
}

/// Prints a line of its own, above the live line.
pub fn line(text: &str) {
    let mut s = screen();
    let at = clock(s.begun.elapsed());
    s.print(&format!("[{at}] {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_counts_minutes_and_tenths() {
        assert_eq!(clock(Duration::from_millis(61_250)), "1:01.2");
        assert_eq!(clock(Duration::from_millis(999)), "0:00.9");
    }
}

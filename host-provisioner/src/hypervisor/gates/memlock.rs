//! QEMU's RLIMIT_MEMLOCK: reading it from proc, setting it with prlimit(2). Decides when it is
//! ours to restore.
#![allow(unsafe_code)]

use std::io;

use super::journal::MemlockRecord;

/// A limit pair in bytes; `None` is "unlimited".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub soft: Option<u64>,
    pub hard: Option<u64>,
}

impl Limit {
    /// Whether `needed` bytes may be locked.
    #[must_use]
    pub fn suffices(&self, needed: u64) -> bool {
        self.soft.is_none_or(|soft| soft >= needed)
    }

    /// This limit raised to at least `needed`; never lowered.
    #[must_use]
    pub fn raised(&self, needed: u64) -> Self {
        Self {
            soft: self.soft.map(|soft| soft.max(needed)),
            hard: self.hard.map(|hard| hard.max(needed)),
        }
    }
}

/// The limit to put back when the last device is gone; `None` when somebody else has changed it
/// since and it is theirs.
#[must_use]
pub fn to_restore(record: &MemlockRecord, now: Limit) -> Option<Limit> {
    let old = Limit {
        soft: record.old_soft,
        hard: record.old_hard,
    };
    (now == old.raised(record.set) && now != old).then_some(old)
}

/// Reads the `Max locked memory` line of /proc/PID/limits.
#[must_use]
pub fn parse(limits: &str) -> Option<Limit> {
    let rest = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?;
    let mut words = rest.split_ascii_whitespace();
    let mut value = || -> Option<Option<u64>> {
        match words.next()? {
            "unlimited" => Some(None),
            number => number.parse().ok().map(Some),
        }
    };
    Some(Limit {
        soft: value()?,
        hard: value()?,
    })
}

/// Sets the limit of another process. Raising the hard limit needs CAP_SYS_RESOURCE.
pub fn set(pid: u32, limit: Limit) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let new = libc::rlimit {
        rlim_cur: limit.soft.unwrap_or(libc::RLIM_INFINITY),
        rlim_max: limit.hard.unwrap_or(libc::RLIM_INFINITY),
    };
    // SAFETY: `new` is a valid rlimit that outlives the call; a null old limit is allowed.
    let result = unsafe {
        libc::prlimit(
            pid,
            libc::RLIMIT_MEMLOCK,
            &raw const new,
            std::ptr::null_mut(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Limit = Limit {
        soft: Some(65_536),
        hard: Some(1 << 20),
    };

    #[test]
    fn a_limit_is_only_ever_raised() {
        assert_eq!(OLD.raised(4096), OLD);
        let up = OLD.raised(1 << 30);
        assert_eq!((up.soft, up.hard), (Some(1 << 30), Some(1 << 30)));
        assert!(up.suffices(1 << 30) && !OLD.suffices(1 << 30));
        let unlimited = Limit {
            soft: None,
            hard: None,
        };
        assert_eq!(unlimited.raised(5), unlimited);
        assert!(unlimited.suffices(u64::MAX));
    }

    #[test]
    fn what_somebody_else_changed_is_theirs() {
        let record = MemlockRecord {
            old_soft: OLD.soft,
            old_hard: OLD.hard,
            set: 1 << 30,
        };
        assert_eq!(to_restore(&record, OLD.raised(1 << 30)), Some(OLD));
        assert_eq!(to_restore(&record, OLD.raised(1 << 31)), None);
        assert_eq!(to_restore(&record, OLD), None);
    }

    #[test]
    fn the_kernels_table_is_read() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\nMax locked memory         67108864             unlimited            bytes\nMax address space         unlimited            unlimited            bytes\n";
        assert_eq!(
            parse(text),
            Some(Limit {
                soft: Some(67_108_864),
                hard: None
            })
        );
        assert_eq!(parse("Max locked memory  x y bytes"), None);
    }

    #[test]
    fn a_real_process_is_limited_and_gets_its_limit_back() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let read = || {
            parse(&std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap())
                .unwrap()
        };
        let before = read();
        // Lowering the soft limit needs no capability.
        let lower = Limit {
            soft: Some(4096),
            hard: before.hard,
        };
        set(child.id(), lower).unwrap();
        assert_eq!(read(), lower);
        set(child.id(), before).unwrap();
        assert_eq!(read(), before);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

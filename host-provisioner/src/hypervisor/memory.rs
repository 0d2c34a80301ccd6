//! How much memory an attachment needs, and whether the node can give it: plain
//! functions over numbers that others have read. All sizes are bytes.
//!
//! VFIO pins every page of guest RAM at once when the first device arrives, under
//! QEMU's big lock. Pages that are not resident yet are faulted in there and then, so a
//! pod that has lived well with a half-used guest can be killed for memory by an
//! attachment.

use std::time::Duration;

use thiserror::Error;

use super::GuestMemory;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What QEMU itself uses beside guest RAM and what its resident size therefore overstates.
/// Counting too little as resident only refuses sooner; counting too much kills.
const QEMU_OWN: u64 = 128 * MIB;

/// A margin on top of what is pinned: page tables, QEMU's growth while it maps.
const MARGIN: u64 = 64 * MIB;

/// One cgroup between QEMU and the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryCgroup {
    pub path: String,
    /// `memory.max`; `None` for "max".
    pub limit: Option<u64>,
    /// `memory.current`.
    pub used: u64,
    /// File pages in `memory.stat` that can be dropped: `inactive_file` + `active_file`.
    pub droppable: u64,
}

impl MemoryCgroup {
    fn room(&self) -> Option<u64> {
        let kept = self.used.saturating_sub(self.droppable);
        self.limit.map(|limit| limit.saturating_sub(kept))
    }
}

/// What `/proc/PID/status` says about QEMU's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// `RssAnon` + `RssShmem`.
    pub resident: u64,
    /// `HugetlbPages`: guest RAM on huge pages is charged elsewhere and present from the start.
    pub hugetlb: u64,
    /// `VmLck`: locked pages, which VFIO's pinned ones are counted among.
    pub locked: u64,
}

/// The numbers that the decision needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryFacts {
    pub guest: GuestMemory,
    pub process: ProcessMemory,
    /// From QEMU's own cgroup to the root.
    pub cgroups: Vec<MemoryCgroup>,
    /// `MemAvailable` of the node.
    pub node_available: u64,
    /// VFIO devices that the VM has already; with one, its RAM is pinned already.
    pub vfio_devices: u32,
}

/// Not enough memory to pin the guest.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "attaching pins all of the VM's memory: {} more are needed, and {place} has room for {}; {advice}",
    mib(*needed), mib(*room)
)]
pub struct InsufficientMemory {
    /// What must become resident.
    pub needed: u64,
    pub room: u64,
    /// Where it does not fit.
    pub place: String,
    pub advice: &'static str,
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(MIB))
}

/// Bytes of guest RAM that an attachment makes resident.
#[must_use]
pub fn not_yet_resident(facts: &MemoryFacts) -> u64 {
    if facts.vfio_devices > 0 {
        return 0;
    }
    let own = facts.process.resident.saturating_sub(QEMU_OWN);
    facts
        .guest
        .present
        .saturating_sub(facts.process.hugetlb)
        .saturating_sub(own)
}

/// Whether the guest's memory can be pinned without anybody being killed for it.
pub fn check(facts: &MemoryFacts) -> Result<u64, InsufficientMemory> {
    let missing = not_yet_resident(facts);
    if missing == 0 {
        return Ok(0);
    }
    let needed = missing.saturating_add(MARGIN);
    for cgroup in &facts.cgroups {
        if let Some(room) = cgroup.room()
            && room < needed
        {
            return Err(InsufficientMemory {
                needed,
                room,
                place: format!("the memory limit of {}", cgroup.path),
                advice: "raise the memory limit of the VM (its overhead) and restart it",
            });
        }
    }
    if facts.node_available < needed {
        return Err(InsufficientMemory {
            needed,
            room: facts.node_available,
            place: "the node".to_owned(),
            advice: "free memory on the node or move another VM away",
        });
    }
    Ok(needed)
}

/// The memlock limit QEMU needs for `vfio_devices` devices, the coming one included.
///
/// Without a vIOMMU all devices share one address space that maps guest RAM
/// once; with one each device has its own and the guest's too. `mlocked` is
/// what the process had locked before its first VFIO device (`VmLck` then).
#[must_use]
pub fn needed_memlock(guest: GuestMemory, viommu: bool, vfio_devices: u32, mlocked: u64) -> u64 {
    let spaces = if viommu {
        u64::from(vfio_devices).saturating_add(1)
    } else {
        1
    };
    guest
        .maximum
        .max(guest.present)
        .saturating_mul(spaces)
        .saturating_add(mlocked)
        .saturating_add(GIB)
        .saturating_add(guest.device)
}

/// How long to wait for `device_add`: faulting in and pinning is about 1 GiB a second on a slow
/// node, and a timeout costs an unknown outcome.
#[must_use]
pub fn attach_timeout(not_resident: u64, guest: GuestMemory) -> Duration {
    let seconds = 60 + not_resident.div_ceil(GIB) * 2 + guest.maximum.div_ceil(GIB);
    Duration::from_secs(seconds)
}

/// Reads the memory lines of `/proc/PID/status`.
#[must_use]
pub fn parse_status(text: &str) -> ProcessMemory {
    let field = |name: &str| kib_field(text, name).unwrap_or(0);
    ProcessMemory {
        resident: field("RssAnon").saturating_add(field("RssShmem")),
        hugetlb: field("HugetlbPages"),
        locked: field("VmLck"),
    }
}

/// A `Name:   123 kB` line of a proc file, in bytes.
#[must_use]
pub fn kib_field(text: &str, name: &str) -> Option<u64> {
    let rest = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A `name 123` line of `memory.stat`.
#[must_use]
pub fn stat_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        (key == name).then(|| value.trim().parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn facts() -> MemoryFacts {
        MemoryFacts {
            guest: GuestMemory {
                present: 2 * GIB,
                maximum: 2 * GIB,
                device: 16 * MIB,
            },
            process: ProcessMemory {
                resident: 600 * MIB,
                hugetlb: 0,
                locked: 0,
            },
            cgroups: vec![MemoryCgroup {
                path: "/kubepods".into(),
                limit: Some(3 * GIB),
                used: 700 * MIB,
                droppable: 50 * MIB,
            }],
            node_available: 8 * GIB,
            vfio_devices: 0,
        }
    }

    #[test]
    fn what_fits_is_allowed_with_its_size() {
        assert_eq!(
            check(&facts()),
            Ok(2 * GIB - (600 * MIB - QEMU_OWN) + MARGIN)
        );
    }

    #[test]
    fn every_limit_on_the_way_counts() {
        let mut f = facts();
        f.cgroups.push(MemoryCgroup {
            path: "/".into(),
            limit: Some(2 * GIB),
            used: 1900 * MIB,
            droppable: 0,
        });
        let e = check(&f).unwrap_err();
        assert_eq!((e.room, e.place.contains('/')), (148 * MIB, true));
        assert!(e.to_string().contains("148 MiB"), "{e}");

        let mut f = facts();
        f.node_available = GIB;
        assert!(check(&f).unwrap_err().to_string().contains("the node"));
    }

    #[test]
    fn file_pages_count_as_room_and_no_limit_is_no_limit() {
        let mut f = facts();
        f.cgroups[0].used = 3 * GIB;
        f.cgroups[0].droppable = 2300 * MIB;
        assert!(check(&f).is_ok());
        f.cgroups[0].droppable = 0;
        assert!(check(&f).is_err());
        f.cgroups[0].limit = None;
        assert!(check(&f).is_ok());
    }

    #[test]
    fn huge_pages_and_a_pinned_guest_need_nothing() {
        let mut f = facts();
        f.node_available = 0;
        f.process.hugetlb = 2 * GIB;
        assert_eq!(check(&f), Ok(0));
        let mut f = facts();
        f.node_available = 0;
        f.vfio_devices = 1;
        assert_eq!(check(&f), Ok(0));
    }

    #[test]
    fn memlock_follows_the_address_spaces() {
        let guest = facts().guest;
        assert_eq!(needed_memlock(guest, false, 5, 0), 3 * GIB + 16 * MIB);
        assert_eq!(
            needed_memlock(guest, true, 2, MIB),
            7 * GIB + 16 * MIB + MIB
        );
    }

    #[test]
    fn proc_files_are_read() {
        let status = "Name:\tqemu\nVmLck:\t     12 kB\nRssAnon:\t    1000 kB\nRssFile:\t 5 kB\nRssShmem:\t      24 kB\nHugetlbPages:\t       0 kB\n";
        assert_eq!(
            parse_status(status),
            ProcessMemory {
                resident: 1024 * 1024,
                hugetlb: 0,
                locked: 12 * 1024
            }
        );
        assert_eq!(
            stat_field("anon 1\ninactive_file 77\n", "inactive_file"),
            Some(77)
        );
        assert_eq!(kib_field("MemAvailable: x kB\n", "MemAvailable"), None);
    }

    proptest! {
        #[test]
        fn what_is_allowed_fits_everywhere(
            present in 0..1u64 << 40, resident in 0..1u64 << 40, limit in 0..1u64 << 41,
            used in 0..1u64 << 41, droppable in 0..1u64 << 41, available in 0..1u64 << 41,
        ) {
            let mut f = facts();
            f.guest.present = present;
            f.process.resident = resident;
            f.node_available = available;
            f.cgroups[0].limit = Some(limit);
            f.cgroups[0].used = used;
            f.cgroups[0].droppable = droppable;
            if let Ok(needed) = check(&f) && needed > 0 {
                prop_assert!(needed <= available);
                prop_assert!(used.saturating_sub(droppable).saturating_add(needed) <= limit);
            }
        }
    }
}

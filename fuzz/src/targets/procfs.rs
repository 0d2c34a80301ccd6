//! What `/proc` and cgroup files say of a process that is somebody else's: it names its command,
//! its arguments and the cgroups below its own as it likes.

use host_provisioner::cpus::CpuList;
use host_provisioner::hypervisor::fuzzing as launcher;
use host_provisioner::hypervisor::gates::journal::{Journal, MemlockRecord};
use host_provisioner::hypervisor::gates::memlock::{self, Limit};
use host_provisioner::hypervisor::memory;
use host_provisioner::hypervisor::{GuestMemory, memory::MemoryFacts};

use super::Bytes;

const OURS: &str = "0a1b2c3d-1111-2222-3333-444455556666";
const OTHER: &str = "ffffffff-1111-2222-3333-444455556666";

pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    texts(&text);
    named_by_the_tenant(&text);
    let _ = launcher::is_capability_probe(data);
    limits(data);
    if let Ok(journal) = serde_json::from_slice::<Journal>(data) {
        let kept = serde_json::to_vec(&journal).expect("a journal can be written");
        assert_eq!(serde_json::from_slice::<Journal>(&kept).ok(), Some(journal));
    }
}

/// Any text in the place of any file.
fn texts(text: &str) {
    let _ = launcher::start_time(text);
    let _ = launcher::effective_id(text, "Uid");
    if let Some(path) = launcher::unified_cgroup(text) {
        assert!(path.is_absolute(), "{}", path.display());
        let up = path.components().any(|c| c.as_os_str() == "..");
        assert!(!up, "{} leads out of the hierarchy", path.display());
    }
    for line in text.lines() {
        let (ours, other) = (
            launcher::names_pod(line, OURS),
            launcher::names_pod(line, OTHER),
        );
        assert!(!(ours && other), "{line:?} is two pods'");
        assert!(!launcher::names_pod(line, ""));
    }
    if launcher::is_vcpu(text) {
        assert!(text.starts_with("CPU "), "{text:?} is no vCPU");
    }
    if let Ok(cpus) = text.parse::<CpuList>() {
        assert_eq!(cpus.meets(&cpus), !text.is_empty());
    }
    if let Some(group) = launcher::vfio_group(text) {
        assert!(text.starts_with("/dev/vfio/"), "{text:?} is group {group}");
    }
    let process = memory::parse_status(text);
    let guest = GuestMemory {
        present: process.resident,
        maximum: process.locked,
        device: process.hugetlb,
    };
    let needed = memory::needed_memlock(guest, true, 3, process.locked);
    assert!(needed >= guest.present.max(guest.maximum));
    let available = memory::kib_field(text, "MemAvailable").unwrap_or(0);
    let _ = memory::stat_field(text, "inactive_file");
    let facts = MemoryFacts {
        guest,
        process,
        cgroups: Vec::new(),
        node_available: available,
        vfio_devices: 0,
    };
    let _ = memory::attach_timeout(memory::not_yet_resident(&facts), guest);
    if let Ok(needed) = memory::check(&facts) {
        assert!(needed <= available);
    }
    if let Some(limit) = memlock::parse(text) {
        assert_eq!(memlock::parse(&line_of(limit)), Some(limit));
    }
}

/// The text where a tenant can put it; all else is as the kernel writes it.
fn named_by_the_tenant(text: &str) {
    let text: String = text.chars().filter(|c| *c != '\n').take(200).collect();
    let stat = format!("7 ({text}) S 1 1 1 0 -1 4194560 1 0 0 0 1 1 0 0 20 0 4 0 1277 1 1");
    assert_eq!(launcher::start_time(&stat), Some(1277), "{stat}");
    let status = format!("Name:\t{text}\nUid:\t107\t108\t107\t107\nVmLck:\t4 kB\n");
    assert_eq!(
        launcher::effective_id(&status, "Uid"),
        Some(108),
        "{status}"
    );
    assert_eq!(memory::parse_status(&status).locked, 4096, "{status}");
    let pod = OURS.replace('-', "_");
    for line in [
        format!("0::/kubepods.slice/kubepods-burstable-pod{pod}.slice/cri-x.scope/{text}"),
        format!("0::/kubepods/besteffort/pod{OURS}/x/{text}"),
    ] {
        assert!(launcher::names_pod(&line, OURS), "{line}");
        assert!(!launcher::names_pod(&line, OTHER), "{line}");
    }
}

fn line_of(limit: Limit) -> String {
    let word = |n: Option<u64>| n.map_or("unlimited".to_owned(), |n| n.to_string());
    let (soft, hard) = (word(limit.soft), word(limit.hard));
    format!("Max cpu time 1 2 s\nMax locked memory         {soft} {hard} bytes\n")
}

/// Limits of any size: only ever raised, put back only when they are ours.
fn limits(data: &[u8]) {
    let mut bytes = Bytes(data);
    let flags = bytes.byte();
    let mut number = |flag: u8| {
        let n = u64::from_le_bytes(bytes.take());
        (flags & flag == 0).then_some(n)
    };
    let old = Limit {
        soft: number(1),
        hard: number(2),
    };
    let now = Limit {
        soft: number(4),
        hard: number(8),
    };
    let needed = u64::from_le_bytes(bytes.take());
    let raised = old.raised(needed);
    assert!(raised.suffices(needed));
    let least = |a: Option<u64>, b: Option<u64>| a.is_none() || b.is_some_and(|b| a >= Some(b));
    assert!(least(raised.soft, old.soft) && least(raised.hard, old.hard));
    assert_eq!(memlock::parse(&line_of(raised)), Some(raised));
    let record = MemlockRecord {
        old_soft: old.soft,
        old_hard: old.hard,
        set: needed,
    };
    assert!(memlock::to_restore(&record, now).is_none_or(|back| now == raised && back == old));
    let back = memlock::to_restore(&record, raised);
    assert_eq!(back, (raised != old).then_some(old));
}

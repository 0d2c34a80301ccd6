//! The backend `nvme` on a real subsystem: VFs are made, a namespace is handed to one, written
//! to through it, taken back erased, and handed to another, which finds nothing. Changes the
//! hardware and erases its first namespace, so it runs only when asked:
//!
//! `VF_TEST_NVME_PF=0000:02:00.0 cargo test -p host-provisioner --features hardware-tests --test hardware_nvme`
//!
//! The PF has no VFs, and at least two namespaces that are attached to no controller. The host
//! plays the guest: its own driver nvme drives the VF.

// A test's helpers are tests too; clippy knows only functions marked as such.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod emptied;

use std::env;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::pci::PciAddress;
use host_provisioner::driver::{DriverError, driver_for};
use host_provisioner::kernel::nvme::{Controller, Resource, Subsystem};
use host_provisioner::kernel::{
    Kernel as _, KernelError, RealKernel, Roots, Storage, VfConfig, VfFacts,
};

use emptied::Emptied;

const SECRET: &[u8] = b"the last guest's";

fn pf() -> PciAddress {
    env::var("VF_TEST_NVME_PF")
        .expect("VF_TEST_NVME_PF names the PF to test with, as in 0000:02:00.0")
        .parse()
        .unwrap()
}

fn sysfs(function: PciAddress) -> PathBuf {
    PathBuf::from(format!("/sys/bus/pci/devices/{function}"))
}

/// Tries for half a minute.
fn within<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The disk that the driver nvme of this host makes of the VF's namespace, until it is dropped.
struct Guest {
    vf: PciAddress,
    disk: PathBuf,
}

impl Guest {
    fn of(vf: &VfFacts) -> Self {
        let vf = vf.address;
        fs::write(sysfs(vf).join("driver_override"), "nvme").unwrap();
        fs::write("/sys/bus/pci/drivers_probe", vf.to_string()).unwrap();
        let disk = within("a disk of the VF", || {
            let controller = fs::read_dir(sysfs(vf).join("nvme")).ok()?.next()?.ok()?;
            let names = fs::read_dir(controller.path()).ok()?.flatten();
            let mut names = names.filter_map(|entry| entry.file_name().into_string().ok());
            let name = names.find(|name| name.starts_with("nvme") && name.contains('n'))?;
            // nvme0c3n1 is the path of the disk nvme0n1.
            let (before, namespace) = name.rsplit_once('n')?;
            let subsystem = before.strip_prefix("nvme")?.split('c').next()?;
            let disk = PathBuf::from(format!("/dev/nvme{subsystem}n{namespace}"));
            (!before.is_empty() && disk.exists()).then_some(disk)
        });
        Self { vf, disk }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        let disk = OpenOptions::new().write(true).open(&self.disk).unwrap();
        disk.write_all_at(bytes, offset).unwrap();
        disk.sync_all().unwrap();
    }

    fn read(&self) -> Vec<u8> {
        // Nothing of an earlier opening is cached: the kernel forgets it with the last one
        // (block/bdev.c, blkdev_flush_mapping).
        fs::read(&self.disk).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        fs::write(sysfs(self.vf).join("driver/unbind"), self.vf.to_string()).unwrap();
        fs::write(sysfs(self.vf).join("driver_override"), "\n").unwrap();
    }
}

fn has_secret(content: &[u8]) -> bool {
    content.windows(SECRET.len()).any(|part| part == SECRET)
}

#[test]
fn a_namespace_is_handed_on_and_the_next_one_finds_nothing() {
    let began = Instant::now();
    let said = |what: &str| println!("{:7.3} s: {what}", began.elapsed().as_secs_f64());
    let kernel = RealKernel::new(Roots::default());
    let facts = kernel.physical_function(pf()).unwrap();
    println!("{facts:?}");
    assert_eq!(facts.num_vfs, 0, "the PF has VFs already");
    assert_eq!(facts.in_use_by_host, None);
    let driver = driver_for(&facts).expect("a backend for the PF");
    assert_eq!(driver.name(), "nvme");
    let of = Subsystem {
        nvme: kernel.nvme(),
        pf: pf(),
    };
    let controller: Controller = of.controller().unwrap();
    println!("{controller:?} {:?}", of.primary().unwrap());
    let namespaces = of.namespaces().unwrap();
    let [first, second, ..] = namespaces[..] else {
        panic!("two namespaces, not {namespaces:?}")
    };
    println!("{:?}", of.format_of(first).unwrap());
    for nsid in [first, second] {
        assert_eq!(
            of.attached(nsid).unwrap(),
            [0; 0],
            "namespace {nsid} is attached"
        );
    }

    // As a card is that nobody has told anything: its primary controller has all resources.
    let before = of.primary().unwrap();
    if let Some(pool) = before.queues {
        let all = u16::try_from(pool.total).unwrap();
        of.allocate(before.id, Resource::Queues, all).unwrap();
        kernel.nvme().reset(pf()).unwrap();
        assert_eq!(of.primary().unwrap().queues.unwrap().primary, all);
        said("the PF has its queues");
    }
    driver.create(&kernel, &facts, facts.total_vfs).unwrap();
    let _emptied = Emptied(&kernel, driver, &facts);
    said("VFs made");
    println!(
        "{:?} {:?}",
        of.primary().unwrap(),
        of.secondaries().unwrap()
    );
    assert!(of.secondaries().unwrap().iter().all(|found| found.online));
    let error = kernel.nvme().reset(pf()).unwrap_err();
    assert!(matches!(error, KernelError::HasVfs(_)), "{error}");
    let vfs = kernel.virtual_functions(pf()).unwrap();
    assert_eq!(vfs.len(), usize::from(facts.total_vfs));
    assert!(vfs.iter().all(|vf| vf.driver.is_none()), "{vfs:?}");
    let clean = driver.capabilities(&facts).clean(vfs[0].address);
    let now = |vf: &VfFacts| driver.settings(&kernel, &facts, vf.index).unwrap();
    assert_eq!(now(&vfs[0]), clean);

    let want = VfConfig::of_storage(Storage::Namespace(first));
    let other = VfConfig::of_storage(Storage::Namespace(second));
    kernel.reset_function(vfs[0].address).unwrap();
    driver.setup(&kernel, &facts, &vfs[0], &want).unwrap();
    driver.setup(&kernel, &facts, &vfs[1], &other).unwrap();
    assert_eq!((now(&vfs[0]), now(&vfs[1])), (want, other));
    // A reset of the function, as vfio makes it, takes nothing away.
    kernel.reset_function(vfs[0].address).unwrap();
    assert_eq!(now(&vfs[0]), want);
    for (vf, words) in [(&vfs[2], "already"), (&vfs[1], "of somebody else")] {
        let error = driver.setup(&kernel, &facts, vf, &want).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    said("namespaces given");
    {
        let neighbour = Guest::of(&vfs[1]);
        neighbour.write(4096, SECRET);
        let guest = Guest::of(&vfs[0]);
        let size = guest.read().len();
        println!("{} of {size} bytes", guest.disk.display());
        guest.write(0, SECRET);
        guest.write(size as u64 - 512, SECRET);
        assert!(has_secret(&guest.read()));
        said("written through the VFs");
    }
    // What the driver nvme of the host has of VFs is not the PF's.
    let facts = kernel.physical_function(pf()).unwrap();
    assert_eq!(facts.in_use_by_host, None);
    let error = driver.remove_all(&kernel, &facts).unwrap_err();
    assert!(matches!(error, DriverError::Storage { .. }), "{error}");

    driver.teardown(&kernel, &facts, &vfs[0]).unwrap();
    said("taken back, erased");
    assert_eq!(now(&vfs[0]), clean);
    assert_eq!(now(&vfs[1]), other, "the neighbour's is untouched");
    assert_eq!(of.attached(first).unwrap(), [0; 0]);
    driver.setup(&kernel, &facts, &vfs[2], &want).unwrap();
    {
        let next = Guest::of(&vfs[2]);
        assert!(next.read().iter().all(|byte| *byte == 0));
        let neighbour = Guest::of(&vfs[1]);
        assert!(has_secret(&neighbour.read()));
    }
    said("the next one found nothing");
    for vf in [&vfs[1], &vfs[2]] {
        driver.teardown(&kernel, &facts, vf).unwrap();
    }
    let facts = kernel.physical_function(pf()).unwrap();
    assert_eq!(facts.in_use_by_host, None);
    driver.remove_all(&kernel, &facts).unwrap();
    assert!(kernel.virtual_functions(pf()).unwrap().is_empty());
    said("VFs gone");
}

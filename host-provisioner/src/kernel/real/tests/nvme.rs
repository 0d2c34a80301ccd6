//! NVMe PFs: what sysfs says of them, and when one is not reset.

use super::*;
use crate::kernel::KernelError;
use crate::kernel::nvme::Subsystem;

const DEVICE: &str = "bus/pci/devices/0000:01:00.0";

/// The PF has a controller that works, and no network interface.
fn disks() -> (Emulated, RealKernel) {
    let host = Emulated::new();
    host.without_interface();
    let controller = |name: &str, text: &str| {
        host.file(&format!("{DEVICE}/nvme/nvme7/{name}"), text);
    };
    controller("state", "live\n");
    controller("serial", "S6NF 01 \n");
    host.file(&format!("{DEVICE}/reset"), "");
    host.file(&format!("{DEVICE}/reset_method"), "flr bus\n");
    let kernel = host.kernel();
    (host, kernel)
}

#[test]
fn a_pf_is_reset_only_while_it_has_no_vfs_and_as_a_function_alone() {
    let (host, kernel) = disks();
    kernel.nvme().reset(pf()).unwrap();
    let reset = (format!("/{DEVICE}/reset"), "1".to_owned());
    assert_eq!(host.writes(), [reset]);

    host.forget_writes();
    host.file(&format!("{DEVICE}/reset_method"), "bus\n");
    let error = kernel.nvme().reset(pf()).unwrap_err();
    assert!(
        error.to_string().contains("function level reset"),
        "{error}"
    );

    host.file(&format!("{DEVICE}/reset_method"), "flr bus\n");
    kernel.set_num_vfs(pf(), 2).unwrap();
    host.forget_writes();
    let error = kernel.nvme().reset(pf()).unwrap_err();
    assert!(matches!(error, KernelError::HasVfs(_)), "{error}");
    assert_eq!(host.writes(), []);
}

#[test]
fn a_namespace_that_the_host_has_makes_the_pf_its_own_unless_it_was_lent() {
    let (host, kernel) = disks();
    let used = || kernel.physical_function(pf()).unwrap().in_use_by_host;
    assert_eq!(used(), None);
    host.file(&format!("{DEVICE}/nvme/nvme7/nvme2c7n1/nsid"), "3\n");
    host.file(&format!("{DEVICE}/nvme/nvme7/hwmon3/name"), "nvme\n");
    let words = used().unwrap();
    assert!(words.contains("/dev/nvme2n1 (namespace 3)"), "{words}");
    assert_eq!(
        kernel.physical_functions().unwrap()[0].in_use_by_host,
        Some(words)
    );
    let lent = kernel.nvme().lend(pf(), 3);
    assert_eq!(used(), None);
    let other = kernel.nvme().lend(pf(), 4);
    drop(lent);
    assert!(used().is_some());
    drop(other);
}

#[test]
fn a_card_without_a_serial_number_of_its_own_has_its_controllers() {
    let (host, kernel) = disks();
    host.file(&format!("{DEVICE}/config"), "");
    let facts = kernel.physical_function(pf()).unwrap();
    assert_eq!(facts.serial.as_deref(), Some("S6NF 01"));
    assert_eq!(facts.identity, "8086:10c9 serial S6NF 01 function 0");
}

#[test]
fn what_is_no_controller_says_so() {
    let kernel = Emulated::new().kernel();
    let of = Subsystem {
        nvme: kernel.nvme(),
        pf: pf(),
    };
    for error in [
        of.controller().unwrap_err(),
        kernel.nvme().reset(pf()).unwrap_err(),
    ] {
        assert!(matches!(error, KernelError::NoNvmeController(_)), "{error}");
    }
    let (host, kernel) = disks();
    host.device_file("nvme7");
    let of = Subsystem {
        nvme: kernel.nvme(),
        pf: pf(),
    };
    let error = of.controller().unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOTTY), "{error}");
    assert!(error.to_string().contains("Identify Controller"), "{error}");
}

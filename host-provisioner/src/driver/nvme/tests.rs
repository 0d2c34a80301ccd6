//! The backend over the fake subsystem, which has QEMU's manners.

use super::*;
use crate::driver::driver_for;
use crate::kernel::fake::{FakeKernel, Formats, PRIMARY, Write, nvme_pf};
use crate::kernel::nvme::Nvme as _;

const SECRET: &[u8] = b"the last guest's";

fn pf() -> PfFacts {
    nvme_pf("0000:04:00.0".parse().unwrap())
}

/// Four VFs and the namespaces 1 to 3.
fn made() -> (FakeKernel, PfFacts, Vec<VfFacts>) {
    let kernel = FakeKernel::new([pf()]);
    kernel.give_namespaces(pf().address, 1..=3);
    Nvme.create(&kernel, &pf(), 4).unwrap();
    let vfs = kernel.virtual_functions(pf().address).unwrap();
    (kernel, pf(), vfs)
}

fn namespace(nsid: u32) -> VfConfig {
    VfConfig::of_storage(Storage::Namespace(nsid))
}

fn of(kernel: &FakeKernel, index: u16) -> VfConfig {
    Nvme.settings(kernel, &pf(), index).unwrap()
}

/// A VF whose guest has written to its namespace.
fn used(kernel: &FakeKernel, vf: &VfFacts, nsid: u32) {
    Nvme.setup(kernel, &pf(), vf, &namespace(nsid)).unwrap();
    kernel.write_namespace(pf().address, nsid, 9000, SECRET);
}

fn holds_the_secret(kernel: &FakeKernel, nsid: u32) -> bool {
    let content = kernel.namespace(pf().address, nsid);
    content.windows(SECRET.len()).any(|part| part == SECRET)
}

fn commands(kernel: &FakeKernel) -> Vec<String> {
    let words = |write| match write {
        Write::Nvme { command, .. } => command,
        Write::NumVfs { count, .. } => format!("{count} VFs"),
        Write::Reset(function) => format!("reset {function}"),
        other => format!("{other:?}"),
    };
    kernel.writes().into_iter().map(words).collect()
}

#[test]
fn it_is_found_by_its_kernel_driver() {
    assert_eq!(driver_for(&pf()).map(|driver| driver.name()), Some("nvme"));
}

#[test]
fn each_vf_gets_its_share_after_one_reset_of_the_idle_pf() {
    let (kernel, pf, vfs) = made();
    assert_eq!(vfs.len(), 4);
    let done = commands(&kernel);
    let before = [
        "allocate 0 queues to the primary controller 0",
        "allocate 0 interrupts to the primary controller 0",
        "reset 0000:04:00.0",
        "4 VFs",
        "assign 2 queues to the secondary controller 1",
        "assign 2 interrupts to the secondary controller 1",
        "take the secondary controller 1 online",
    ];
    assert_eq!(done[..7], before);
    assert_eq!(done.len(), 4 + 3 * 4);
    for index in 0..4 {
        assert_eq!(of(&kernel, index), VfConfig::of_storage(Storage::Nothing));
    }
    // Again: nothing to do.
    Nvme.create(&kernel, &pf, 4).unwrap();
    assert_eq!(commands(&kernel), done);
    // Fewer have more each as far as one can have it, and the PF is not reset for them.
    Nvme.remove_all(&kernel, &pf).unwrap();
    Nvme.create(&kernel, &pf, 2).unwrap();
    let resets = |write: &&String| write.starts_with("reset");
    assert_eq!(commands(&kernel).iter().filter(resets).count(), 1);
    assert_eq!(kernel.violations(), [""; 0]);
}

#[test]
fn a_pf_with_vfs_is_not_reset() {
    let kernel = FakeKernel::new([pf()]);
    kernel.give_vfs(pf().address, 4);
    let error = Nvme.create(&kernel, &pf(), 4).unwrap_err();
    assert!(
        matches!(error, DriverError::Kernel(KernelError::HasVfs(_))),
        "{error}"
    );
    let error = kernel.nvme().reset(pf().address).unwrap_err();
    assert!(matches!(error, KernelError::HasVfs(_)), "{error}");
    assert!(!commands(&kernel).iter().any(|w| w.starts_with("reset")));
}

#[test]
fn a_controller_that_erases_all_is_not_used() {
    let kernel = FakeKernel::new([pf()]);
    kernel.formats(pf().address, Formats::All);
    let words = Nvme.create(&kernel, &pf(), 4).unwrap_err().to_string();
    assert!(words.contains("erases all namespaces"), "{words}");
    assert_eq!(commands(&kernel), [""; 0]);
}

#[test]
fn a_controller_that_lacks_a_command_says_which() {
    let kernel = FakeKernel::new([pf()]);
    let of = subsystem(&kernel, &pf());
    let all = of.controller().unwrap();
    able(of, all).unwrap();
    type Lack = fn(&mut Controller);
    let lacks: [(Lack, &str); 3] = [
        (|c| c.virtualizes = false, "no Virtualization Management"),
        (|c| c.manages_namespaces = false, "no Namespace Attachment"),
        (|c| c.formats = false, "no Format NVM"),
    ];
    for (lack, expected) in lacks {
        let mut less = all;
        lack(&mut less);
        let words = able(of, less).unwrap_err().to_string();
        assert!(words.contains(expected), "{words}");
    }
}

#[test]
fn more_vfs_than_there_are_queues_for_are_refused_before_anything_is_written() {
    let kernel = FakeKernel::new([pf()]);
    let of = subsystem(&kernel, &pf());
    let primary = of.primary().unwrap();
    Share::of(of, primary, 4).unwrap();
    let words = Share::of(of, primary, 5).unwrap_err().to_string();
    assert!(
        words.contains("numVFs") && words.contains("at most 4"),
        "{words}"
    );
    Nvme.create(&kernel, &pf(), 5).unwrap_err();
    assert_eq!(commands(&kernel), [""; 0]);
}

#[test]
fn a_long_list_of_secondary_controllers_is_read_to_its_end() {
    let many = PfFacts {
        total_vfs: 200,
        ..pf()
    };
    let kernel = FakeKernel::new([many.clone()]);
    let listed = subsystem(&kernel, &many).secondaries().unwrap();
    let ids: Vec<u16> = listed.iter().map(|found| found.id).collect();
    assert_eq!(ids, (1..=200).collect::<Vec<u16>>());
}

#[test]
fn a_namespace_goes_to_one_controller() {
    let (kernel, pf, vfs) = made();
    Nvme.setup(&kernel, &pf, &vfs[1], &namespace(2)).unwrap();
    assert_eq!(of(&kernel, 1), namespace(2));
    assert_eq!(kernel.controllers_of(pf.address, 2), [2]);
    // Again: nothing to do. To another, or beside it: refused, and nothing is written.
    let before = commands(&kernel);
    Nvme.setup(&kernel, &pf, &vfs[1], &namespace(2)).unwrap();
    for (vf, nsid, expected) in [
        (&vfs[0], 2, "attached to controller 2 already"),
        (&vfs[1], 3, "has namespace 2 of somebody else"),
        (&vfs[0], 9, "there is no namespace 9; there are 1, 2, 3"),
    ] {
        let error = Nvme.setup(&kernel, &pf, vf, &namespace(nsid)).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert_eq!(commands(&kernel), before);
    // Nor one that the host has.
    kernel.attach_namespace(pf.address, 3, PRIMARY);
    let error = Nvme
        .setup(&kernel, &pf, &vfs[0], &namespace(3))
        .unwrap_err();
    assert!(
        error.to_string().contains("controller 0 already"),
        "{error}"
    );
}

#[test]
fn what_a_network_card_has_is_refused() {
    let (kernel, pf, vfs) = made();
    let before = commands(&kernel);
    let error = Nvme.setup(&kernel, &pf, &vfs[0], &VfConfig::CLEAN);
    assert!(matches!(error, Err(DriverError::Unsupported(_))));
    assert_eq!(commands(&kernel), before);
}

#[test]
fn nothing_of_the_last_guest_is_left() {
    let (kernel, pf, vfs) = made();
    used(&kernel, &vfs[0], 1);
    used(&kernel, &vfs[2], 3);
    kernel.give_to_guest(vfs[2].address, true);
    kernel.give_driver(vfs[2].address, Some(crate::kernel::VFIO_PCI));
    assert!(holds_the_secret(&kernel, 1));
    Nvme.teardown(&kernel, &pf, &vfs[0]).unwrap();
    assert!(
        kernel
            .namespace(pf.address, 1)
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(kernel.controllers_of(pf.address, 1), [0; 0]);
    assert_eq!(of(&kernel, 0), Nvme.capabilities(&pf).clean(vfs[0].address));
    let done = commands(&kernel);
    let last = [
        "reset 0000:04:10.0",
        "attach namespace 1 to controller 0",
        "Format NVM of namespace 1",
        "detach namespace 1 from controller 0",
        "detach namespace 1 from controller 1",
    ];
    assert_eq!(done[done.len() - 5..], last);
    // The neighbour has all that it had.
    assert!(holds_the_secret(&kernel, 3));
    assert_eq!(of(&kernel, 2), namespace(3));
    assert_eq!(kernel.violations(), [""; 0]);
    // The next guest may have it, by another VF.
    Nvme.setup(&kernel, &pf, &vfs[3], &namespace(1)).unwrap();
}

#[test]
fn what_is_not_proven_erased_stays_with_its_controller() {
    let (kernel, pf, vfs) = made();
    used(&kernel, &vfs[0], 1);
    // In the part that this format leaves.
    kernel.write_namespace(pf.address, 1, 65_100, SECRET);
    kernel.formats(pf.address, Formats::Not);
    let error = Nvme.teardown(&kernel, &pf, &vfs[0]).unwrap_err();
    assert!(matches!(error, DriverError::NotClean { .. }));
    assert!(error.to_string().contains("from byte 65100 on"), "{error}");
    assert_eq!(kernel.controllers_of(pf.address, 1), [1]);
    assert_eq!(of(&kernel, 0), namespace(1));
    kernel.formats(pf.address, Formats::Truly);
    Nvme.teardown(&kernel, &pf, &vfs[0]).unwrap();
    assert!(!holds_the_secret(&kernel, 1));
}

#[test]
fn a_step_that_fails_is_told_and_the_next_try_finishes() {
    for call in ["format", "open", "attach", "detach", "reset_function"] {
        let (kernel, pf, vfs) = made();
        used(&kernel, &vfs[0], 1);
        kernel.fail_next(call, libc::EIO);
        let error = Nvme.teardown(&kernel, &pf, &vfs[0]).unwrap_err();
        let DriverError::NotClean { errors, .. } = &error else {
            panic!("{call}: {error}")
        };
        assert_eq!(errors.len(), 1, "{call}: {error}");
        assert_eq!(errors[0].errno(), Some(libc::EIO), "{call}");
        if !["detach", "reset_function"].contains(&call) {
            assert_eq!(kernel.controllers_of(pf.address, 1), [1], "{call}");
        }
        Nvme.teardown(&kernel, &pf, &vfs[0]).unwrap();
        assert!(!holds_the_secret(&kernel, 1), "{call}");
        assert_eq!(kernel.controllers_of(pf.address, 1), [0; 0], "{call}");
        let facts = kernel.physical_function(pf.address).unwrap();
        assert_eq!(facts.in_use_by_host, None, "{call}");
    }
}

#[test]
fn what_the_host_has_mounted_is_not_erased() {
    let (kernel, pf, vfs) = made();
    used(&kernel, &vfs[0], 1);
    kernel.mount(pf.address, 1);
    let error = Nvme.teardown(&kernel, &pf, &vfs[0]).unwrap_err();
    let DriverError::NotClean { errors, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(errors[0].errno(), Some(libc::EBUSY), "{error}");
    assert!(holds_the_secret(&kernel, 1));
    assert_eq!(kernel.controllers_of(pf.address, 1), [1]);
}

#[test]
fn what_another_controller_has_too_is_not_erased() {
    let (kernel, pf, vfs) = made();
    used(&kernel, &vfs[0], 1);
    kernel.attach_namespace(pf.address, 1, 2);
    assert_eq!(
        of(&kernel, 0).storage,
        Storage::Amiss("a namespace that another controller has too")
    );
    let error = Nvme.teardown(&kernel, &pf, &vfs[0]).unwrap_err();
    assert!(
        error.to_string().contains("controller 2 as well"),
        "{error}"
    );
    assert!(holds_the_secret(&kernel, 1));
    assert_eq!(kernel.controllers_of(pf.address, 1), [1, 2]);
}

#[test]
fn a_reset_of_the_pf_behind_our_back_is_seen_and_made_good() {
    let (kernel, pf, vfs) = made();
    used(&kernel, &vfs[0], 1);
    kernel.reset_controller(pf.address);
    let drifted = of(&kernel, 0);
    assert_eq!(
        drifted.storage,
        Storage::Amiss("a controller that is offline")
    );
    assert_eq!(namespace(1).drift(&drifted), ["namespace"]);
    Nvme.setup(&kernel, &pf, &vfs[0], &namespace(1)).unwrap();
    assert_eq!(of(&kernel, 0), namespace(1));
    assert!(holds_the_secret(&kernel, 1));
    // A free one is ready again when it is cleaned.
    Nvme.teardown(&kernel, &pf, &vfs[1]).unwrap();
    assert_eq!(of(&kernel, 1).storage, Storage::Nothing);
}

#[test]
fn vfs_are_not_taken_away_while_one_has_a_namespace() {
    let (kernel, pf, vfs) = made();
    used(&kernel, &vfs[3], 2);
    let words = Nvme.remove_all(&kernel, &pf).unwrap_err().to_string();
    assert!(words.contains("VF 3 still has namespace 2"), "{words}");
    assert_eq!(kernel.virtual_functions(pf.address).unwrap().len(), 4);
    Nvme.teardown(&kernel, &pf, &vfs[3]).unwrap();
    Nvme.remove_all(&kernel, &pf).unwrap();
    assert_eq!(kernel.virtual_functions(pf.address).unwrap(), []);
}

#[test]
fn a_pf_whose_namespaces_the_host_has_is_the_hosts() {
    let (kernel, pf, _) = made();
    let used = || kernel.physical_function(pf.address).unwrap().in_use_by_host;
    assert_eq!(used(), None);
    kernel.attach_namespace(pf.address, 1, PRIMARY);
    assert!(used().is_some());
    let lent = kernel.lend(pf.address, 1);
    assert_eq!(used(), None);
    drop(lent);
    assert!(used().is_some());
}

#[test]
fn a_status_is_told_in_words() {
    let (kernel, pf, vfs) = made();
    let of = subsystem(&kernel, &pf);
    let error = of
        .assign(1, crate::kernel::nvme::Resource::Queues, 2)
        .unwrap_err();
    let words = error.to_string();
    assert!(words.contains("refused to assign 2 queues"), "{words}");
    assert!(words.contains("not in the state for it"), "{words}");
    let error = of.detach(1, 1).unwrap_err().to_string();
    assert!(
        error.contains("it is not attached (status 0x411a)"),
        "{error}"
    );
    assert_eq!(vfs.len(), 4);
}

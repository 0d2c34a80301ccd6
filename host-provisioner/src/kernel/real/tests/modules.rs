//! Modules as sysfs shows them.

use super::emulated::Emulated;
use crate::kernel::modules::{ModuleName, ModuleState, Modules as _};

fn igb() -> ModuleName {
    ModuleName::new("igb")
}

#[test]
fn a_module_that_is_not_there_is_absent_and_one_without_a_state_is_built_in() {
    let host = Emulated::new();
    let facts = host.kernel().module(&igb()).unwrap();
    assert_eq!(facts.state, ModuleState::Absent);

    host.file("module/igb/parameters/max_vfs", "0\n");
    let facts = host.kernel().module(&igb()).unwrap();
    assert_eq!(facts.state, ModuleState::BuiltIn);
    assert_eq!(facts.parameters["max_vfs"], "0");

    host.file("module/igb/initstate", "coming\n");
    let facts = host.kernel().module(&igb()).unwrap();
    assert_eq!(facts.state, ModuleState::Changing);
    assert!(facts.parameters.is_empty(), "it may be half there");
}

#[test]
fn a_device_that_is_down_and_has_no_vfs_does_not_keep_its_module() {
    let host = Emulated::new();
    host.loaded("igb");
    let facts = host.kernel().module(&igb()).unwrap();
    assert_eq!(facts.state, ModuleState::Live);
    assert_eq!(facts.users, [""; 0]);
    assert_eq!(facts.functions.into_iter().next(), Some(super::pf()));
}

#[test]
fn what_uses_a_module_is_named() {
    let host = Emulated::new();
    host.loaded("igb");
    let users = || host.kernel().module(&igb()).unwrap().users;

    host.take_up();
    assert_eq!(users(), ["0000:01:00.0 (enp1s0 is up)"]);
    host.file("bus/pci/devices/0000:01:00.0/sriov_numvfs", "7\n");
    assert_eq!(users(), ["0000:01:00.0 (it has 7 VFs)"]);
    host.file("module/igb/holders/other", "");
    host.file("module/igb/refcnt", "3\n");
    assert_eq!(
        users(),
        [
            "module other",
            "2 references",
            "0000:01:00.0 (it has 7 VFs)"
        ]
    );
}

#[test]
fn a_device_that_is_no_network_card_counts_as_used() {
    let host = Emulated::new();
    host.loaded("igb");
    host.without_interface();
    let facts = host.kernel().module(&igb()).unwrap();
    assert_eq!(facts.users, ["0000:01:00.0 (a device of it)"]);
}

#[test]
fn kmod_is_not_run_within_the_pod() {
    let host = Emulated::new();
    let refused = host.kernel().load(&igb(), &[].into()).unwrap_err();
    assert!(refused.to_string().contains("without helpers"), "{refused}");
}

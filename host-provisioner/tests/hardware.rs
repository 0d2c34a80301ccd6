//! The kernel's part of a VF's life on a real PF: made, configured, bound, held,
//! cleaned, taken away. Changes the hardware, so it runs only when asked:
//!
//! `VF_TEST_PF=0000:01:00.0 cargo test -p host-provisioner --features hardware-tests --test hardware`
//!
//! The PF has a supported driver, no VFs, and carries no traffic of the host.

// A test's helpers are tests too; clippy knows only functions marked as such.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod emptied;

use std::env;
use std::process::Command;

use common::pci::PciAddress;
use host_provisioner::driver::driver_for;
use host_provisioner::kernel::{
    HoldError, Kernel as _, MacAddr, RealKernel, Roots, VFIO_PCI, VfConfig, VlanTag,
};

use emptied::Emptied;

fn pf() -> PciAddress {
    env::var("VF_TEST_PF")
        .expect("VF_TEST_PF names the PF to test with, as in 0000:01:00.0")
        .parse()
        .unwrap()
}

/// What another program says of the VFs.
fn ip_link(interface: &str) -> String {
    let output = Command::new("ip")
        .args(["link", "show", "dev", interface])
        .output()
        .expect("the program ip");
    assert!(output.status.success(), "ip link show {interface}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_vf_is_made_configured_bound_held_cleaned_and_taken_away() {
    let kernel = RealKernel::new(Roots::default());
    println!("{:?}", kernel.node_facts().unwrap());
    let facts = kernel.physical_function(pf()).unwrap();
    println!("{facts:?}");
    assert_eq!(facts.num_vfs, 0, "the PF has VFs already");
    assert_eq!(facts.in_use_by_host, None);
    let interface = facts.interface.clone().unwrap();
    let driver = driver_for(&facts).expect("a backend for the PF");

    driver.create(&kernel, &facts, facts.total_vfs).unwrap();
    let _emptied = Emptied(&kernel, driver, &facts);
    let vfs = kernel.virtual_functions(pf()).unwrap();
    assert_eq!(vfs.len(), usize::from(facts.total_vfs));
    assert!(vfs.iter().all(|vf| vf.driver.is_none()), "{vfs:?}");
    let error = kernel.set_num_vfs(pf(), 1).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EBUSY), "{error}");

    let vf = &vfs[1];
    let clean = driver.capabilities(&facts).clean(vf.address);
    assert_eq!(kernel.vf_config(&facts, vf.index).unwrap(), clean);
    let want = VfConfig {
        mac: MacAddr([2, 0, 0, 0, 0, 0xaa]),
        vlan: Some(VlanTag::new(100, 3)),
        spoof_check: false,
        trust: true,
        ..VfConfig::CLEAN
    };
    driver.setup(&kernel, &facts, vf, &want).unwrap();
    assert_eq!(kernel.vf_config(&facts, vf.index).unwrap(), want);
    let shown = ip_link(&interface);
    println!("{shown}");
    let line = shown.lines().find(|line| line.contains("vf 1 ")).unwrap();
    for words in [
        "02:00:00:00:00:aa",
        "vlan 100",
        "qos 3",
        "spoof checking off",
        "trust on",
    ] {
        assert!(line.contains(words), "{words} in {line}");
    }
    // Its neighbour is untouched.
    assert_eq!(kernel.vf_config(&facts, 0).unwrap(), clean);

    kernel.bind_vfio(vf.address).unwrap();
    let bound = &kernel.virtual_functions(pf()).unwrap()[1];
    assert_eq!(bound.driver.as_deref(), Some(VFIO_PCI));
    assert_eq!(bound.group_members, [vf.address], "isolated");
    let group = bound.iommu_group.unwrap();
    let held = kernel.hold_group(group).unwrap();
    assert!(matches!(
        kernel.hold_group(group),
        Err(HoldError::Busy { .. })
    ));
    driver.teardown(&kernel, &facts, vf).unwrap();
    assert_eq!(kernel.vf_config(&facts, vf.index).unwrap(), clean);
    drop(held);
    drop(kernel.hold_group(group).unwrap());
    kernel.unbind(vf.address).unwrap();
    assert!(matches!(
        kernel.hold_group(group),
        Err(HoldError::NoDevice { .. })
    ));
    driver.remove_all(&kernel, &facts).unwrap();
    assert_eq!(kernel.virtual_functions(pf()).unwrap(), []);
    assert_eq!(kernel.physical_function(pf()).unwrap().num_vfs, 0);
}

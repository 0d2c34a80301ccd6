//! The real kernel's code over a folder that answers writes as sysfs does.

mod emulated;
mod modules;
mod network;
mod nvme;

use std::time::Duration;

use common::api::{LinkState, VlanProtocol};
use common::pci::PciAddress;

use self::emulated::{Emulated, PF, vf_address};
use super::*;
use crate::kernel::{MacAddr, TxRate, VlanTag};

fn pf() -> PciAddress {
    PF.parse().unwrap()
}

#[test]
fn a_pf_is_described_by_what_the_kernel_says() {
    let host = Emulated::new();
    let facts = host.kernel().physical_functions().unwrap();
    let [facts] = facts.as_slice() else {
        panic!("one PF, not {facts:?}")
    };
    assert_eq!(facts.address, pf());
    assert_eq!((facts.vendor.0, facts.device.0), (0x8086, 0x10c9));
    assert_eq!(facts.driver.as_deref(), Some("igb"));
    assert_eq!(facts.interface.as_deref(), Some("enp1s0"));
    assert_eq!(facts.permanent_mac, Some(MacAddr([0x52, 0x54, 0, 0, 1, 1])));
    assert_eq!(facts.serial.as_deref(), Some("525400ffff000101"));
    assert_eq!(facts.slot.as_deref(), Some("3-1"));
    assert_eq!((facts.total_vfs, facts.num_vfs), (7, 0));
    assert_eq!(facts.numa_node, None);
    assert_eq!(facts.iommu_group, Some(1));
    assert_eq!(facts.group_members, [pf()]);
    assert_eq!(facts.in_use_by_host, None);
    assert_eq!(
        facts.identity,
        "8086:10c9 serial 525400ffff000101 function 0"
    );
}

#[test]
fn numa_nodes_are_told_with_their_cpus() {
    let host = Emulated::new();
    assert!(host.kernel().numa_nodes().unwrap().is_empty());
    host.numa("node0/cpulist", "0-3,8\n");
    host.numa("node1/cpulist", "\n");
    host.numa("has_cpu", "0\n");
    let nodes = host.kernel().numa_nodes().unwrap();
    let expected = [(0, "0-3,8".parse().unwrap()), (1, CpuList::default())];
    assert_eq!(nodes, expected.into());
    assert_eq!(
        host.kernel().physical_function(pf()).unwrap().numa_node,
        None
    );
    host.pf_on_numa_node("1\n");
    assert_eq!(
        host.kernel().physical_function(pf()).unwrap().numa_node,
        Some(1)
    );
    host.numa("node1/cpulist", "x\n");
    let error = host.kernel().numa_nodes().unwrap_err().to_string();
    assert!(error.contains("cpulist"), "{error}");
}

#[test]
fn what_is_no_pf_is_said_to_be_none() {
    let kernel = Emulated::new().kernel();
    let absent = "0000:0f:00.0".parse().unwrap();
    assert!(matches!(
        kernel.physical_function(absent),
        Err(KernelError::NoSuchFunction(_))
    ));
    let plain = "0000:00:01.0".parse().unwrap();
    assert!(matches!(
        kernel.set_num_vfs(plain, 1),
        Err(KernelError::NotAPhysicalFunction(_))
    ));
}

#[test]
fn vfs_are_made_without_a_driver_and_waited_for() {
    let host = Emulated::new();
    host.links_come_after(Duration::from_millis(30));
    let kernel = host.kernel();
    kernel.set_num_vfs(pf(), 7).unwrap();
    let autoprobe = format!("/bus/pci/devices/{PF}/sriov_drivers_autoprobe");
    let numvfs = format!("/bus/pci/devices/{PF}/sriov_numvfs");
    assert_eq!(
        host.writes(),
        [(autoprobe, "0".to_owned()), (numvfs, "7".to_owned())]
    );
    let vfs = kernel.virtual_functions(pf()).unwrap();
    assert_eq!(vfs.len(), 7);
    for (index, vf) in vfs.iter().enumerate() {
        assert_eq!(usize::from(vf.index), index);
        assert_eq!(vf.address, vf_address(vf.index));
        assert_eq!((vf.driver.as_deref(), vf.device.0), (None, 0x10ca));
        assert_eq!(vf.group_members, [vf.address]);
    }
    // The same count again writes nothing to sriov_numvfs.
    host.forget_writes();
    kernel.set_num_vfs(pf(), 7).unwrap();
    assert_eq!(host.writes().len(), 1);
}

#[test]
fn another_number_of_vfs_keeps_the_errno() {
    let host = Emulated::new();
    let kernel = host.kernel();
    assert_eq!(
        kernel.set_num_vfs(pf(), 8).unwrap_err().errno(),
        Some(libc::ERANGE)
    );
    kernel.set_num_vfs(pf(), 3).unwrap();
    let busy = kernel.set_num_vfs(pf(), 4).unwrap_err();
    assert_eq!(busy.errno(), Some(libc::EBUSY));
    assert!(busy.to_string().contains("sriov_numvfs"), "{busy}");
    assert_eq!(kernel.virtual_functions(pf()).unwrap().len(), 3);
    kernel.set_num_vfs(pf(), 0).unwrap();
    assert_eq!(kernel.virtual_functions(pf()).unwrap(), []);
}

#[test]
fn a_success_with_fewer_vfs_is_an_error() {
    let host = Emulated::new();
    host.make_at_most(2);
    let error = host.kernel().set_num_vfs(pf(), 7).unwrap_err();
    assert!(
        matches!(
            error,
            KernelError::VfCount {
                wanted: 7,
                got: 2,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn links_that_never_come_are_a_timeout() {
    let waited = sysfs::wait_for(
        || "the links".to_owned(),
        Duration::from_millis(20),
        || Ok(None::<()>),
    );
    assert!(matches!(waited, Err(KernelError::Timeout { .. })));
}

#[test]
fn a_vf_is_bound_to_vfio_and_the_override_taken_away() {
    let host = Emulated::new();
    let kernel = host.kernel();
    kernel.set_num_vfs(pf(), 2).unwrap();
    let vf = vf_address(1);
    kernel.bind_vfio(vf).unwrap();
    assert_eq!(host.driver(vf).as_deref(), Some(VFIO_PCI));
    assert_eq!(host.read(vf, "driver_override"), "(null)");
    assert_eq!(host.driver(vf_address(0)), None);
    // Again: nothing to do, nothing written.
    host.forget_writes();
    kernel.bind_vfio(vf).unwrap();
    assert_eq!(host.writes(), []);
    kernel.unbind(vf).unwrap();
    assert_eq!(host.driver(vf), None);
    kernel.unbind(vf).unwrap();
}

#[test]
fn a_vf_that_vfio_does_not_take_is_an_error_and_keeps_no_override() {
    let host = Emulated::new();
    let kernel = host.kernel();
    kernel.set_num_vfs(pf(), 1).unwrap();
    host.without_vfio();
    let error = kernel.bind_vfio(vf_address(0)).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EINVAL), "{error}");
    assert_eq!(host.read(vf_address(0), "driver_override"), "(null)");
}

#[test]
fn a_vf_on_a_host_driver_is_not_taken() {
    let host = Emulated::new();
    let kernel = host.kernel();
    kernel.set_num_vfs(pf(), 1).unwrap();
    host.bind(vf_address(0), "igbvf");
    host.forget_writes();
    let error = kernel.bind_vfio(vf_address(0)).unwrap_err();
    assert!(matches!(error, KernelError::WrongDriver { .. }), "{error}");
    assert_eq!(host.writes(), []);
    assert_eq!(host.driver(vf_address(0)).as_deref(), Some("igbvf"));
}

#[test]
fn what_is_no_vf_is_never_bound_unbound_or_reset() {
    let host = Emulated::new();
    let kernel = host.kernel();
    for (what, result) in [
        ("bind", kernel.bind_vfio(pf())),
        ("unbind", kernel.unbind(pf())),
        ("reset", kernel.reset_function(pf())),
    ] {
        assert!(
            matches!(result, Err(KernelError::NotAVirtualFunction(_))),
            "{what}"
        );
    }
    assert_eq!(host.writes(), []);
    assert_eq!(host.driver(pf()).as_deref(), Some("igb"));
}

#[test]
fn a_reset_goes_to_the_function() {
    let host = Emulated::new();
    let kernel = host.kernel();
    kernel.set_num_vfs(pf(), 1).unwrap();
    host.forget_writes();
    kernel.reset_function(vf_address(0)).unwrap();
    let reset = format!("/bus/pci/devices/{}/reset", vf_address(0));
    assert_eq!(host.writes(), [(reset, "1".to_owned())]);
}

#[test]
fn only_settings_that_differ_are_asked_for_and_all_are_read_back() {
    let host = Emulated::new();
    let kernel = host.kernel();
    kernel.set_num_vfs(pf(), 1).unwrap();
    let facts = kernel.physical_function(pf()).unwrap();
    let want = VfConfig {
        mac: MacAddr([2, 0, 0, 0, 0, 0xaa]),
        vlan: Some(VlanTag::new(100, 3)),
        spoof_check: true,
        trust: false,
        ..VfConfig::CLEAN
    };
    kernel.set_vf_config(&facts, 0, &want).unwrap();
    assert_eq!(kernel.vf_config(&facts, 0).unwrap(), want);
    assert_eq!(
        host.netlink_orders(),
        ["MAC 02:00:00:00:00:aa", "VLAN 100 qos 3"]
    );
    kernel.set_vf_config(&facts, 0, &want).unwrap();
    assert_eq!(host.netlink_orders().len(), 2);
    kernel.set_vf_config(&facts, 0, &VfConfig::CLEAN).unwrap();
    assert_eq!(kernel.vf_config(&facts, 0).unwrap(), VfConfig::CLEAN);
    assert!(matches!(
        kernel.vf_config(&facts, 5),
        Err(KernelError::NoSuchVf { index: 5, .. })
    ));
}

#[test]
fn trust_comes_after_what_it_might_loosen_and_the_rate_last() {
    let host = Emulated::new();
    let kernel = host.kernel();
    kernel.set_num_vfs(pf(), 1).unwrap();
    let facts = kernel.physical_function(pf()).unwrap();
    let service = VlanTag {
        protocol: VlanProtocol::Ieee8021Ad,
        ..VlanTag::new(7, 0)
    };
    let want = VfConfig {
        mac: MacAddr([2, 0, 0, 0, 0, 0xaa]),
        vlan: Some(service),
        spoof_check: false,
        trust: true,
        link_state: LinkState::Disable,
        rate: TxRate { min: 10, max: 500 },
        ..VfConfig::CLEAN
    };
    kernel.set_vf_config(&facts, 0, &want).unwrap();
    assert_eq!(kernel.vf_config(&facts, 0).unwrap(), want);
    assert_eq!(
        host.netlink_orders(),
        [
            "MAC 02:00:00:00:00:aa",
            "VLAN 7 qos 0 802.1ad",
            "spoof check off",
            "link state Disable",
            "trust on",
            "transmit rate min 10 Mbit/s, max 500 Mbit/s",
        ]
    );
    kernel.set_vf_config(&facts, 0, &VfConfig::CLEAN).unwrap();
    assert_eq!(kernel.vf_config(&facts, 0).unwrap(), VfConfig::CLEAN);
}

#[test]
fn a_setting_that_does_not_hold_is_an_error() {
    let host = Emulated::new();
    let kernel = host.kernel();
    kernel.set_num_vfs(pf(), 1).unwrap();
    let facts = kernel.physical_function(pf()).unwrap();
    host.ignore_trust();
    let want = VfConfig {
        trust: true,
        ..VfConfig::CLEAN
    };
    let error = kernel.set_vf_config(&facts, 0, &want).unwrap_err();
    assert!(
        matches!(
            error,
            KernelError::Readback {
                setting: "trust",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_pf_taken_up_takes_no_router_advertisement() {
    let host = Emulated::new();
    let kernel = host.kernel();
    kernel.set_link_up("enp1s0").unwrap();
    assert_eq!(
        host.writes(),
        [(
            "/sys/net/ipv6/conf/enp1s0/accept_ra".to_owned(),
            "0".to_owned()
        )]
    );
    assert_eq!(host.netlink_orders(), ["up"]);
    kernel.set_link_up("enp1s0").unwrap();
    assert_eq!(host.netlink_orders(), ["up"]);
}

#[test]
fn a_group_is_held_or_the_errno_says_why_not() {
    let host = Emulated::new();
    let kernel = host.kernel();
    assert!(matches!(
        kernel.hold_group(99),
        Err(HoldError::NoDevice { group: 99 })
    ));
    kernel.set_num_vfs(pf(), 1).unwrap();
    kernel.bind_vfio(vf_address(0)).unwrap();
    let group = kernel.virtual_functions(pf()).unwrap()[0]
        .iommu_group
        .unwrap();
    assert_eq!(kernel.hold_group(group).unwrap().group(), group);
}

#[test]
fn node_facts_are_read() {
    let facts = Emulated::new().kernel().node_facts().unwrap();
    assert_eq!(facts.kernel_release, "6.12.0-test");
    assert_eq!(facts.boot_id, "7d0f6c1e-0000-4000-8000-000000000001");
    assert_eq!(facts.iommu_groups, 1);
    assert_eq!(facts.lockdown.as_deref(), Some("integrity"));
    assert!(facts.vfio_pci);
    assert!(!facts.vfio_container);
}

//! The fake has the manners that facts about the real one demand.

use common::api::{LinkState, VlanProtocol};

use super::*;
use crate::kernel::VlanTag;

fn pf() -> PfFacts {
    igb_pf("0000:01:00.0".parse().unwrap())
}

#[test]
fn the_count_of_vfs_has_the_kernels_errnos() {
    let kernel = FakeKernel::new([pf()]);
    let address = pf().address;
    let errno = |count| kernel.set_num_vfs(address, count).unwrap_err().errno();
    assert_eq!(errno(8), Some(libc::ERANGE));
    kernel.set_num_vfs(address, 3).unwrap();
    assert_eq!(errno(4), Some(libc::EBUSY));
    kernel.set_num_vfs(address, 3).unwrap();
    kernel.set_num_vfs(address, 0).unwrap();
    let driverless = FakeKernel::new([PfFacts {
        driver: None,
        ..pf()
    }]);
    let error = driverless.set_num_vfs(address, 1).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOENT));
}

#[test]
fn a_group_has_one_user_at_a_time() {
    let kernel = FakeKernel::new([pf()]);
    kernel.set_num_vfs(pf().address, 1).unwrap();
    let vf = kernel.virtual_functions(pf().address).unwrap().remove(0);
    let group = vf.iommu_group.unwrap();
    assert!(matches!(
        kernel.hold_group(group),
        Err(HoldError::NoDevice { .. })
    ));
    kernel.bind_vfio(vf.address).unwrap();
    let held = kernel.hold_group(group).unwrap();
    assert!(matches!(
        kernel.hold_group(group),
        Err(HoldError::Busy { .. })
    ));
    drop(held);
    kernel.hold_group(group).unwrap();
}

#[test]
fn pulling_a_device_from_under_its_user_is_remembered() {
    let kernel = FakeKernel::new([pf()]);
    kernel.set_num_vfs(pf().address, 2).unwrap();
    let vfs = kernel.virtual_functions(pf().address).unwrap();
    kernel.bind_vfio(vfs[0].address).unwrap();
    kernel.bind_vfio(vfs[1].address).unwrap();
    let _held = kernel.hold_group(vfs[0].iommu_group.unwrap()).unwrap();
    kernel.unbind(vfs[1].address).unwrap();
    assert_eq!(kernel.violations(), Vec::<String>::new());
    kernel.unbind(vfs[0].address).unwrap();
    kernel.set_num_vfs(pf().address, 0).unwrap();
    assert_eq!(kernel.violations().len(), 2);
}

#[test]
fn a_reboot_takes_vfs_and_holds() {
    let kernel = FakeKernel::new([pf()]);
    kernel.set_num_vfs(pf().address, 1).unwrap();
    let vf = kernel.virtual_functions(pf().address).unwrap().remove(0);
    let group = vf.iommu_group.unwrap();
    kernel.bind_vfio(vf.address).unwrap();
    let old = kernel.hold_group(group).unwrap();
    let boot = kernel.node_facts().unwrap().boot_id;
    kernel.reboot();
    assert_ne!(kernel.node_facts().unwrap().boot_id, boot);
    assert_eq!(kernel.virtual_functions(pf().address).unwrap(), []);
    kernel.set_num_vfs(pf().address, 1).unwrap();
    kernel.bind_vfio(vf.address).unwrap();
    let _new = kernel.hold_group(group).unwrap();
    // The hold of the last boot is not the hold of this one.
    drop(old);
    assert!(matches!(
        kernel.hold_group(group),
        Err(HoldError::Busy { .. })
    ));
}

#[test]
fn failures_come_once_and_keep_their_errno() {
    let kernel = FakeKernel::new([pf()]);
    kernel.fail_next("set_num_vfs", libc::ENOMEM);
    let error = kernel.set_num_vfs(pf().address, 7).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOMEM));
    kernel.set_num_vfs(pf().address, 7).unwrap();
}

#[test]
fn without_isolation_all_share_one_group() {
    let kernel = FakeKernel::new([pf()]);
    kernel.without_isolation(pf().address);
    kernel.set_num_vfs(pf().address, 2).unwrap();
    let facts = kernel.physical_function(pf().address).unwrap();
    assert_eq!(facts.group_members.len(), 4);
    for vf in kernel.virtual_functions(pf().address).unwrap() {
        assert_eq!(vf.iommu_group, facts.iommu_group);
        assert_eq!(vf.group_members, facts.group_members);
    }
}

fn with_a_vf(pf: PfFacts) -> (FakeKernel, PfFacts) {
    let kernel = FakeKernel::new([pf.clone()]);
    kernel
        .set_link_up(pf.interface.as_deref().unwrap())
        .unwrap();
    kernel.set_num_vfs(pf.address, 1).unwrap();
    (kernel, pf)
}

fn rate(min: u32, max: u32) -> VfConfig {
    VfConfig {
        rate: TxRate { min, max },
        ..VfConfig::CLEAN
    }
}

#[test]
fn igb_limits_rates_on_the_82576_with_a_link_and_up_to_its_speed() {
    let (kernel, pf) = with_a_vf(pf());
    let set = |config| kernel.set_vf_config(&pf, 0, &config);
    let errno = |config| set(config).unwrap_err().errno();
    set(rate(0, 1000)).unwrap();
    assert_eq!(errno(rate(0, 1001)), Some(libc::EINVAL));
    assert_eq!(errno(rate(10, 100)), Some(libc::EINVAL));
    let words = set(rate(0, 1001)).unwrap_err().to_string();
    assert!(words.contains("up to the link's speed"), "{words}");
    // Without a link it is neither set nor taken away, and stays.
    kernel.give_link(pf.address, 0);
    assert_eq!(errno(VfConfig::CLEAN), Some(libc::EINVAL));
    assert_eq!(kernel.vf_config(&pf, 0).unwrap().rate.max, 1000);
    // Another speed forgets it.
    kernel.give_link(pf.address, 100);
    assert_eq!(kernel.vf_config(&pf, 0).unwrap(), VfConfig::CLEAN);

    let (kernel, pf) = with_a_vf(PfFacts {
        device: PciId(0x1521),
        ..super::tests::pf()
    });
    let error = kernel.set_vf_config(&pf, 0, &rate(0, 100)).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EOPNOTSUPP));
}

#[test]
fn igb_has_no_link_state_and_no_service_tag() {
    let (kernel, pf) = with_a_vf(pf());
    let errno = |config: VfConfig| kernel.set_vf_config(&pf, 0, &config).unwrap_err().errno();
    let down = VfConfig {
        link_state: LinkState::Disable,
        ..VfConfig::CLEAN
    };
    assert_eq!(errno(down), Some(libc::EOPNOTSUPP));
    let service = VlanTag {
        protocol: VlanProtocol::Ieee8021Ad,
        ..VlanTag::new(5, 0)
    };
    let service = VfConfig {
        vlan: Some(service),
        ..VfConfig::CLEAN
    };
    assert_eq!(errno(service), Some(libc::EPROTONOSUPPORT));
    assert_eq!(kernel.vf_config(&pf, 0).unwrap(), VfConfig::CLEAN);
}

//! The fake has the manners that facts about the real one demand.

use super::*;

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

//! Every backend over the fake kernel, which answers as its driver does: what a backend says
//! it can set is set and taken away again, and what it does not say its kernel refuses.

use common::api::{LinkState, VlanProtocol};

use super::*;
use crate::kernel::Eswitch;

const ADDRESS: &str = "0000:01:00.0";

fn pf_of(driver: &str) -> PfFacts {
    PfFacts {
        driver: Some(driver.to_owned()),
        ..igb_pf(ADDRESS.parse().unwrap())
    }
}

fn backend(driver: &str) -> &'static dyn VfDriver {
    driver_for(&pf_of(driver)).unwrap()
}

/// A PF of this driver with two VFs and a link of 10 Gbit/s.
fn with_vfs(driver: &str) -> (FakeKernel, PfFacts, Vec<VfFacts>) {
    let pf = pf_of(driver);
    let kernel = FakeKernel::new([pf.clone()]);
    kernel.give_link(pf.address, 10_000);
    kernel.double_vlan(pf.address);
    backend(driver).create(&kernel, &pf, 2).unwrap();
    let vfs = kernel.virtual_functions(pf.address).unwrap();
    assert_eq!(vfs.len(), 2, "{driver}");
    let pf = kernel.physical_function(pf.address).unwrap();
    assert!(pf.up, "{driver}");
    (kernel, pf, vfs)
}

/// As much as the driver can do.
fn fullest(can: &VfCapabilities) -> VfConfig {
    VfConfig {
        mac: MacAddr([2, 0, 0, 0, 0, 0xaa]),
        vlan: Some(VlanTag {
            id: 100,
            qos: if can.vlan_qos { 3 } else { 0 },
            protocol: if can.vlan_8021ad {
                VlanProtocol::Ieee8021Ad
            } else {
                VlanProtocol::Ieee8021Q
            },
        }),
        spoof_check: false,
        trust: can.trust,
        link_state: if can.link_disable {
            LinkState::Disable
        } else {
            LinkState::Auto
        },
        rate: TxRate {
            min: if can.min_tx_rate { 10 } else { 0 },
            max: can.max_tx_rate_from_mbps.unwrap_or(0).max(10),
        },
        ..VfConfig::CLEAN
    }
}

fn names() -> Vec<&'static str> {
    // What storage does is in driver/nvme/tests.rs.
    let network = DRIVERS.iter().filter(|driver| driver.name() != "nvme");
    network.map(|driver| driver.name()).collect()
}

#[test]
fn what_a_backend_says_it_does_and_nothing_of_it_stays() {
    assert_eq!(
        names(),
        ["igb", "ixgbe", "i40e", "ice", "mlx5_core", "bnxt_en"]
    );
    for name in names() {
        let driver = backend(name);
        let (kernel, pf, vfs) = with_vfs(name);
        let can = driver.capabilities(&pf);
        assert_eq!(can.driver, name);
        let want = fullest(&can.settings);
        driver
            .setup(&kernel, &pf, &vfs[1], &want)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(kernel.vf_config(&pf, 1).unwrap(), want, "{name}");
        driver.teardown(&kernel, &pf, &vfs[1]).unwrap();
        let clean = can.clean(vfs[1].address);
        assert_eq!(kernel.vf_config(&pf, 1).unwrap(), clean, "{name}");
        assert_eq!(kernel.writes().last(), Some(&Write::Reset(vfs[1].address)));
        driver.remove_all(&kernel, &pf).unwrap();
        assert_eq!(kernel.virtual_functions(pf.address).unwrap(), []);
    }
}

#[test]
fn what_a_backend_does_not_say_its_kernel_does_not_do() {
    let base = VfConfig {
        mac: MacAddr([2, 0, 0, 0, 0, 0xaa]),
        ..VfConfig::CLEAN
    };
    let tag = VlanTag::new(100, 0);
    let service = VlanTag {
        protocol: VlanProtocol::Ieee8021Ad,
        ..tag
    };
    let with_link = |link_state| VfConfig { link_state, ..base };
    let with_rate = |min, max| VfConfig {
        rate: TxRate { min, max },
        ..base
    };
    let with_tag = |vlan| VfConfig {
        vlan: Some(vlan),
        ..base
    };
    type Said = fn(&VfCapabilities) -> bool;
    let settings: [(Said, VfConfig); 6] = [
        (|can| can.vlan_qos, with_tag(VlanTag { qos: 3, ..tag })),
        (|can| can.vlan_8021ad, with_tag(service)),
        (|can| can.link_enable, with_link(LinkState::Enable)),
        (|can| can.link_disable, with_link(LinkState::Disable)),
        (|can| can.min_tx_rate, with_rate(10, 100)),
        (|can| can.max_tx_rate_from_mbps.is_some(), with_rate(0, 100)),
    ];
    for name in names() {
        for (said, want) in settings {
            let driver = backend(name);
            let (kernel, pf, vfs) = with_vfs(name);
            let says = said(&driver.capabilities(&pf).settings);
            let does = kernel.set_vf_config(&pf, 0, &want).is_ok();
            assert_eq!(says, does, "{name}: {want}");
            let before = kernel.writes();
            let done = driver.setup(&kernel, &pf, &vfs[1], &want);
            match done {
                Ok(()) => assert!(says),
                Err(DriverError::Unsupported(_)) => {
                    assert!(!says, "{name}: {want}");
                    assert_eq!(kernel.writes(), before, "refused before it is written");
                }
                Err(other) => panic!("{name}: {other}"),
            }
        }
    }
}

#[test]
fn bnxt_makes_vfs_only_with_its_interface_up() {
    let pf = pf_of("bnxt_en");
    let kernel = FakeKernel::new([pf.clone()]);
    // By hand: a success, and there are none.
    let error = kernel.set_num_vfs(pf.address, 7).unwrap_err();
    assert!(matches!(error, KernelError::VfCount { got: 0, .. }));
    Bnxt.create(&kernel, &pf, 7).unwrap();
    assert_eq!(kernel.virtual_functions(pf.address).unwrap().len(), 7);
    // It has the resources for fewer: they are there, and it is said.
    let kernel = FakeKernel::new([pf.clone()]);
    kernel.make_at_most(pf.address, 3);
    let words = Bnxt.create(&kernel, &pf, 7).unwrap_err().to_string();
    assert!(
        words.contains("it has 3") && words.contains("resources"),
        "{words}"
    );
    assert_eq!(kernel.virtual_functions(pf.address).unwrap().len(), 3);
}

#[test]
fn a_driver_that_makes_all_whatever_it_was_asked_for_is_told() {
    let pf = pf_of("ice");
    let kernel = FakeKernel::new([pf.clone()]);
    kernel.make_exactly(pf.address, 7);
    let error = Ice.create(&kernel, &pf, 3).unwrap_err();
    assert!(matches!(
        error,
        DriverError::Kernel(KernelError::VfCount {
            wanted: 3,
            got: 7,
            ..
        })
    ));
    kernel.set_num_vfs(pf.address, 0).unwrap();
}

#[test]
fn an_errno_is_explained_where_it_does_not_say_all() {
    for (name, errno, words) in [
        ("ixgbe", libc::EPERM, "traffic classes"),
        ("i40e", libc::EPERM, "fewer VFs to give"),
        ("i40e", libc::EAGAIN, "tried again"),
        ("ice", libc::EOPNOTSUPP, "safe mode"),
        ("ice", libc::EBUSY, "being reset"),
    ] {
        let pf = pf_of(name);
        let kernel = FakeKernel::new([pf.clone()]);
        kernel.fail_next("set_num_vfs", errno);
        let error = backend(name).create(&kernel, &pf, 7).unwrap_err();
        assert!(matches!(error, DriverError::Explained { .. }), "{error:?}");
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    // One that does stays as it is: mlx5 and a firmware without memory, say.
    let pf = pf_of("mlx5_core");
    let kernel = FakeKernel::new([pf.clone()]);
    kernel.fail_next("set_num_vfs", libc::ENOMEM);
    let error = Mlx5.create(&kernel, &pf, 7).unwrap_err();
    assert!(matches!(error, DriverError::Kernel(_)), "{error:?}");
    assert_eq!(kernel.writes(), [], "nothing after it");
}

#[test]
fn a_vf_that_is_being_reset_is_waited_for() {
    for name in ["i40e", "ice"] {
        let driver = backend(name);
        let (kernel, pf, vfs) = with_vfs(name);
        let want = fullest(&driver.capabilities(&pf).settings);
        kernel.slow_resets(pf.address, 3);
        kernel.reset_function(vfs[0].address).unwrap();
        driver.setup(&kernel, &pf, &vfs[0], &want).unwrap();
        assert_eq!(kernel.vf_config(&pf, 0).unwrap(), want, "{name}");
        // One that does not come back is told with its errno.
        kernel.slow_resets(pf.address, u32::MAX);
        kernel.reset_function(vfs[1].address).unwrap();
        let error = driver.setup(&kernel, &pf, &vfs[1], &want).unwrap_err();
        let DriverError::Kernel(error) = error else {
            panic!("{error}")
        };
        let errno = error.errno();
        assert!(matches!(errno, Some(libc::EAGAIN | libc::EBUSY)), "{error}");
    }
}

#[test]
fn ice_without_the_package_for_it_refuses_the_service_tag_in_words() {
    let pf = pf_of("ice");
    let kernel = FakeKernel::new([pf.clone()]);
    Ice.create(&kernel, &pf, 1).unwrap();
    let vf = kernel.virtual_functions(pf.address).unwrap().remove(0);
    let service = VfConfig {
        vlan: Some(VlanTag {
            protocol: VlanProtocol::Ieee8021Ad,
            ..VlanTag::new(5, 0)
        }),
        ..VfConfig::CLEAN
    };
    let error = Ice.setup(&kernel, &pf, &vf, &service).unwrap_err();
    assert!(error.to_string().contains("use 802.1Q"), "{error}");
}

#[test]
fn where_no_zero_mac_can_be_a_vf_is_parked_on_an_address_of_its_own() {
    for name in ["i40e", "bnxt_en"] {
        let (kernel, pf, vfs) = with_vfs(name);
        let bare = kernel.set_vf_config(&pf, 0, &fullest(&VfCapabilities::default()));
        bare.unwrap();
        // i40e refuses it, bnxt tells another one afterwards.
        let zero = VfConfig {
            mac: MacAddr::ZERO,
            ..kernel.vf_config(&pf, 0).unwrap()
        };
        assert!(kernel.set_vf_config(&pf, 0, &zero).is_err(), "{name}");
        backend(name).teardown(&kernel, &pf, &vfs[0]).unwrap();
        backend(name).teardown(&kernel, &pf, &vfs[1]).unwrap();
        let macs: Vec<MacAddr> = [0, 1]
            .iter()
            .map(|index| kernel.vf_config(&pf, *index).unwrap().mac)
            .collect();
        assert!(!macs[0].is_zero() && macs[0] != macs[1], "{name}: {macs:?}");
    }
}

#[test]
fn mlx5_serves_ethernet_ports_in_legacy_mode() {
    let pf = pf_of("mlx5_core");
    assert_eq!(Mlx5.unserviceable(&pf), None);
    let legacy = PfFacts {
        eswitch: Some(Eswitch::Legacy),
        ..pf.clone()
    };
    assert_eq!(Mlx5.unserviceable(&legacy), None);
    let switchdev = PfFacts {
        eswitch: Some(Eswitch::Switchdev),
        ..pf.clone()
    };
    let words = Mlx5.unserviceable(&switchdev).unwrap();
    assert!(
        words.contains("switchdev") && words.contains("mode legacy"),
        "{words}"
    );
    let infiniband = PfFacts { mac: None, ..pf };
    let words = Mlx5.unserviceable(&infiniband).unwrap();
    assert!(words.contains("not Ethernet"), "{words}");
    // Others are asked for the mode too: ice and bnxt have one.
    for name in names() {
        let facts = PfFacts {
            eswitch: Some(Eswitch::Switchdev),
            ..pf_of(name)
        };
        assert!(backend(name).unserviceable(&facts).is_some(), "{name}");
    }
}

#[test]
fn what_has_no_backend_is_left_alone() {
    for driver in [
        "sfc",
        "qede",
        "4xxx",
        "mlx4_core",
        "vfio-pci",
        "igbvf",
        "iavf",
    ] {
        assert!(driver_for(&pf_of(driver)).is_none(), "{driver}");
    }
}

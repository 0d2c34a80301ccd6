//! The backends over the fake kernel.

mod backends;

use common::api::VfCapabilities;
use common::pci::PciId;

use crate::kernel::fake::{FakeKernel, Write, igb_pf};
use crate::kernel::{MacAddr, TxRate, VlanTag};

use super::*;

fn pf() -> PfFacts {
    igb_pf("0000:01:00.0".parse().unwrap())
}

fn made() -> (FakeKernel, PfFacts, Vec<VfFacts>) {
    let kernel = FakeKernel::new([pf()]);
    Igb.create(&kernel, &pf(), 7).unwrap();
    let vfs = kernel.virtual_functions(pf().address).unwrap();
    (kernel, pf(), vfs)
}

const WANT: VfConfig = VfConfig {
    mac: MacAddr([2, 0, 0, 0, 0, 0xaa]),
    vlan: Some(VlanTag::new(100, 0)),
    spoof_check: true,
    trust: true,
    ..VfConfig::CLEAN
};

#[test]
fn a_pf_finds_its_backend_by_its_kernel_driver() {
    assert_eq!(driver_for(&pf()).map(|driver| driver.name()), Some("igb"));
    for driver in [None, Some("vfio-pci".to_owned()), Some("igbvf".to_owned())] {
        assert!(driver_for(&PfFacts { driver, ..pf() }).is_none());
    }
}

#[test]
fn making_vfs_takes_the_pf_up_after_the_count() {
    let (kernel, pf, vfs) = made();
    assert_eq!(vfs.len(), 7);
    let count = Write::NumVfs {
        pf: pf.address,
        count: 7,
    };
    assert_eq!(kernel.writes(), [count, Write::LinkUp("ens1f0".to_owned())]);
    // Again: nothing to do.
    Igb.create(&kernel, &pf, 7).unwrap();
    assert_eq!(kernel.writes().len(), 2);
}

#[test]
fn a_kernel_that_makes_fewer_is_an_error() {
    let kernel = FakeKernel::new([pf()]);
    kernel.make_at_most(pf().address, 3);
    let error = Igb.create(&kernel, &pf(), 7).unwrap_err();
    assert!(matches!(
        error,
        DriverError::Kernel(KernelError::VfCount { got: 3, .. })
    ));
}

#[test]
fn a_guest_gets_the_mac_even_when_the_pf_was_down() {
    let kernel = FakeKernel::new([pf()]);
    kernel.set_num_vfs(pf().address, 1).unwrap();
    let vf = kernel.virtual_functions(pf().address).unwrap().remove(0);
    // By hand, with the PF down: accepted, and the guest makes one up.
    kernel.set_vf_config(&pf(), 0, &WANT).unwrap();
    assert_eq!(kernel.guest_mac(vf.address), None);
    kernel.set_vf_config(&pf(), 0, &VfConfig::CLEAN).unwrap();
    Igb.setup(&kernel, &pf(), &vf, &WANT).unwrap();
    assert_eq!(kernel.guest_mac(vf.address), Some(WANT.mac));
    assert_eq!(kernel.vf_config(&pf(), 0).unwrap(), WANT);
}

#[test]
fn teardown_leaves_nothing_of_the_last_holder_and_resets() {
    let (kernel, pf, vfs) = made();
    Igb.setup(&kernel, &pf, &vfs[2], &WANT).unwrap();
    Igb.teardown(&kernel, &pf, &vfs[2]).unwrap();
    assert_eq!(kernel.vf_config(&pf, 2).unwrap(), VfConfig::CLEAN);
    assert_eq!(kernel.writes().last(), Some(&Write::Reset(vfs[2].address)));
}

#[test]
fn teardown_resets_even_when_the_settings_fail_and_tells_all() {
    let (kernel, pf, vfs) = made();
    Igb.setup(&kernel, &pf, &vfs[0], &WANT).unwrap();
    kernel.fail_next("set_vf_config", libc::EIO);
    let error = Igb.teardown(&kernel, &pf, &vfs[0]).unwrap_err();
    let DriverError::NotClean { errors, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0].errno(), Some(libc::EIO));
    assert_eq!(kernel.writes().last(), Some(&Write::Reset(vfs[0].address)));

    kernel.fail_next("set_vf_config", libc::EIO);
    kernel.fail_next("reset_function", libc::ENOTTY);
    let error = Igb.teardown(&kernel, &pf, &vfs[0]).unwrap_err();
    let words = error.to_string();
    assert!(words.contains("Input/output error"), "{words}");
    assert!(words.contains("Inappropriate ioctl"), "{words}");
}

#[test]
fn what_a_driver_does_not_have_is_refused_before_anything_is_written() {
    let (kernel, pf, vfs) = made();
    let before = kernel.writes();
    for (want, words) in [
        (
            VfConfig {
                mac: MacAddr([1, 0, 0, 0, 0, 1]),
                ..WANT
            },
            "driver igb cannot set a multicast MAC address",
        ),
        (
            VfConfig {
                vlan: Some(VlanTag::new(4095, 0)),
                ..WANT
            },
            "driver igb cannot set a VLAN outside 1 to 4094",
        ),
        (
            VfConfig {
                vlan: Some(VlanTag::new(1, 8)),
                ..WANT
            },
            "driver igb cannot set a VLAN priority above 7",
        ),
    ] {
        let error = Igb.setup(&kernel, &pf, &vfs[0], &want).unwrap_err();
        assert_eq!(error.to_string(), words);
    }
    assert_eq!(kernel.writes(), before);
}

#[test]
fn capabilities_decide_what_clean_is() {
    let all = Igb.capabilities(&pf());
    let vf = "0000:01:10.0".parse().unwrap();
    assert_eq!(all.clean(vf), VfConfig::CLEAN);
    let less = Capabilities {
        zero_mac: false,
        settings: VfCapabilities::default(),
        ..all
    };
    for (want, setting) in [
        (VfConfig::CLEAN, "an empty MAC address"),
        (WANT, "a VLAN"),
        (VfConfig { vlan: None, ..WANT }, "the spoof check"),
    ] {
        assert_eq!(less.supports(&want).unwrap_err().setting, setting);
    }
    let parked = less.clean(vf);
    assert_eq!(parked.mac.to_string(), "02:56:46:00:01:80");
    assert!(!parked.spoof_check);
    assert_eq!(less.supports(&parked), Ok(()));
}

#[test]
fn igb_limits_rates_on_one_of_its_chips() {
    let limited = VfConfig {
        rate: TxRate { min: 0, max: 100 },
        ..WANT
    };
    let (kernel, pf, vfs) = made();
    Igb.setup(&kernel, &pf, &vfs[0], &limited).unwrap();
    assert_eq!(kernel.vf_config(&pf, 0).unwrap(), limited);
    Igb.teardown(&kernel, &pf, &vfs[0]).unwrap();
    assert_eq!(kernel.vf_config(&pf, 0).unwrap(), VfConfig::CLEAN);

    let i350 = PfFacts {
        device: PciId(0x1521),
        ..super::tests::pf()
    };
    let refused = Igb.capabilities(&i350).supports(&limited).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "driver igb cannot set a maximum transmit rate; it can set a MAC address, a VLAN \
         (802.1Q), its priority, the spoof check, trust"
    );
}

#[test]
fn a_rate_that_is_refused_keeps_nothing_else_on_the_vf() {
    let (kernel, pf, vfs) = made();
    let limited = VfConfig {
        rate: TxRate { min: 0, max: 100 },
        ..WANT
    };
    Igb.setup(&kernel, &pf, &vfs[0], &limited).unwrap();
    kernel.give_link(pf.address, 0);
    let error = Igb.teardown(&kernel, &pf, &vfs[0]).unwrap_err();
    assert!(error.to_string().contains("has a link"), "{error}");
    let left = VfConfig {
        rate: limited.rate,
        ..VfConfig::CLEAN
    };
    assert_eq!(kernel.vf_config(&pf, 0).unwrap(), left);
    kernel.give_link(pf.address, 1000);
    Igb.teardown(&kernel, &pf, &vfs[0]).unwrap();
    assert_eq!(kernel.vf_config(&pf, 0).unwrap(), VfConfig::CLEAN);
}

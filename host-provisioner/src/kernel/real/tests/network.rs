//! rtnetlink against the running kernel, on veths and bridges in a network
//! namespace of its own. Needs root and `ip`; without them it fails and says so.

use std::process::Command;
use std::sync::Arc;
use std::thread;

use common::api::{LinkState, VlanProtocol};
use nix::sched::{CloneFlags, unshare};

use super::emulated::{Emulated, PF};
use crate::kernel::netlink::{Netlink as _, RtNetlink, VfSetting};
use crate::kernel::{Kernel as _, KernelError, MacAddr, RealKernel, TxRate, VlanTag};

/// Runs `test` on a thread that is alone in a new network namespace.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect(
            "not run: this test needs a network namespace of its own, that is, root \
             (CAP_SYS_ADMIN)",
        );
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// `ip` in the thread's namespace.
fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("not run: this test needs the program ip (package iproute2)");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A veth named as the emulated PF's interface.
fn veth() {
    ip("link add enp1s0 type veth peer name far");
    ip("link set enp1s0 address 02:00:00:00:00:01");
}

fn kernel() -> (Emulated, RealKernel) {
    let host = Emulated::new();
    let mut kernel = host.kernel();
    kernel.netlink = Arc::new(RtNetlink);
    (host, kernel)
}

fn in_use(kernel: &RealKernel) -> Option<String> {
    let facts = kernel.physical_function(PF.parse().unwrap()).unwrap();
    facts.in_use_by_host
}

#[test]
fn an_interface_is_read_and_taken_up() {
    in_a_namespace(|| {
        veth();
        let (_host, kernel) = kernel();
        let facts = kernel.physical_function(PF.parse().unwrap()).unwrap();
        assert_eq!(facts.mac, Some(MacAddr([2, 0, 0, 0, 0, 1])));
        assert_eq!(facts.permanent_mac, None);
        assert!(!RtNetlink.is_up("enp1s0").unwrap());
        kernel.set_link_up("enp1s0").unwrap();
        assert!(RtNetlink.is_up("enp1s0").unwrap());
        let absent = kernel.set_link_up("nowhere").unwrap_err();
        assert_eq!(absent.errno(), Some(libc::ENODEV), "{absent}");
    });
}

#[test]
fn an_address_makes_it_the_hosts_own_and_a_link_local_one_does_not() {
    in_a_namespace(|| {
        veth();
        let (_host, kernel) = kernel();
        ip("link set enp1s0 up");
        ip("link set far up");
        ip("address add fe80::7/64 dev enp1s0 nodad");
        assert_eq!(in_use(&kernel), None);
        ip("address add 192.0.2.7/24 dev enp1s0");
        assert_eq!(
            in_use(&kernel).as_deref(),
            Some("enp1s0 has the address 192.0.2.7/24")
        );
        ip("address del 192.0.2.7/24 dev enp1s0");
        ip("address add 2001:db8::7/64 dev enp1s0 nodad");
        assert_eq!(
            in_use(&kernel).as_deref(),
            Some("enp1s0 has the address 2001:db8::7/64")
        );
    });
}

#[test]
fn a_default_route_makes_it_the_hosts_own_in_any_table() {
    in_a_namespace(|| {
        veth();
        let (_host, kernel) = kernel();
        ip("link set enp1s0 up");
        ip("link set far up");
        ip("route add 192.0.2.0/24 dev enp1s0");
        assert_eq!(in_use(&kernel), None);
        ip("route add default dev enp1s0 table 77");
        assert_eq!(in_use(&kernel).as_deref(), Some("default route via enp1s0"));
        ip("route del default dev enp1s0 table 77");
        assert_eq!(in_use(&kernel), None);
        ip("route add default nexthop dev far nexthop dev enp1s0");
        assert_eq!(in_use(&kernel).as_deref(), Some("default route via enp1s0"));
        ip("route del default");
        ip("-6 route add default dev enp1s0");
        assert_eq!(in_use(&kernel).as_deref(), Some("default route via enp1s0"));
    });
}

#[test]
fn a_bridge_port_is_the_hosts_own() {
    in_a_namespace(|| {
        veth();
        let (_host, kernel) = kernel();
        ip("link add mgmt type bridge");
        ip("link set enp1s0 master mgmt");
        assert_eq!(
            in_use(&kernel).as_deref(),
            Some("enp1s0 is a bridge port of mgmt")
        );
    });
}

#[test]
fn a_vf_that_is_not_there_is_said_so_and_a_setting_keeps_its_errno() {
    in_a_namespace(|| {
        veth();
        let (_host, kernel) = kernel();
        let facts = kernel.physical_function(PF.parse().unwrap()).unwrap();
        assert!(matches!(
            kernel.vf_config(&facts, 0),
            Err(KernelError::NoSuchVf { index: 0, .. })
        ));
        // A veth has no VF operations, which is said only when a request was understood.
        let service = VlanTag {
            protocol: VlanProtocol::Ieee8021Ad,
            ..VlanTag::new(100, 3)
        };
        for (setting, words) in [
            (VfSetting::Trust(true), "set trust of VF 0"),
            (VfSetting::Vlan(Some(VlanTag::new(100, 3))), "to 100 qos 3"),
            (VfSetting::Vlan(Some(service)), "to 100 qos 3 802.1ad"),
            (VfSetting::LinkState(LinkState::Disable), "to Disable"),
            (
                VfSetting::Rate(TxRate { min: 0, max: 500 }),
                "eswitch mode does not allow it",
            ),
        ] {
            let error = RtNetlink.set_vf("enp1s0", 0, setting).unwrap_err();
            assert_eq!(error.errno(), Some(libc::EOPNOTSUPP), "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    });
}

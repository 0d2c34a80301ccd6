//! The QMP session against a real QEMU (no KVM, no image: firmware only), and against a monitor
//! that misbehaves. QEMU is `$VF_E2E_QEMU`, else `qemu-system-x86_64` of PATH.
// clippy knows functions marked as tests only, not their helpers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use host_provisioner::hypervisor::launcher::{Proc, QemuProcess};
use host_provisioner::hypervisor::plan::{self, Unsupported};
use host_provisioner::hypervisor::qmp::QmpHypervisor;
use host_provisioner::hypervisor::qmp::transport::Connection;
use host_provisioner::hypervisor::{GuestView, Hypervisor, HypervisorError, Session, Unplug};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

const PATIENCE: Duration = Duration::from_secs(90);
const UUID: &str = "12345678-1111-2222-3333-123456789abc";

/// A running QEMU with two monitors: ours, and one of the test's own.
struct Qemu {
    child: Child,
    folder: tempfile::TempDir,
    test: Connection,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Qemu {
    async fn start(arguments: &[&str]) -> Self {
        let program =
            std::env::var_os("VF_E2E_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
        let folder = tempfile::tempdir().unwrap();
        let monitor = |name: &str| {
            format!(
                "unix:{},server=on,wait=off",
                folder.path().join(name).display()
            )
        };
        let child = Command::new(&program)
            .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-uuid", UUID])
            .args(["-qmp", &monitor("ours"), "-qmp", &monitor("test")])
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| {
                panic!("{program:?} cannot be started ({e}): install qemu-system-x86 or set VF_E2E_QEMU")
            });
        let test = Connection::start(reached(&folder.path().join("test")).await)
            .await
            .unwrap();
        Self {
            child,
            folder,
            test,
        }
    }

    fn process(&self) -> QemuProcess {
        Proc::new("/proc").process("pod", self.child.id()).unwrap()
    }

    async fn session(&self) -> Arc<dyn Session> {
        QmpHypervisor::new(self.folder.path().join("ours"))
            .connect(&self.process())
            .await
            .unwrap()
    }

    async fn tell(&self, command: &str, arguments: Value) -> Value {
        self.test
            .execute(command, arguments, PATIENCE)
            .await
            .unwrap()
    }

    async fn plug(&self, id: &str, port: &str) {
        self.tell(
            "device_add",
            json!({"driver": "e1000e", "id": id, "bus": port}),
        )
        .await;
    }
}

async fn reached(path: &Path) -> UnixStream {
    let started = Instant::now();
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return stream,
            Err(e) if started.elapsed() > PATIENCE => panic!("{}: {e}", path.display()),
            // QEMU has no event for "listening" that could be had before connecting.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

const PORTS: [&str; 10] = [
    "-device",
    "pcie-root-port,id=pci.1,chassis=1",
    "-device",
    "pcie-root-port,id=pci.2,chassis=2",
    "-device",
    "pcie-root-port,id=pci.9,chassis=9",
    "-device",
    "pcie-root-port,id=pci.10,chassis=10",
    "-device",
    "pcie-root-port,id=pci.11,chassis=11,hotplug=off",
];

fn q35<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["-M", "q35", "-m", "256,slots=2,maxmem=1G"];
    arguments.extend(PORTS);
    arguments.extend(more);
    arguments
}

const NATIVE_HOTPLUG: [&str; 2] = [
    "-global",
    "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
];

#[tokio::test]
async fn a_machine_is_described_and_its_ports_are_counted() {
    let qemu = Qemu::start(&q35(&["-device", "e1000e,id=cold,bus=pci.2"])).await;
    let session = qemu.session().await;
    let machine = session.machine().await.unwrap();
    assert!(machine.machine_type.contains("q35"), "{machine:?}");
    assert_eq!(
        (machine.uuid.as_str(), machine.run_state.as_str()),
        (UUID, "running")
    );
    assert_eq!(
        (machine.memory.present, machine.memory.maximum),
        (256 << 20, 1 << 30)
    );
    assert!(machine.viommu.is_none() && !machine.confidential);
    let states: Vec<_> = machine
        .ports
        .iter()
        .map(|p| (p.id.as_str(), p.occupied, p.hotplug))
        .collect();
    for port in [
        ("pci.1", false, true),
        ("pci.2", true, true),
        ("pci.10", false, true),
        ("pci.11", false, false),
    ] {
        assert!(states.contains(&port), "{states:?}");
    }
    assert_eq!(plan::choose_port(&machine, 2).unwrap().id, "pci.10");
    assert!(matches!(
        plan::choose_port(&machine, 3),
        Err(Unsupported::NoFreePort {
            occupied: 1,
            free: 3,
            reserved: 3
        })
    ));

    // The firmware numbers the bus and places the regions: that is what "configured" means.
    let started = Instant::now();
    loop {
        match session.guest_view("cold").await.unwrap() {
            GuestView::Configured { address } => {
                assert_ne!(address.bus(), 0);
                break;
            }
            other if started.elapsed() > PATIENCE => panic!("{other:?}"),
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    assert_eq!(session.guest_view("none").await.unwrap(), GuestView::Absent);
}

#[tokio::test]
async fn a_device_comes_and_goes_with_its_event() {
    let qemu = Qemu::start(&q35(&NATIVE_HOTPLUG)).await;
    let session = qemu.session().await;
    qemu.plug("vfc-a", "pci.10").await;
    let machine = session.machine().await.unwrap();
    assert_eq!(plan::choose_port(&machine, 2).unwrap().id, "pci.9");
    assert!(machine.peripherals.iter().any(|p| p.id == "vfc-a"));
    assert!(matches!(
        session.guest_view("vfc-a").await.unwrap(),
        GuestView::Plugged { .. }
    ));
    let plugged = session.plugged("vfc-a").await.unwrap().unwrap();
    assert_eq!(plugged.port, "pci.10");
    assert_eq!(plugged.host, None, "it is no VFIO device");
    assert_eq!(session.host("vfc-a").await.unwrap(), None);
    assert_eq!(session.plugged("vfc-b").await.unwrap(), None);
    assert_eq!(session.host("vfc-b").await.unwrap(), None);
    let mut events = session.events().await.unwrap();
    assert_eq!(
        session.device_del("vfc-a", PATIENCE).await.unwrap(),
        Unplug::Deleted
    );
    // It was the event that said so, for this id.
    loop {
        let event = events.try_recv().unwrap();
        if event.name == "DEVICE_DELETED" && event.device() == Some("vfc-a") {
            break;
        }
    }
    assert_eq!(
        session.guest_view("vfc-a").await.unwrap(),
        GuestView::Absent
    );
    assert_eq!(
        session.device_del("vfc-a", PATIENCE).await.unwrap(),
        Unplug::Deleted,
        "a device that QEMU does not know is gone"
    );

    // A port that is used again is as occupied as it was the first time.
    qemu.plug("vfc-b", "pci.10").await;
    let machine = session.machine().await.unwrap();
    assert_eq!(plan::choose_port(&machine, 2).unwrap().id, "pci.9");
}

#[tokio::test]
async fn a_guest_that_does_not_let_go_is_pending_until_it_does() {
    // ACPI hotplug and no operating system: nobody answers until the machine is reset.
    let qemu = Qemu::start(&q35(&[])).await;
    let session = qemu.session().await;
    qemu.plug("vfc-b", "pci.10").await;
    let short = Duration::from_millis(300);
    for _ in 0..2 {
        let pending = session.device_del("vfc-b", short).await.unwrap();
        assert!(matches!(pending, Unplug::Pending { .. }), "{pending:?}");
    }
    let waiting = tokio::spawn({
        let session = Arc::clone(&session);
        async move { session.device_del("vfc-b", PATIENCE).await }
    });
    qemu.tell("system_reset", json!({})).await;
    assert_eq!(waiting.await.unwrap().unwrap(), Unplug::Deleted);
}

#[tokio::test]
async fn what_qemu_refuses_is_told_in_its_words() {
    let qemu = Qemu::start(&q35(&NATIVE_HOTPLUG)).await;
    let session = qemu.session().await;
    let host = "0000:ff:1f.7".parse().unwrap();
    let refused = session
        .device_add("vfc-c", host, "pci.10", PATIENCE)
        .await
        .unwrap_err();
    assert!(!refused.outcome_unknown(), "{refused}");
    assert!(
        refused.to_string().contains("0000:ff:1f.7"),
        "QEMU names the device: {refused}"
    );
    assert_eq!(
        session.guest_view("vfc-c").await.unwrap(),
        GuestView::Absent
    );
}

/// A QEMU that does not answer in time may carry the command out all the same: it is asked
/// when it answers again, and what comes late is nobody else's answer.
#[tokio::test]
async fn what_a_stopped_qemu_does_with_a_command_is_unknown_until_it_is_asked() {
    let qemu = Qemu::start(&q35(&NATIVE_HOTPLUG)).await;
    let session = qemu.session().await;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(qemu.child.id()).unwrap());
    let tell = |signal| nix::sys::signal::kill(pid, signal).unwrap();
    tell(nix::sys::signal::Signal::SIGSTOP);
    let host = "0000:ff:1f.7".parse().unwrap();
    let unanswered = session
        .device_add("vfc-s", host, "pci.10", Duration::from_secs(1))
        .await
        .unwrap_err();
    assert!(unanswered.outcome_unknown(), "{unanswered}");
    tell(nix::sys::signal::Signal::SIGCONT);
    let view = session.guest_view("vfc-s").await.unwrap();
    assert_eq!(view, GuestView::Absent);
    assert_eq!(session.machine().await.unwrap().uuid, UUID);
}

#[tokio::test]
async fn machines_that_cannot_have_a_vf_are_told_apart() {
    let qemu = Qemu::start(&["-M", "pc", "-m", "64"]).await;
    let machine = qemu.session().await.machine().await.unwrap();
    assert!(matches!(
        plan::choose_port(&machine, 0),
        Err(Unsupported::MachineType(_))
    ));

    let qemu = Qemu::start(&q35(&["-device", "intel-iommu"])).await;
    let machine = qemu.session().await.machine().await.unwrap();
    assert!(matches!(
        plan::choose_port(&machine, 0),
        Err(Unsupported::Viommu(_))
    ));

    let with_caching = ["-device", "intel-iommu,caching-mode=on,id=iommu0"];
    let qemu = Qemu::start(&q35(&with_caching)).await;
    let machine = qemu.session().await.machine().await.unwrap();
    assert!(machine.viommu.as_ref().is_some_and(|v| v.caching_mode));
    assert!(plan::choose_port(&machine, 0).is_ok());

    qemu.tell("stop", json!({})).await;
    let machine = qemu.session().await.machine().await.unwrap();
    assert!(matches!(
        plan::choose_port(&machine, 0),
        Err(Unsupported::NotRunning(_))
    ));
}

#[tokio::test]
async fn a_dead_qemu_and_a_foreign_listener_are_said() {
    let mut qemu = Qemu::start(&q35(&[])).await;
    let session = qemu.session().await;
    let process = qemu.process();
    let mut events = session.events().await.unwrap();

    let mut foreign = process.clone();
    foreign.pid = std::process::id();
    let refused = QmpHypervisor::new(qemu.folder.path().join("test"))
        .connect(&foreign)
        .await;
    let Err(HypervisorError::Unreachable { reason, .. }) = refused else {
        panic!("a socket of another process was accepted");
    };
    assert!(reason.contains("not the VM's QEMU"), "{reason}");

    qemu.child.kill().unwrap();
    qemu.child.wait().unwrap();
    loop {
        match events.recv().await {
            Ok(_) => {}
            Err(e) => {
                assert_eq!(e, tokio::sync::broadcast::error::RecvError::Closed);
                break;
            }
        }
    }
    assert!(matches!(
        session.machine().await,
        Err(HypervisorError::Unreachable { .. } | HypervisorError::Lost { .. })
    ));
    assert!(
        !Proc::new("/proc")
            .is_alive(process.pid, process.start_time)
            .unwrap()
    );
}

/// A monitor in this process, which breaks off in the middle of the first `query-pci`.
async fn breaking_monitor(listener: UnixListener) {
    for attempt in 0.. {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        let hello = json!({"QMP": {"version": {}, "capabilities": []}});
        write
            .write_all(format!("{hello}\n").as_bytes())
            .await
            .unwrap();
        while let Ok(Some(line)) = lines.next_line().await {
            let asked: Value = serde_json::from_str(&line).unwrap();
            if asked["execute"] == "query-pci" && attempt == 0 {
                break;
            }
            let event = json!({"event": "UNHEARD_OF", "data": {"n": attempt}});
            let answer = json!({"return": [], "id": asked["id"]});
            let text = format!("{event}\n{answer}\n");
            if write.write_all(text.as_bytes()).await.is_err() {
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_session_outlives_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let socket: PathBuf = folder.path().join("qmp");
    let monitor = tokio::spawn(breaking_monitor(UnixListener::bind(&socket).unwrap()));
    let me = Proc::new("/proc")
        .process("pod", std::process::id())
        .unwrap();
    let session = QmpHypervisor::new(&socket).connect(&me).await.unwrap();
    let lost = session.guest_view("x").await.unwrap_err();
    assert!(lost.outcome_unknown(), "{lost}");
    assert_eq!(session.guest_view("x").await.unwrap(), GuestView::Absent);
    let mut events = session.events().await.unwrap();
    assert_eq!(session.guest_view("x").await.unwrap(), GuestView::Absent);
    let event = events.recv().await.unwrap();
    assert_eq!(
        (event.name.as_str(), &event.data["n"]),
        ("UNHEARD_OF", &json!(1))
    );
    monitor.abort();
}

/// Has the device, and closes each connection after its second answer.
async fn closing_monitor(listener: UnixListener) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        let hello = json!({"QMP": {"version": {}, "capabilities": []}});
        drop(write.write_all(format!("{hello}\n").as_bytes()).await);
        for _ in 0..2 {
            let Ok(Some(line)) = lines.next_line().await else {
                break;
            };
            let asked: Value = serde_json::from_str(&line).unwrap();
            let value = match asked["execute"].as_str() {
                Some("qom-list") => json!([{"name": "x", "type": "child<vfio-pci>"}]),
                _ => json!({}),
            };
            let answer = json!({"return": value, "id": asked["id"]});
            drop(write.write_all(format!("{answer}\n").as_bytes()).await);
        }
    }
}

#[tokio::test]
async fn a_monitor_that_closes_each_connection_does_not_keep_us() {
    let folder = tempfile::tempdir().unwrap();
    let socket: PathBuf = folder.path().join("qmp");
    let monitor = tokio::spawn(closing_monitor(UnixListener::bind(&socket).unwrap()));
    let me = Proc::new("/proc")
        .process("pod", std::process::id())
        .unwrap();
    let session = QmpHypervisor::new(&socket).connect(&me).await.unwrap();
    let asked = session.device_del("x", Duration::from_millis(1500));
    let answer = tokio::time::timeout(Duration::from_secs(20), asked).await;
    let answer = answer.expect("it ends").unwrap();
    assert!(matches!(answer, Unplug::Pending { .. }), "{answer:?}");
    monitor.abort();
}

//! A monitor that says what the input says. QEMU runs in a tenant's pod: whatever it answers, a
//! call ends, within its time, and a device is only called gone when QEMU has said so.
//!
//! An input is `{"calls": [CALL], "answers": {COMMAND: [[MESSAGE]]}}`; COMMAND is as in
//! `qom-list /machine/peripheral`. Each time it comes the next list of messages is sent, the last
//! one again and again. A text is sent as it is, a number is a wait in milliseconds, null closes
//! the socket. What is no JSON is sent as it is to a connection that begins.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use host_provisioner::hypervisor::launcher::QemuProcess;
use host_provisioner::hypervisor::qmp::QmpHypervisor;
use host_provisioner::hypervisor::qmp::transport::Connection;
use host_provisioner::hypervisor::root::ContainerRoot;
use host_provisioner::hypervisor::{Hypervisor as _, HypervisorError, Session, Unplug};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

const ID: &str = "vf-x";
const DEADLINE: Duration = Duration::from_secs(30);
/// One unanswered query of each call and one greeting that does not come, beside its deadline.
const PATIENCE: Duration = Duration::from_secs(600);
/// More connections than any call needs.
const MOST_CONNECTIONS: u32 = 128;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a folder"));

#[derive(Default, Deserialize)]
#[serde(default)]
struct Script {
    calls: Vec<String>,
    answers: BTreeMap<String, Vec<Vec<Value>>>,
}

pub fn run(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    match serde_json::from_slice::<Script>(data) {
        Ok(script) => runtime.block_on(converse(script)),
        Err(_) => runtime.block_on(raw(data)),
    }
}

async fn raw(data: &[u8]) {
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    let said = data.to_vec();
    let peer = tokio::spawn(async move {
        drop(theirs.write_all(&said).await);
        // What is asked is nobody's concern here.
        drop(tokio::io::copy(&mut theirs, &mut tokio::io::sink()).await);
    });
    let begun = Instant::now();
    if let Ok(connection) = Connection::start(ours).await {
        let limit = Duration::from_secs(60);
        drop(connection.execute("query-status", json!({}), limit).await);
        drop(connection.events());
    }
    assert!(begun.elapsed() <= Duration::from_secs(71));
    peer.abort();
}

/// What QEMU has said so far.
#[derive(Default)]
struct Said {
    gone: AtomicBool,
    connections: AtomicU32,
}

async fn converse(script: Script) {
    let socket = FOLDER.path().join("qmp.sock");
    drop(std::fs::remove_file(&socket));
    let listener = UnixListener::bind(&socket).expect("a socket");
    let said = Arc::new(Said::default());
    let answers = Answers {
        lists: script.answers,
        next: BTreeMap::new(),
        said: Arc::clone(&said),
    };
    let server = tokio::spawn(serve(listener, answers));
    let hypervisor = QmpHypervisor::new(&socket);
    if let Ok(session) = hypervisor.connect(&ourselves()).await {
        for name in script.calls.iter().take(6) {
            said.connections.store(0, Ordering::SeqCst);
            let begun = Instant::now();
            let most = call(name, &*session, &said).await;
            let took = begun.elapsed();
            let connections = said.connections.load(Ordering::SeqCst);
            assert!(connections <= MOST_CONNECTIONS, "{name} connects for ever");
            assert!(took <= most, "{name} took {took:?}");
        }
    }
    server.abort();
}

/// Makes one call; answers how long it may have taken.
async fn call(name: &str, session: &dyn Session, said: &Said) -> Duration {
    match name {
        "machine" => {
            if let Ok(machine) = session.machine().await {
                assert!(machine.memory.maximum >= machine.memory.present);
                let named = |id: &str| machine.peripherals.iter().any(|p| p.id == id);
                assert!(machine.ports.iter().all(|port| named(&port.id)));
                // Each port is asked for its properties and its bus.
                let ports = u32::try_from(machine.ports.len()).unwrap_or(u32::MAX);
                return PATIENCE + Duration::from_secs(140) * ports;
            }
            Duration::MAX
        }
        "view" => {
            drop(session.guest_view(ID).await);
            PATIENCE
        }
        "plugged" => {
            drop(session.plugged(ID).await);
            PATIENCE
        }
        "add" => {
            let host = "0000:03:10.0".parse().expect("an address");
            let answer = session.device_add(ID, host, "port1", DEADLINE).await;
            let late = matches!(answer, Err(HypervisorError::TimedOut { .. }));
            if late {
                assert!(answer.is_err_and(|e| e.outcome_unknown()));
            }
            PATIENCE
        }
        "del" => {
            let answer = session.device_del(ID, DEADLINE).await;
            if let Ok(Unplug::Deleted) = answer {
                assert!(
                    said.gone.load(Ordering::SeqCst),
                    "gone, but QEMU has not said so"
                );
            }
            PATIENCE
        }
        _ => Duration::ZERO.max(PATIENCE),
    }
}

/// This process in the place of the VM's: the kernel says that it is who listens.
fn ourselves() -> QemuProcess {
    QemuProcess {
        pod_uid: "pod".to_owned(),
        pid: std::process::id(),
        start_time: 1,
        cgroup: PathBuf::from("/"),
        uid: 0,
        gid: 0,
        cap_eff: 0,
        user_ns_is_init: true,
        root: Arc::new(ContainerRoot::open(Path::new("/")).expect("a root")),
    }
}

struct Answers {
    lists: BTreeMap<String, Vec<Vec<Value>>>,
    next: BTreeMap<String, usize>,
    said: Arc<Said>,
}

async fn serve(listener: UnixListener, mut answers: Answers) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            return;
        };
        // Then the call can end, and its caller says so.
        if answers.said.connections.fetch_add(1, Ordering::SeqCst) >= MOST_CONNECTIONS {
            return;
        }
        drop(speak(stream, &mut answers).await);
    }
}

async fn speak(stream: UnixStream, answers: &mut Answers) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let hello = json!({"QMP": {"version": {}, "capabilities": []}});
    write.write_all(format!("{hello}\r\n").as_bytes()).await?;
    while let Some(line) = lines.next_line().await? {
        let asked: Value = serde_json::from_str(&line)?;
        let id = asked.get("id").cloned().unwrap_or_default();
        let messages = answers
            .of(&asked)
            .unwrap_or_else(|| vec![json!({"return": {}})]);
        for message in messages.iter().take(16) {
            let line = match message {
                Value::Null => return Ok(()),
                Value::Number(wait) => {
                    let wait = wait.as_u64().unwrap_or(0).min(120_000);
                    tokio::time::sleep(Duration::from_millis(wait)).await;
                    continue;
                }
                Value::String(text) => text.clone(),
                Value::Object(map) if map.contains_key("return") || map.contains_key("error") => {
                    let mut answer = map.clone();
                    answer.entry("id").or_insert(id.clone());
                    Value::Object(answer).to_string()
                }
                other => other.to_string(),
            };
            answers.note(&line);
            write.write_all(format!("{line}\n").as_bytes()).await?;
        }
    }
    Ok(())
}

impl Answers {
    fn of(&mut self, asked: &Value) -> Option<Vec<Value>> {
        let part = |pointer: &str| asked.pointer(pointer).and_then(Value::as_str);
        let command = part("/execute")?;
        let key = match (part("/arguments/path"), part("/arguments/property")) {
            (Some(path), Some(property)) => format!("{command} {path} {property}"),
            (Some(path), None) => format!("{command} {path}"),
            _ => command.to_owned(),
        };
        let key = [key, command.to_owned()]
            .into_iter()
            .find(|k| self.lists.contains_key(k))?;
        let list = self.lists.get(&key)?;
        let at = self.next.entry(key).or_default();
        let messages = list.get(*at).or(list.last()).cloned();
        *at += 1;
        messages
    }

    /// Whether a line says that the device is gone, as an event, a refusal or a list without it.
    fn note(&self, text: &str) {
        for line in text.lines() {
            let Ok(message) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let is = |pointer: &str, word: &str| {
                message.pointer(pointer).and_then(Value::as_str) == Some(word)
            };
            let event = is("/event", "DEVICE_DELETED") && is("/data/device", ID);
            let refused = is("/error/class", "DeviceNotFound");
            let list = message.get("return").and_then(Value::as_array);
            let named = |entry: &Value| entry.get("name").and_then(Value::as_str) == Some(ID);
            let absent = list.is_some_and(|list| !list.iter().any(named));
            if event || refused || absent {
                self.said.gone.store(true, Ordering::SeqCst);
            }
        }
    }
}

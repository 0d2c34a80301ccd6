//! The Docker engine: the machine's own where it can run what kind needs, else a private
//! containerd and dockerd with their own sockets, folders and no default bridge. Touches
//! nothing of the machine's engine but the one network and what kind makes in it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::daemon::Daemon;
use crate::exec::Cmd;
use crate::paths::Paths;
use crate::tools::Tools;
use crate::wait::{self, Probe};
use crate::{archive, debian, footprint, oci_runtime, progress};

/// The network all node containers are in, and L1's tap too.
pub const NETWORK: &str = "vf-e2e";
/// The network's bridge on the machine.
pub const BRIDGE: &str = "vf-e2e0";
/// The network's addresses; the machine is the gateway.
pub const SUBNET: &str = "172.31.240.0/24";
pub const GATEWAY: &str = "172.31.240.1";
/// Docker gives addresses from here; .33 and up are free for L1 and its like.
const CONTAINER_RANGE: &str = "172.31.240.0/27";

/// Sockets and what must not survive a boot. Short, as socket paths are limited to 108.
const RUN: &str = "/run/vf-provisioner-e2e";

/// An engine that works.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Docker {
    /// `DOCKER_HOST`, if not the client's default.
    host: Option<String>,
    private: bool,
}

impl Docker {
    /// A docker command for this engine.
    #[must_use]
    pub fn cmd(&self) -> Cmd {
        self.with_host(Cmd::new("docker"))
    }

    /// Lets `cmd`, which talks to an engine by itself (kind), talk to this one.
    #[must_use]
    pub fn with_host(&self, cmd: Cmd) -> Cmd {
        let cmd = cmd.env("KIND_EXPERIMENTAL_DOCKER_NETWORK", NETWORK);
        match &self.host {
            Some(host) => cmd.env("DOCKER_HOST", host).env_remove("DOCKER_CONTEXT"),
            None => cmd,
        }
    }

    /// The socket address to set as `DOCKER_HOST` by hand.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// A command inside a running container, with the container's standard input open.
    #[must_use]
    pub fn exec(&self, container: &str) -> Cmd {
        self.cmd().args(["exec", "-i", container])
    }

    /// The container's address in [`NETWORK`].
    pub fn address(&self, container: &str) -> Result<String> {
        let format = format!("{{{{(index .NetworkSettings.Networks \"{NETWORK}\").IPAddress}}}}");
        let ip = self
            .cmd()
            .args(["inspect", "-f", &format, container])
            .text()?;
        if ip.is_empty() {
            bail!("container {container} has no address in network {NETWORK}");
        }
        Ok(ip)
    }

    /// Whether the container exists and runs.
    pub fn running(&self, container: &str) -> Result<bool> {
        let all = self.cmd().args(["ps", "--format", "{{.Names}}"]).text()?;
        Ok(all.lines().any(|l| l == container))
    }

    /// The engine of the running data centre, if one was chosen.
    pub fn find(paths: &Paths) -> Result<Option<Self>> {
        let file = choice(paths);
        if !file.exists() {
            return Ok(None);
        }
        let data = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        Ok(Some(serde_json::from_slice(&data)?))
    }

    /// Whether the engine has ended, and its containers with it. One that is merely slow has not.
    pub fn died(&self, paths: &Paths) -> Result<bool> {
        if !self.private {
            return Ok(false);
        }
        Ok(running(paths, "dockerd")?.is_none() || running(paths, "containerd")?.is_none())
    }

    fn answers(&self) -> bool {
        let version = self
            .cmd()
            .args(["version", "-f", "{{.Server.Version}}"])
            .unlogged();
        version.timeout(Duration::from_secs(10)).run().is_ok()
    }

    fn ensure_network(&self) -> Result<()> {
        let known = self.cmd().args(["network", "inspect", NETWORK]).status()?;
        if known.status.success() {
            return Ok(());
        }
        let name = format!("com.docker.network.bridge.name={BRIDGE}");
        self.cmd()
            .args(["network", "create", "-d", "bridge", "--subnet", SUBNET])
            .args([
                "--gateway",
                GATEWAY,
                "--ip-range",
                CONTAINER_RANGE,
                "-o",
                &name,
                NETWORK,
            ])
            .run()
            .with_context(|| format!("making network {NETWORK}: are its addresses in use?"))?;
        Ok(())
    }
}

fn choice(paths: &Paths) -> PathBuf {
    paths.state().join("engine.json")
}

fn record_file(paths: &Paths) -> PathBuf {
    paths.state().join("machine-before.json")
}

/// An engine with the network, started if need be.
pub fn up(paths: &Paths, tools: &Tools) -> Result<Docker> {
    debian::ensure(paths, &["iptables", "iproute2"])?;
    debian::ensure_program(paths, "dockerd", "docker.io")?;
    // From Debian 13 on the client is a package of its own.
    debian::ensure_program(paths, "docker", "docker-cli")?;
    footprint::record(&record_file(paths))?;
    let engine = match Docker::find(paths)?.filter(Docker::answers) {
        Some(engine) => engine,
        None => choose(paths, tools)?,
    };
    std::fs::write(choice(paths), serde_json::to_vec(&engine)?)?;
    engine.ensure_network()?;
    Ok(engine)
}

fn choose(paths: &Paths, tools: &Tools) -> Result<Docker> {
    let own = Docker {
        host: None,
        private: false,
    };
    if own.answers() {
        match probe(&own, tools) {
            Ok(()) => return Ok(own),
            Err(e) => progress::line(&format!("this machine's Docker does not suit: {e:#}")),
        }
    }
    progress::step("starting a private Docker daemon", |_| start(paths))
}

/// Whether the engine can start a privileged container.
fn probe(engine: &Docker, tools: &Tools) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let root = dir.path().join("root");
    std::fs::create_dir(&root)?;
    std::fs::copy(tools.path("pause")?, root.join("pause"))?;
    let image = archive::Image {
        name: "vf-e2e-probe:latest",
        entrypoint: &["/pause"],
        ..archive::Image::default()
    };
    let tar = dir.path().join("probe.tar");
    archive::write(&root, &image, &tar)?;
    engine.cmd().args(["load", "-i"]).arg(&tar).run()?;
    let run = engine
        .cmd()
        .args([
            "run",
            "--rm",
            "--privileged",
            "--network=none",
            image.name,
            "probe",
        ])
        .run();
    engine.cmd().args(["image", "rm", image.name]).run()?;
    run?;
    Ok(())
}

fn start(paths: &Paths) -> Result<Docker> {
    let run = Path::new(RUN);
    std::fs::create_dir_all(run).with_context(|| format!("creating {RUN}"))?;
    let socket = run.join("containerd.sock");
    let config = run.join("containerd.toml");
    std::fs::write(&config, containerd_config(paths, run, &socket))?;
    let log = |name: &str| paths.state().join(format!("{name}.log"));
    if running(paths, "containerd")?.is_none() {
        let command = words(&["containerd", "--config", &config.to_string_lossy()]);
        Daemon::spawn(&paths.state(), "containerd", &command, &log("containerd"))?;
    }
    let daemon = running(paths, "containerd")?.context("containerd ended at once")?;
    await_socket("the private containerd", &daemon, &socket)?;

    let docker = run.join("docker.sock");
    let config = run.join("daemon.json");
    std::fs::write(
        &config,
        serde_json::to_vec_pretty(&docker_config(paths, run)?)?,
    )?;
    if running(paths, "dockerd")?.is_none() {
        let command = words(&["dockerd", "--config-file", &config.to_string_lossy()]);
        Daemon::spawn(&paths.state(), "dockerd", &command, &log("dockerd"))?;
    }
    let daemon = running(paths, "dockerd")?.context("dockerd ended at once")?;
    let engine = Docker {
        host: Some(format!("unix://{}", docker.display())),
        private: true,
    };
    let every = Duration::from_millis(200);
    wait::until_blocking(
        "the private dockerd",
        Duration::from_secs(60),
        every,
        || {
            daemon.check("dockerd")?;
            let seen = engine.answers();
            Ok(if seen {
                Probe::Ready(())
            } else {
                Probe::NotYet("it does not answer".into())
            })
        },
    )?;
    Ok(engine)
}

fn await_socket(what: &str, daemon: &Daemon, socket: &Path) -> Result<()> {
    wait::until_blocking(
        what,
        Duration::from_secs(30),
        Duration::from_millis(100),
        || {
            daemon.check(what)?;
            Ok(match std::os::unix::net::UnixStream::connect(socket) {
                Ok(_) => Probe::Ready(()),
                Err(e) => Probe::NotYet(format!("{}: {e}", socket.display())),
            })
        },
    )
}

fn running(paths: &Paths, name: &str) -> Result<Option<Daemon>> {
    Ok(Daemon::find(&paths.state(), name)?.filter(Daemon::alive))
}

fn words(w: &[&str]) -> Vec<String> {
    w.iter().map(|s| (*s).to_owned()).collect()
}

fn containerd_config(paths: &Paths, run: &Path, socket: &Path) -> String {
    format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\n  address = {:?}\n",
        paths.cache().join("containerd"),
        run.join("containerd"),
        socket,
    )
}

fn docker_config(paths: &Paths, run: &Path) -> Result<serde_json::Value> {
    let mut config = json!({
        "hosts": [format!("unix://{}", run.join("docker.sock").display())],
        "containerd": run.join("containerd.sock"),
        "data-root": paths.cache().join("docker"),
        "exec-root": run.join("docker"),
        "pidfile": run.join("dockerd.pid"),
        // No docker0: it could collide with another daemon's.
        "bridge": "none",
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
    });
    if oci_runtime::needed()? {
        // A copy: cargo may replace the binary while the daemon still calls it.
        let exe = run.join("e2e");
        let tmp = run.join(".e2e");
        std::fs::copy(std::env::current_exe()?, &tmp)?;
        std::fs::rename(&tmp, &exe)?;
        if let serde_json::Value::Object(c) = &mut config {
            c.insert("default-runtime".into(), json!("vf-e2e"));
            c.insert(
                "runtimes".into(),
                json!({"vf-e2e": {"path": exe, "runtimeArgs": ["oci-runtime"]}}),
            );
        }
    }
    Ok(config)
}

/// Removes the network and, if they are ours, the daemons with all they left behind.
/// The clusters must be gone. Goes on after an error and returns the first.
pub fn down(paths: &Paths) -> Result<()> {
    let mut wrong = Vec::new();
    let engine = Docker::find(paths)?;
    if let Some(engine) = engine.as_ref().filter(|e| e.answers())
        && engine
            .cmd()
            .args(["network", "inspect", NETWORK])
            .status()?
            .status
            .success()
        && let Err(e) = engine.cmd().args(["network", "rm", NETWORK]).run()
    {
        wrong.push(anyhow::Error::from(e));
    }
    let private = engine.as_ref().is_none_or(|e| e.private);
    if private {
        for name in ["dockerd", "containerd"] {
            if let Some(d) = Daemon::find(&paths.state(), name)?
                && let Err(e) = d.stop(Duration::from_secs(60))
            {
                wrong.push(e);
            }
        }
        for below in [Path::new(RUN), &paths.cache().join("docker")] {
            if let Err(e) = unmount_below(below) {
                wrong.push(e);
            }
        }
        if let Err(e) = remove_cgroups(Path::new("/sys/fs/cgroup")) {
            wrong.push(e);
        }
        for name in ["dockerd.log", "containerd.log"] {
            let moved = paths.run_logs().join(name);
            remove(&paths.state().join(name), |p| std::fs::rename(p, &moved))?;
        }
    }
    if let Err(e) = footprint::restore(&record_file(paths), &["DOCKER", BRIDGE, "172.31.240."]) {
        wrong.push(e);
    }
    if let Some(first) = wrong.into_iter().next() {
        return Err(first);
    }
    remove(&choice(paths), |p| std::fs::remove_file(p))?;
    if private {
        remove(Path::new(RUN), |p| std::fs::remove_dir_all(p))?;
    }
    Ok(())
}

fn remove(path: &Path, how: impl Fn(&Path) -> std::io::Result<()>) -> Result<()> {
    match how(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("removing {}", path.display())),
    }
}

/// Removes the control groups called `docker` that no process is in any more, in the one
/// hierarchy of v2 or each of v1.
fn remove_cgroups(root: &Path) -> Result<()> {
    let mut hierarchies = vec![root.to_owned()];
    for entry in std::fs::read_dir(root).with_context(|| root.display().to_string())? {
        hierarchies.push(entry?.path());
    }
    for dir in hierarchies
        .iter()
        .map(|h| h.join("docker"))
        .filter(|d| d.is_dir())
    {
        remove_cgroup(&dir)?;
    }
    Ok(())
}

fn remove_cgroup(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            remove_cgroup(&path)?;
        }
    }
    match std::fs::remove_dir(dir) {
        Ok(()) => Ok(()),
        // Another engine's containers: theirs to remove.
        Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => Ok(()),
        Err(e) => Err(e).with_context(|| format!("removing {}", dir.display())),
    }
}

/// Unmounts what lies below `dir`, the last mounted first.
fn unmount_below(dir: &Path) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let mut points: Vec<&str> = mounts.lines().filter_map(|l| l.split(' ').nth(1)).collect();
    points.retain(|p| Path::new(p).starts_with(dir));
    for point in points.iter().rev() {
        Cmd::new("umount").arg(point).run()?;
    }
    Ok(())
}

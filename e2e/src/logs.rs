//! Collects what every part of the data centre has to say into one folder. One part that
//! does not answer does not keep the others from being collected.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::clusters::Cluster;
use crate::context::DataCentre;
use crate::exec::Cmd;
use crate::paths::Paths;

const LIMIT: Duration = Duration::from_secs(60);

/// Collects into `<run logs>/parts` and returns that folder.
pub fn collect(dc: &DataCentre) -> Result<PathBuf> {
    let dir = dc.ctx.paths.run_logs().join("parts");
    std::fs::create_dir_all(&dir)?;
    for c in [&dc.host, &dc.guest] {
        let dir = dir.join(c.spec.name);
        std::fs::create_dir_all(&dir)?;
        cluster(dc, c, &dir)?;
    }
    state(&dc.ctx.paths, &dir)?;
    Ok(dir)
}

/// Runs `cmd` and keeps its output, or its error, under `name`.
fn keep(dir: &Path, name: &str, cmd: &Cmd) -> Result<()> {
    let text = match cmd.run() {
        Ok(out) => [out.stdout, out.stderr].concat(),
        Err(e) => format!("could not be collected: {e}").into_bytes(),
    };
    std::fs::write(dir.join(name), text)?;
    Ok(())
}

fn cluster(dc: &DataCentre, c: &Cluster, dir: &Path) -> Result<()> {
    let kubectl = || -> Result<Cmd> {
        let cmd = dc
            .ctx
            .tools
            .cmd("kubectl")?
            .arg("--kubeconfig")
            .arg(&c.kubeconfig);
        Ok(cmd.arg("--request-timeout=20s").timeout(LIMIT).unlogged())
    };
    keep(dir, "nodes.txt", &kubectl()?.args(["describe", "nodes"]))?;
    keep(
        dir,
        "pods.txt",
        &kubectl()?.args(["get", "pods", "-A", "-o", "wide"]),
    )?;
    keep(
        dir,
        "pods-described.txt",
        &kubectl()?.args(["describe", "pods", "-A"]),
    )?;
    let events = [
        "get",
        "events",
        "-A",
        "--sort-by=.metadata.creationTimestamp",
    ];
    keep(dir, "events.txt", &kubectl()?.args(events))?;
    keep(
        dir,
        "journal.txt",
        &c.exec()
            .args(["journalctl", "--no-pager", "-b"])
            .timeout(LIMIT),
    )?;
    let docker = dc.docker.cmd().args(["logs", &c.node()]).timeout(LIMIT);
    keep(dir, "container.txt", &docker)?;
    ours(&kubectl, dir)?;
    pod_logs(&kubectl, dir)
}

/// Every object of our API groups and KubeVirt's, as YAML.
fn ours(kubectl: &dyn Fn() -> Result<Cmd>, dir: &Path) -> Result<()> {
    let list = [
        "get",
        "crd",
        "-o",
        "jsonpath={range .items[*]}{.metadata.name}{\"\\n\"}{end}",
    ];
    let crds = kubectl()?.args(list).text().unwrap_or_default();
    for crd in crds.lines() {
        let get = kubectl()?.args(["get", crd, "-A", "-o", "yaml"]);
        keep(dir, &format!("{crd}.yaml"), &get)?;
    }
    Ok(())
}

fn pod_logs(kubectl: &dyn Fn() -> Result<Cmd>, dir: &Path) -> Result<()> {
    let list = "jsonpath={range .items[*]}{.metadata.namespace} {.metadata.name}{\"\\n\"}{end}";
    let pods = kubectl()?
        .args(["get", "pods", "-A", "-o", list])
        .text()
        .unwrap_or_default();
    let logs = dir.join("logs");
    std::fs::create_dir_all(&logs)?;
    for line in pods.lines() {
        let Some((namespace, name)) = line.split_once(' ') else {
            continue;
        };
        let base = [
            "logs",
            "-n",
            namespace,
            name,
            "--all-containers",
            "--timestamps",
        ];
        keep(
            &logs,
            &format!("{namespace}_{name}.txt"),
            &kubectl()?.args(base),
        )?;
        let previous = kubectl()?.args(base).arg("--previous");
        if let Ok(out) = previous.run() {
            std::fs::write(
                logs.join(format!("{namespace}_{name}.previous.txt")),
                out.stdout,
            )?;
        }
    }
    Ok(())
}

/// Logs that daemons and machines write into the state folder.
fn state(paths: &Paths, dir: &Path) -> Result<()> {
    let into = dir.join("state");
    std::fs::create_dir_all(&into)?;
    copy_logs(&paths.state(), &into)
}

fn copy_logs(from: &Path, into: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        let Some(name) = path.file_name() else {
            continue;
        };
        if path.is_dir() {
            let sub = into.join(name);
            std::fs::create_dir_all(&sub)?;
            copy_logs(&path, &sub)?;
        } else if path.extension().is_some_and(|e| e == "log" || e == "txt") {
            std::fs::copy(&path, into.join(name))?;
        }
    }
    Ok(())
}

//! The Go programs of `e2e/tools/*/go.mod` and `pause`, built static into the cache.
//! Each module is an artefact of its own, keyed by its go.mod, go.sum, flags and Go.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::exec::Cmd;
use crate::paths::Paths;
use crate::{debian, progress};

/// The version stamped into the Kubernetes programs: that of the pinned module.
pub const KUBERNETES: &str = "v1.36.3";

struct Module {
    dir: &'static str,
    /// Program name and package.
    programs: &'static [(&'static str, &'static str)],
}

const MODULES: &[Module] = &[
    Module {
        dir: "kubernetes",
        programs: &[
            ("etcd", "go.etcd.io/etcd/server/v3"),
            ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
            ("kubeadm", "k8s.io/kubernetes/cmd/kubeadm"),
            (
                "kube-controller-manager",
                "k8s.io/kubernetes/cmd/kube-controller-manager",
            ),
            ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
            ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
            ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ],
    },
    Module {
        dir: "kind",
        programs: &[("kind", "sigs.k8s.io/kind")],
    },
    Module {
        dir: "containerd",
        programs: &[
            (
                "containerd",
                "github.com/containerd/containerd/v2/cmd/containerd",
            ),
            (
                "containerd-shim-runc-v2",
                "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
            ),
            ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
        ],
    },
    Module {
        dir: "cri-tools",
        programs: &[("crictl", "sigs.k8s.io/cri-tools/cmd/crictl")],
    },
    Module {
        dir: "cni",
        programs: &[
            (
                "host-local",
                "github.com/containernetworking/plugins/plugins/ipam/host-local",
            ),
            (
                "loopback",
                "github.com/containernetworking/plugins/plugins/main/loopback",
            ),
            (
                "ptp",
                "github.com/containernetworking/plugins/plugins/main/ptp",
            ),
            (
                "portmap",
                "github.com/containernetworking/plugins/plugins/meta/portmap",
            ),
        ],
    },
    Module {
        dir: "coredns",
        programs: &[("coredns", "github.com/coredns/coredns")],
    },
    Module {
        dir: "helm",
        programs: &[("helm", "helm.sh/helm/v3/cmd/helm")],
    },
];

/// Programs of one name each, in folders of the cache.
#[derive(Clone, Debug)]
pub struct Tools {
    dirs: Vec<PathBuf>,
    key: Key,
    source: PathBuf,
}

impl Tools {
    /// The path of program `name`.
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        self.dirs
            .iter()
            .map(|d| d.join(name))
            .find(|p| p.is_file())
            .with_context(|| format!("the harness builds no program called {name}"))
    }

    /// Runs program `name`.
    pub fn cmd(&self, name: &str) -> Result<Cmd> {
        Ok(Cmd::new(self.path(name)?))
    }

    /// What all programs are made from, to key what is made from them.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key.clone()
    }

    /// The folder of Go module `path` as `e2e/tools/<dir>` pins it.
    pub fn module_dir(&self, dir: &str, path: &str) -> Result<PathBuf> {
        let out = Cmd::new("go")
            .args(["list", "-m", "-f", "{{.Dir}}", path])
            .cwd(self.source.join("e2e/tools").join(dir))
            .text()?;
        Ok(PathBuf::from(out))
    }
}

/// Builds what is missing and points `assets` in the cache at the API server's programs.
pub fn ensure(paths: &Paths) -> Result<Tools> {
    debian::ensure(
        paths,
        &["gcc", "libc6-dev", "ca-certificates", "util-linux"],
    )?;
    let go = Cmd::new("go")
        .args(["env", "GOVERSION"])
        .text()
        .context("Go is needed")?;
    let mut key = Key::new();
    let mut dirs = Vec::new();
    for m in MODULES {
        let dir = paths.source().join("e2e/tools").join(m.dir);
        let flags = ldflags();
        let mut k = Key::new().text("go", &go).text("flags", &flags);
        for f in ["go.mod", "go.sum"] {
            k = k.file(&dir.join(f))?;
            key = key.file(&dir.join(f))?;
        }
        for (name, package) in m.programs {
            k = k.text(name, package);
        }
        key = key.text("flags", &flags).text("go", &go);
        dirs.push(cache::artefact(
            paths,
            &format!("tools-{}", m.dir),
            &k,
            |out| {
                progress::step(&format!("building {} from its Go modules", m.dir), |step| {
                    for (i, (name, package)) in m.programs.iter().enumerate() {
                        step.note(format!("{name}, {} of {}", i + 1, m.programs.len()));
                        build(&dir, &flags, package, &out.join(name))?;
                    }
                    Ok(())
                })
            },
        )?);
    }
    let source = paths.source().join("e2e/tools/pause/pause.c");
    key = key.file(&source)?;
    let k = Key::new().file(&source)?;
    dirs.push(cache::artefact(paths, "tools-pause", &k, |out| {
        Cmd::new("gcc")
            .args(["-Os", "-Wall", "-Wextra", "-static", "-s", "-o"])
            .arg(out.join("pause"))
            .arg(&source)
            .run()?;
        Ok(())
    })?);
    let tools = Tools {
        dirs,
        key,
        source: paths.source().to_owned(),
    };
    point_assets(paths, &tools)?;
    Ok(tools)
}

/// Where tests of other crates look for etcd and kube-apiserver.
#[must_use]
pub fn assets(paths: &Paths) -> PathBuf {
    paths.cache().join("assets")
}

fn point_assets(paths: &Paths, tools: &Tools) -> Result<()> {
    let target = tools.path("etcd")?;
    let target = target.parent().context("etcd lies in no folder")?;
    let link = assets(paths);
    if std::fs::read_link(&link).is_ok_and(|t| t == target) {
        return Ok(());
    }
    // A new link renamed over the old one: a reader never finds none.
    let new = paths
        .cache()
        .join(format!(".assets-{}", std::process::id()));
    std::os::unix::fs::symlink(target, &new)
        .with_context(|| format!("linking {}", new.display()))?;
    std::fs::rename(&new, &link).with_context(|| format!("linking {}", link.display()))
}

fn build(dir: &Path, flags: &str, package: &str, out: &Path) -> Result<()> {
    Cmd::new("go")
        .args(["build", "-trimpath", "-ldflags", flags, "-o"])
        .arg(out)
        .arg(package)
        .cwd(dir)
        // Scratch images have no libc.
        .env("CGO_ENABLED", "0")
        .timeout(Duration::from_secs(3600))
        .run()?;
    Ok(())
}

/// One set for all modules: what Kubernetes reads as its version the others ignore.
fn ldflags() -> String {
    let base = "k8s.io/component-base/version";
    let (major, minor) = major_minor(KUBERNETES);
    format!(
        "-s -w -X {base}.gitVersion={KUBERNETES} -X {base}.gitMajor={major} \
         -X {base}.gitMinor={minor} -X {base}.gitTreeState=clean \
         -X k8s.io/client-go/pkg/version.gitVersion={KUBERNETES}"
    )
}

fn major_minor(version: &str) -> (&str, &str) {
    let mut parts = version.trim_start_matches('v').split('.');
    (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stamp_is_the_version_that_is_pinned() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(root.join("tools/kubernetes/go.mod")).unwrap();
        assert!(text.contains(&format!("k8s.io/kubernetes {KUBERNETES}")));
        assert_eq!(major_minor(KUBERNETES), ("1", "36"));
    }

    #[test]
    fn each_module_pins_what_is_built_from_it() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools");
        for m in MODULES {
            assert!(root.join(m.dir).join("go.sum").is_file(), "{}", m.dir);
        }
    }
}

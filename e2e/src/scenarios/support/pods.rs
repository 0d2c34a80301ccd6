//! The project's own pods: found by their labels, killed, and replaced.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, Client, ResourceExt as _};

use super::far::sh;
use super::lab::Lab;
use crate::deploy::names::SYSTEM;
use crate::wait::{self, Probe};

const LIMIT: Duration = Duration::from_secs(120);
const EVERY: Duration = Duration::from_millis(300);

/// A program of the project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Agent,
    Controller,
    Syncer,
}

impl Part {
    pub const ALL: [Self; 3] = [Self::Agent, Self::Controller, Self::Syncer];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "node agent",
            Self::Controller => "controller",
            Self::Syncer => "guest-syncer",
        }
    }

    fn selector(self) -> &'static str {
        match self {
            Self::Agent => {
                "app.kubernetes.io/name=host-provisioner,app.kubernetes.io/component=node"
            }
            Self::Controller => {
                "app.kubernetes.io/name=host-provisioner,app.kubernetes.io/component=controller"
            }
            Self::Syncer => "app.kubernetes.io/name=guest-syncer",
        }
    }

    fn client(self, lab: &Lab<'_>) -> Client {
        match self {
            Self::Agent | Self::Controller => lab.host.clone(),
            Self::Syncer => lab.guest.clone(),
        }
    }

    fn api(self, lab: &Lab<'_>) -> Api<Pod> {
        Api::namespaced(self.client(lab), SYSTEM)
    }

    /// Its pods, also those that are ending.
    pub async fn pods(self, lab: &Lab<'_>) -> Result<Vec<Pod>> {
        let list = ListParams::default().labels(self.selector());
        let pods = self.api(lab).list(&list).await?.items;
        if pods.is_empty() {
            bail!("the {} has no pod ({})", self.name(), self.selector());
        }
        Ok(pods)
    }

    /// The program's name as the kernel cuts it off (TASK_COMM_LEN).
    fn process(self) -> &'static str {
        match self {
            Self::Agent | Self::Controller => "host-provisione",
            Self::Syncer => "guest-syncer",
        }
    }

    /// A script that runs `each` with every process of its in turn as `/proc/PID` in `$p`;
    /// one that ended meanwhile is no error.
    pub(super) fn each_process(self, each: &str) -> String {
        format!(
            "for p in /proc/[0-9]*; do [[ $(<$p/comm) == {} ]] || continue
{each}; done 2>/dev/null; true",
            self.process()
        )
    }

    /// SIGKILL to its processes, on the node they run on; how many there were.
    pub async fn kill_if_any(self, lab: &Lab<'_>) -> Result<u32> {
        let script = format!(
            "n=0; {}; echo $n",
            self.each_process("kill -KILL ${p#/proc/} && ((++n))")
        );
        let killed = match self {
            Self::Agent => sh(&lab.l1, &script).await?,
            Self::Controller => lab.dc.host.exec().args(["bash", "-c", &script]).text()?,
            Self::Syncer => lab.dc.guest.exec().args(["bash", "-c", &script]).text()?,
        };
        killed.trim().parse().context("counting processes")
    }

    /// SIGKILL to its processes; an error if it has none.
    pub async fn kill(self, lab: &Lab<'_>) -> Result<()> {
        let killed = self.kill_if_any(lab).await?;
        anyhow::ensure!(killed > 0, "the {} has no process", self.name());
        Ok(())
    }

    /// Deletes its pods as an update does, with time to end; the old pods' UIDs.
    pub async fn delete(self, lab: &Lab<'_>) -> Result<Vec<String>> {
        self.delete_with(lab, &DeleteParams::default()).await
    }

    /// Kills it, and deletes its pods so that no back-off is waited for; does not wait.
    pub async fn crash(self, lab: &Lab<'_>) -> Result<Vec<String>> {
        self.kill(lab).await?;
        let now = DeleteParams {
            grace_period_seconds: Some(0),
            ..DeleteParams::default()
        };
        self.delete_with(lab, &now).await
    }

    async fn delete_with(self, lab: &Lab<'_>, how: &DeleteParams) -> Result<Vec<String>> {
        let mut old = Vec::new();
        for pod in self.pods(lab).await? {
            let name = pod.metadata.name.context("a pod without a name")?;
            self.api(lab).delete(&name, how).await?;
            old.extend(pod.metadata.uid);
        }
        Ok(old)
    }

    /// Waits until as many new pods are Ready as there were old ones, and those are gone.
    pub async fn replaced(self, lab: &Lab<'_>, old: &[String]) -> Result<()> {
        let what = format!("a new pod of the {}", self.name());
        wait::until(&what, LIMIT, EVERY, || async {
            let list = ListParams::default().labels(self.selector());
            let pods = self.api(lab).list(&list).await?.items;
            let stale = |p: &Pod| p.metadata.uid.as_ref().is_some_and(|u| old.contains(u));
            let fresh = pods.iter().filter(|p| !stale(p) && ready(p)).count();
            Ok(if fresh >= old.len() && !pods.iter().any(stale) {
                Probe::Ready(())
            } else {
                Probe::NotYet(pods.iter().map(describe).collect::<Vec<_>>().join(", "))
            })
        })
        .await
    }

    /// Kills it and waits until the kubelet runs a successor in the same pods, Ready or not.
    pub async fn restart(self, lab: &Lab<'_>) -> Result<()> {
        let old = restarts(&self.pods(lab).await?);
        self.kill(lab).await?;
        let what = format!("a successor of the {}", self.name());
        wait::until(&what, LIMIT, EVERY, || async {
            let now = restarts(&self.pods(lab).await?);
            let newer = |(pod, n): (&String, &Option<i32>)| now.get(pod).is_some_and(|m| m > n);
            Ok(if old.iter().all(newer) {
                Probe::Ready(())
            } else {
                Probe::NotYet(format!(
                    "restarts of running pods were {old:?}, are {now:?}"
                ))
            })
        })
        .await
    }
}

/// By name: how often the pod's container was started again, if it runs.
fn restarts(pods: &[Pod]) -> BTreeMap<String, Option<i32>> {
    let of = |pod: &Pod| {
        let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
        let container = containers.first()?;
        container.state.as_ref()?.running.as_ref()?;
        Some(container.restart_count)
    };
    pods.iter().map(|p| (p.name_any(), of(p))).collect()
}

fn ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

fn describe(pod: &Pod) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or("?");
    let phase = pod
        .status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .unwrap_or("?");
    format!("{name} {phase} ready={}", ready(pod))
}

//! helm: a chart of the checkout installed or upgraded, and waited for.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::clusters::Cluster;
use crate::exec::Cmd;
use crate::paths::Paths;
use crate::tools::Tools;

/// Longest a release may take until all its pods are ready.
const LIMIT: Duration = Duration::from_secs(240);

/// helm with its own folders in the cache, so that the user's plugins and repositories
/// have no say.
fn helm(paths: &Paths, tools: &Tools, cluster: &Cluster) -> Result<Cmd> {
    let home = paths.cache().join("helm");
    Ok(tools
        .cmd("helm")?
        .env("HELM_CACHE_HOME", home.join("cache"))
        .env("HELM_CONFIG_HOME", home.join("config"))
        .env("HELM_DATA_HOME", home.join("data"))
        .env("KUBECONFIG", &cluster.kubeconfig))
}

/// Installs or upgrades chart `manifests/<chart>` as release `chart` in `namespace` and
/// waits until what it made is ready.
pub fn install(
    paths: &Paths,
    tools: &Tools,
    cluster: &Cluster,
    chart: &str,
    namespace: &str,
    values: &Value,
) -> Result<()> {
    let dir = paths.source().join("manifests").join(chart);
    unlock(paths, tools, cluster, chart, namespace)?;
    helm(paths, tools, cluster)?
        .args(["upgrade", "--install", chart])
        .arg(&dir)
        .args(["--namespace", namespace, "--create-namespace", "--wait"])
        .arg(format!("--timeout={}s", LIMIT.as_secs()))
        .args(["--history-max", "3", "--values", "-"])
        .stdin(serde_json::to_vec(values)?)
        .timeout(LIMIT + Duration::from_secs(30))
        .run()
        .with_context(|| format!("installing chart {chart} in {}", cluster.spec.name))?;
    Ok(())
}

/// A helm that was interrupted leaves its release "pending", which refuses every later
/// one. Nobody else installs here, so such a release's record is dropped.
fn unlock(
    paths: &Paths,
    tools: &Tools,
    cluster: &Cluster,
    chart: &str,
    namespace: &str,
) -> Result<()> {
    let pending = helm(paths, tools, cluster)?
        .args(["list", "--namespace", namespace, "--pending", "--short"])
        .text()?;
    if pending.lines().any(|l| l == chart) {
        let selector = format!("owner=helm,name={chart}");
        tools
            .cmd("kubectl")?
            .arg("--kubeconfig")
            .arg(&cluster.kubeconfig)
            .args(["-n", namespace, "delete", "secret", "-l"])
            .arg(format!(
                "{selector},status in (pending-install,pending-upgrade,pending-rollback)"
            ))
            .run()?;
    }
    Ok(())
}

//! What every command of the harness works with, and the running data centre.

use anyhow::{Context as _, Result};
use tokio::task::JoinSet;

use crate::clusters::{self, Cluster};
use crate::docker::{self, Docker};
use crate::paths::Paths;
use crate::tools::{self, Tools};
use crate::{deploy, machine, node_image, progress};

/// Paths and programs.
#[derive(Clone)]
pub struct Ctx {
    pub paths: Paths,
    pub tools: Tools,
    /// L1 is booted with one PF whose driver does not load by itself.
    pub bare: bool,
}

impl Ctx {
    /// Builds the programs that are missing.
    pub fn prepare(paths: Paths) -> Result<Self> {
        let tools = tools::ensure(&paths)?;
        Ok(Self {
            paths,
            tools,
            bare: false,
        })
    }

    /// The same for a data centre whose L1 comes up without its PF's driver.
    #[must_use]
    pub fn bare(&self) -> Self {
        Self {
            bare: true,
            ..self.clone()
        }
    }
}

/// A data centre that runs: what a scenario is given.
#[derive(Clone)]
pub struct DataCentre {
    pub ctx: Ctx,
    pub docker: Docker,
    pub host: Cluster,
    pub guest: Cluster,
}

impl DataCentre {
    /// Sets up what is missing of the two clusters; what runs already stays as it is.
    pub async fn clusters(ctx: Ctx) -> Result<Self> {
        let docker = docker::up(&ctx.paths, &ctx.tools)?;
        let image = node_image::ensure(&ctx.paths, &ctx.tools, &docker)?;
        let (host, guest) = clusters::up(&ctx.paths, &ctx.tools, &docker, &image).await?;
        Ok(Self {
            ctx,
            docker,
            host,
            guest,
        })
    }

    /// Sets up what is missing of all of it.
    pub async fn up(ctx: Ctx) -> Result<Self> {
        let dc = Self::clusters(ctx).await?;
        // Before the machines boot: an emulated machine beside a compiler runs into its
        // units' and leases' deadlines.
        let paths = dc.ctx.paths.clone();
        let images = tokio::task::spawn_blocking(move || deploy::build(&paths))
            .await
            .context("building the images")??;
        // The clusters' own nodes are this machine's, L1 is the emulator's: each sets up while
        // the other waits.
        let mut beside = JoinSet::new();
        let (clusters, their) = (dc.clone(), images.clone());
        beside.spawn(async move { deploy::into_clusters(&clusters, &their).await });
        let machines = async {
            let l1 = machine::host(&dc).await?;
            deploy::into_l1(&l1, &images).await?;
            machine::vm(&dc, l1).await
        };
        let (machines, clusters) = tokio::join!(machines, beside.join_next());
        machines?;
        clusters.context("nothing was deployed")???;
        deploy::agents_are_ready(&dc.host).await?;
        Ok(dc)
    }

    /// The one that `up` left running.
    pub async fn find(ctx: Ctx) -> Result<Option<Self>> {
        let Some(docker) = Docker::find(&ctx.paths)? else {
            return Ok(None);
        };
        let (host, guest) = clusters::find(&ctx.paths, &docker).await?;
        Ok(Some(Self {
            ctx,
            docker,
            host,
            guest,
        }))
    }
}

/// Whether a data centre runs. What is left of one that was killed, or whose computer was
/// switched off, is taken down: its clusters would go on with the nodes, pods and VMs of
/// machines that are no more.
pub fn runs(ctx: &Ctx) -> Result<bool> {
    let Some(docker) = Docker::find(&ctx.paths)? else {
        return Ok(false);
    };
    if !docker.died(&ctx.paths)? && !machine::died(&ctx.paths)? {
        return Ok(true);
    }
    progress::line("the data centre that was left is not whole any more: taking it down first");
    // Its containers are deleted by the engine that made them.
    docker::up(&ctx.paths, &ctx.tools)?;
    down(ctx)?;
    Ok(false)
}

/// Ends everything that `up` started, also half-started. Goes on after an error and
/// returns the first.
pub fn down(ctx: &Ctx) -> Result<()> {
    let mut wrong = Vec::new();
    let mut part = |name: &str, f: &dyn Fn() -> Result<()>| {
        if let Err(e) = progress::step(name, |_| f()) {
            progress::line(&format!("{name}: {e:#}"));
            wrong.push(e.context(name.to_owned()));
        }
    };
    part("ending the machines", &|| machine::down(&ctx.paths));
    if let Some(docker) = Docker::find(&ctx.paths)? {
        part("deleting the clusters", &|| {
            clusters::down(&ctx.paths, &ctx.tools, &docker)
        });
    }
    part("ending Docker and restoring the machine", &|| {
        docker::down(&ctx.paths)
    });
    match wrong.into_iter().next() {
        Some(first) => Err(first).context("the tear-down is not complete"),
        None => Ok(()),
    }
}

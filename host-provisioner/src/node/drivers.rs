//! Loads the kernel modules that this node is to have (`HostDriver`), and tells in its
//! `SriovNode` what became of each. Executes; what is due is `plan`'s.

mod others;
pub mod plan;
mod record;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::api::{DriverStatus, HostDriver, SriovNode, reason};
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Resource as _};
use serde_json::json;
use tokio::sync::{OwnedMutexGuard, watch};
use tokio_util::sync::CancellationToken;

use super::agent::Agent;
use super::error::ReconcileError;
use super::follow::follow;
use super::inventory;
use super::vf::{self, VfError};
use crate::kernel::modules::{KmodError, ModuleFacts, ModuleName, ModuleState, Modules};
use plan::{Due, Loaded, Wanted, Word};
use record::Record;

/// Field manager of `SriovNode.status.drivers`.
const MANAGER: &str = "host-provisioner-node-drivers";

/// What the kernel changes without telling us is seen within this time.
const RESYNC: Duration = Duration::from_secs(60);
/// A module that could not be loaded is tried again after this time, or when its `HostDriver`
/// changes: each try is a line in the kernel's log.
const RETRY: Duration = Duration::from_secs(300);
/// A module is loaded, looked at, and at most loaded again; more turns are a defect.
const TURNS: usize = 4;

/// The node's modules.
pub struct Drivers {
    agent: Arc<Agent>,
    modules: Arc<dyn Modules>,
    wishes: Store<HostDriver>,
    changed: watch::Receiver<()>,
    record: Record,
    /// What could not be loaded, by module, and when.
    failed: HashMap<ModuleName, (Option<i64>, Instant, Word)>,
    /// The `SriovNode` says nothing of modules, and there was nothing to say.
    quiet: bool,
}

impl Drivers {
    /// `record`: where it is kept what was loaded with which parameters; gone with the boot.
    #[must_use]
    pub fn new(
        agent: Arc<Agent>,
        modules: Arc<dyn Modules>,
        record: PathBuf,
        stop: CancellationToken,
    ) -> Self {
        let (changes, changed) = watch::channel(());
        let wishes = follow(&agent.client, watcher::Config::default(), changes, stop);
        Self {
            agent,
            modules,
            wishes,
            changed,
            record: Record::new(record),
            failed: HashMap::new(),
            quiet: false,
        }
    }
}

/// Loads and tells until stopped.
pub async fn run(mut drivers: Drivers, stop: CancellationToken) {
    // A cache that is not filled shows no wish, which is not the same as none.
    tokio::select! {
        () = stop.cancelled() => return,
        ready = drivers.wishes.wait_until_ready() => if ready.is_err() { return },
    }
    let key = "drivers".to_owned();
    loop {
        drivers.changed.mark_unchanged();
        let again = match drivers.pass().await {
            Ok(()) => {
                drivers.agent.backoff.forget(&key);
                RESYNC
            }
            Err(error) => {
                tracing::warn!(%error, "cannot see to this node's kernel modules");
                drivers.agent.backoff.failed(key.clone())
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(again) => {}
            Ok(()) = drivers.changed.changed() => {}
        }
    }
}

impl Drivers {
    /// Brings each module where it is to be, in order, then tells.
    async fn pass(&mut self) -> Result<(), ReconcileError> {
        let wishes = self.wishes.state();
        if wishes.is_empty() && self.quiet {
            return Ok(());
        }
        let nodes: Api<Node> = Api::all(self.agent.client.clone());
        let node = nodes.get(&self.agent.node_name).await?;
        let labels = node.metadata.labels.unwrap_or_default();
        let theirs = others::list(&self.agent.client).await?;
        let wanted = plan::wanted(wishes.iter().map(AsRef::as_ref), &theirs, &labels);
        let mut lines = Vec::new();
        for one in &wanted {
            lines.push(plan::line(one, self.settle(one).await?));
        }
        self.tell(lines).await
    }

    /// Does what is due for one module; how it is then.
    async fn settle(&mut self, wanted: &Wanted) -> Result<Word, ReconcileError> {
        let generation = wanted.generation;
        if let Some((about, at, word)) = self.failed.get(&wanted.module)
            && (*about, at.elapsed() < RETRY) == (generation, true)
        {
            return Ok(word.clone());
        }
        for _ in 0..TURNS {
            let facts = self.look(&wanted.module).await?;
            let failed = match plan::due(wanted, &facts, self.record.of(&wanted.module)) {
                Due::Nothing(word) => {
                    self.failed.remove(&wanted.module);
                    return Ok(word);
                }
                Due::Load => self.load(wanted).await?,
                Due::Reload => self.reload(wanted).await?,
            };
            if let Some(word) = failed {
                if !word.ready {
                    tracing::warn!(module = %wanted.module, reason = word.reason, "{}", word.message);
                }
                let entry = (generation, Instant::now(), word.clone());
                self.failed.insert(wanted.module.clone(), entry);
                return Ok(word);
            }
        }
        Ok(Word {
            ready: false,
            reason: reason::PENDING,
            message: format!(
                "{} does not stay as it is loaded: somebody else changes it",
                wanted.module
            ),
        })
    }

    async fn look(&self, module: &ModuleName) -> Result<ModuleFacts, ReconcileError> {
        let (modules, module) = (Arc::clone(&self.modules), module.clone());
        let seen = tokio::task::spawn_blocking(move || modules.module(&module)).await;
        let seen = seen.map_err(|e| VfError::Thread(e.to_string()))?;
        Ok(seen.map_err(VfError::from)?)
    }

    /// Something that kmod does.
    async fn kmod<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Modules) -> Result<T, KmodError> + Send + 'static,
    ) -> Result<Result<T, KmodError>, ReconcileError> {
        let modules = Arc::clone(&self.modules);
        let done = tokio::task::spawn_blocking(move || work(modules.as_ref())).await;
        Ok(done.map_err(|e| VfError::Thread(e.to_string()))?)
    }

    /// Loads a module; the words when it could not be.
    async fn load(&mut self, wanted: &Wanted) -> Result<Option<Word>, ReconcileError> {
        let (module, given) = (wanted.module.clone(), wanted.parameters.clone());
        if !given.is_empty() {
            // The kernel would load it all the same and say so in its log alone
            // (kernel/module/main.c, `unknown_module_param_cb`).
            let name = module.clone();
            let known = match self.kmod(move |kmod| kmod.parameters(&name)).await? {
                Ok(known) => known,
                Err(error) => return Ok(Some(self.failure(wanted, &error).await?)),
            };
            if let Some(word) = plan::unknown(wanted, &known) {
                return Ok(Some(word));
            }
        }
        tracing::info!(%module, parameters = ?given, "loading");
        let (name, with) = (module.clone(), given.clone());
        if let Err(error) = self.kmod(move |kmod| kmod.load(&name, &with)).await? {
            return Ok(Some(self.failure(wanted, &error).await?));
        }
        let facts = self.look(&module).await?;
        self.agent.tell_pool_changed();
        if facts.state == ModuleState::Absent {
            // kmod is content with a module that is part of the kernel, and with doing something
            // else in its place.
            return Ok(Some(
                match self.kmod(move |kmod| kmod.built_in(&module)).await? {
                    Ok(built_in) => plan::nothing_loaded(wanted, built_in),
                    Err(error) => self.failure(wanted, &error).await?,
                },
            ));
        }
        let shown = facts.parameters;
        let kept = self.record.keep(module, Loaded { given, shown });
        if let Err(error) = kept {
            tracing::warn!(%error, "a successor will not know what the module was loaded with");
        }
        Ok(None)
    }

    /// Unloads a module that nothing uses, and loads it with what is asked for.
    async fn reload(&mut self, wanted: &Wanted) -> Result<Option<Word>, ReconcileError> {
        // Nobody makes VFs on one of its functions meanwhile.
        let _turns = self.turns(&self.look(&wanted.module).await?).await?;
        let facts = self.look(&wanted.module).await?;
        if plan::due(wanted, &facts, self.record.of(&wanted.module)) != Due::Reload {
            return Ok(None);
        }
        tracing::info!(module = %wanted.module, "unloading, to load it with other parameters");
        let name = wanted.module.clone();
        if let Err(error) = self.kmod(move |kmod| kmod.unload(&name)).await? {
            return Ok(Some(self.failure(wanted, &error).await?));
        }
        self.load(wanted).await
    }

    /// The turns of the physical functions that the module drives, in a fixed order.
    async fn turns(&self, facts: &ModuleFacts) -> Result<Vec<OwnedMutexGuard<()>>, ReconcileError> {
        let node = self.agent.node_name.clone();
        let functions = facts.functions.clone();
        let mut names: Vec<String> = vf::blocking(&self.agent.kernel, move |kernel| {
            let all = kernel.physical_functions()?.into_iter();
            let mine = all.filter(|pf| functions.contains(&pf.address));
            Ok(mine
                .map(|pf| inventory::physical_function_name(&node, &pf.identity))
                .collect())
        })
        .await?;
        names.sort();
        let mut turns = Vec::new();
        for name in names {
            turns.push(self.agent.pf_turns.take(&name).await);
        }
        Ok(turns)
    }

    async fn failure(&self, wanted: &Wanted, error: &KmodError) -> Result<Word, ReconcileError> {
        let facts = vf::blocking(&self.agent.kernel, |kernel| Ok(kernel.node_facts()?)).await?;
        let lockdown = facts.lockdown.as_deref();
        Ok(plan::failure(
            wanted,
            error,
            &facts.kernel_release,
            lockdown,
        ))
    }

    /// Writes the node's lines when they differ from what is there, and events about what is new.
    async fn tell(&mut self, lines: Vec<DriverStatus>) -> Result<(), ReconcileError> {
        let api: Api<SriovNode> = Api::all(self.agent.client.clone());
        // Without an object there is nothing to add to yet: the publisher makes it.
        let node = api.get_opt(&self.agent.node_name).await?;
        let told = node
            .and_then(|node| node.status)
            .unwrap_or_default()
            .drivers;
        self.quiet = told.is_empty() && lines.is_empty();
        if told == lines {
            return Ok(());
        }
        let patch = json!({
            "apiVersion": SriovNode::api_version(&()),
            "kind": SriovNode::kind(&()),
            "metadata": {"name": self.agent.node_name},
            "status": {"drivers": lines},
        });
        let params = PatchParams::apply(MANAGER).force();
        let written = api
            .patch_status(&self.agent.node_name, &params, &Patch::Apply(patch))
            .await?;
        self.events(&written.object_ref(&()), &told, &lines).await;
        Ok(())
    }

    async fn events(&self, node: &ObjectReference, before: &[DriverStatus], now: &[DriverStatus]) {
        let events = &self.agent.events;
        let said: BTreeMap<&str, &DriverStatus> = before
            .iter()
            .map(|line| (line.name.as_str(), line))
            .collect();
        for line in now {
            let old = said.get(line.name.as_str());
            if old.is_some_and(|old| old.reason == line.reason) {
                continue;
            }
            let Some(wish) = self.wishes.get(&ObjectRef::new(&line.name)) else {
                continue;
            };
            let (on, note) = (
                wish.object_ref(&()),
                format!("node {}: {}", self.agent.node_name, line.message),
            );
            match line.ready {
                true => events.normal(&on, "Load", &line.reason, &note).await,
                false => events.warning(&on, "Load", &line.reason, &note).await,
            }
        }
        let gone = before
            .iter()
            .filter(|old| !now.iter().any(|line| line.name == old.name));
        for line in gone.filter(|line| line.ready && line.reason == reason::LOADED) {
            let note = format!(
                "HostDriver {} is gone or leaves this node out; module {} stays loaded. When nothing uses it: modprobe -r {}",
                line.name, line.module, line.module
            );
            events
                .normal(node, "Load", reason::MODULE_KEPT, &note)
                .await;
        }
    }
}

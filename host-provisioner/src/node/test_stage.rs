//! An agent for tests: a real API server, the kernel that remembers, and no VM. Claims are
//! as the controller leaves them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use common::api::{
    PhysicalFunction, PhysicalFunctionSpec, ReclaimPolicy, VFClaim, VFClaimSpec, host_claim_name,
};
use common::kube::Backoff;
use common::kube::events::Events;
use common::pci::PciAddress;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::reflector::{self, ObjectRef};
use kube::{Api, Client};
use serde_json::json;
use test_apiserver::TestApiServer;
use tokio::sync::{mpsc, watch};

use super::agent::{Agent, Recent, SharedLedger, Turns};
use super::inventory;
use super::listen::Listeners;
use super::resize::Resizes;
use super::sessions::Sessions;
use crate::hypervisor::gates::journal::Journal;
use crate::hypervisor::gates::{GateError, Gates, Recovered};
use crate::hypervisor::launcher::{Proc, QemuProcess, fixture};
use crate::hypervisor::memory::MemoryFacts;
use crate::hypervisor::{GuestMemory, Hypervisor, HypervisorError, Session};
use crate::kernel::PfFacts;
use crate::kernel::fake::{FakeKernel, igb_pf};

pub(super) const NODE: &str = "harv-1";
const NAMESPACE: &str = "default";
const FINALIZER: &str = "test.example.org/kept";

/// Nobody's: a host without VMs has no monitor and no gate.
struct NoVm;

#[async_trait]
impl Hypervisor for NoVm {
    async fn connect(&self, process: &QemuProcess) -> Result<Arc<dyn Session>, HypervisorError> {
        Err(HypervisorError::Lost {
            command: "none".into(),
            reason: format!("process {} is none of a VM", process.pid),
        })
    }
}

impl Gates for NoVm {
    fn memory_facts(
        &self,
        _: &QemuProcess,
        _: GuestMemory,
        _: u32,
    ) -> Result<MemoryFacts, GateError> {
        Err(GateError::Refused("there is no VM".into()))
    }
    fn open(&self, _: &QemuProcess, _: u32, _: u64) -> Result<(), GateError> {
        Err(GateError::Refused("there is no VM".into()))
    }
    fn close_device(&self, _: &str, _: u32) -> Result<(), GateError> {
        Ok(())
    }
    fn close_all(&self, _: &str) -> Result<(), GateError> {
        Ok(())
    }
    fn keep_memlock(&self, _: &str) -> Result<bool, GateError> {
        Ok(false)
    }
    fn locked_before(&self, _: &QemuProcess) -> Result<u64, GateError> {
        Ok(0)
    }
    fn recover(&self, _: &dyn Fn(&Journal) -> bool) -> Result<Vec<Recovered>, GateError> {
        Ok(Vec::new())
    }
}

pub(super) struct Stage {
    pub(super) agent: Arc<Agent>,
    pub(super) kernel: FakeKernel,
    pub(super) pf: PfFacts,
    /// Its object's name.
    pub(super) function: String,
    /// What the agent's watch of PhysicalFunctions shows.
    shown: reflector::store::Writer<PhysicalFunction>,
    /// Claims that the agent has woken.
    pub(super) wakes: mpsc::UnboundedReceiver<ObjectRef<VFClaim>>,
    client: Client,
    _server: TestApiServer,
    proc: tempfile::TempDir,
}

impl Stage {
    /// One managed igb PF without VFs.
    pub(super) async fn new() -> Self {
        Self::of(igb_pf("0000:01:00.0".parse::<PciAddress>().unwrap())).await
    }

    /// This PF, managed and without VFs.
    pub(super) async fn of(pf: PfFacts) -> Self {
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/vf-crds/templates");
        let server = TestApiServer::lend(&[&crds]).await.unwrap();
        let client = server.admin();
        let kernel = FakeKernel::new([pf.clone()]);
        let proc = tempfile::tempdir().unwrap();

        let name = inventory::physical_function_name(NODE, &pf.identity);
        let mut object = PhysicalFunction::new(&name, inventory::new_spec(NODE, &pf));
        object.spec.managed = true;
        let functions: Api<PhysicalFunction> = Api::all(client.clone());
        let made = functions.create(&PostParams::default(), &object).await;
        let object = made.unwrap();
        let (functions, mut shown) = reflector::store();
        shown.apply_watcher_event(&kube::runtime::watcher::Event::Apply(object));

        let second = Duration::from_secs(1);
        let (woken, wakes) = mpsc::unbounded_channel();
        let agent = Agent {
            client: client.clone(),
            node_name: NODE.into(),
            boot_id: "boot".into(),
            kernel: Arc::new(kernel.clone()),
            hypervisor: Arc::new(NoVm),
            sessions: Sessions::default(),
            listeners: Listeners::default(),
            recent: Recent::default(),
            gates: Arc::new(NoVm),
            proc: Proc::new(proc.path()),
            reserved_ports: 2,
            events: Events::new(client.clone(), "test", None),
            backoff: Backoff::new(second / 100, second),
            pf_turns: Turns::default(),
            vm_turns: Turns::default(),
            pool_changed: watch::channel(()).0,
            report_due: watch::channel(()).0,
            woken,
            functions,
            ledger: SharedLedger::default(),
            resizes: Resizes::default(),
        };
        Self {
            agent: Arc::new(agent),
            kernel,
            pf,
            function: name,
            shown,
            wakes,
            client,
            _server: server,
            proc,
        }
    }

    /// One more managed PF; its object's name.
    pub(super) async fn add_pf(&mut self, pf: PfFacts) -> String {
        let name = inventory::physical_function_name(NODE, &pf.identity);
        let mut object = PhysicalFunction::new(&name, inventory::new_spec(NODE, &pf));
        object.spec.managed = true;
        self.kernel.add(pf);
        let functions = self.functions();
        let made = functions.create(&PostParams::default(), &object).await;
        let made = kube::runtime::watcher::Event::Apply(made.unwrap());
        self.shown.apply_watcher_event(&made);
        name
    }

    pub(super) fn functions(&self) -> Api<PhysicalFunction> {
        Api::all(self.client.clone())
    }

    /// Changes the PF's spec; the agent's watch shows the object as it is then.
    pub(super) async fn respec(&mut self, change: impl FnOnce(&mut PhysicalFunctionSpec)) {
        let functions = self.functions();
        let mut object = functions.get(&self.function).await.unwrap();
        change(&mut object.spec);
        let params = PostParams::default();
        let written = functions.replace(&self.function, &params, &object);
        let object = written.await.unwrap();
        self.shown
            .apply_watcher_event(&kube::runtime::watcher::Event::Apply(object));
    }

    pub(super) fn claims(&self) -> Api<VFClaim> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// A claim that the controller has granted and bound to this node.
    pub(super) async fn claim(&self, mac: &str) -> VFClaim {
        self.claim_of(mac, ReclaimPolicy::Return).await
    }

    /// Such a claim with another reclaim policy.
    pub(super) async fn claim_of(&self, mac: &str, policy: ReclaimPolicy) -> VFClaim {
        let network = json!({"macAddress": mac, "spoofCheck": true, "trust": false});
        self.granted(&mac.replace(':', ""), policy, "network", &network)
            .await
    }

    /// A claim that may have one of these namespaces.
    pub(super) async fn storage_claim(&self, uid: &str, namespaces: &[u32]) -> VFClaim {
        let storage = json!({ "namespaces": namespaces });
        self.granted(uid, ReclaimPolicy::Return, "storage", &storage)
            .await
    }

    async fn granted(
        &self,
        uid: &str,
        policy: ReclaimPolicy,
        kind: &str,
        what: &serde_json::Value,
    ) -> VFClaim {
        let spec: VFClaimSpec = serde_json::from_value(json!({
            "className": "gold",
            "guest": {
                "cluster": "blue", "clusterUID": "c", "namespace": "team", "name": "fast",
                "uid": uid, "nodeName": "w1",
                "systemUUID": "6d1a3a5e-4e5f-4b7a-9a43-0a7c1f2e3d4c",
            },
        }))
        .unwrap();
        let mut claim = VFClaim::new(&host_claim_name(uid), spec);
        claim.metadata.finalizers = Some(vec![FINALIZER.into()]);
        let api = self.claims();
        api.create(&PostParams::default(), &claim).await.unwrap();
        let status = json!({"status": {
            "hostNode": NODE,
            "admitted": {
                "observedGeneration": 1, "className": "gold", "classUID": "g",
                "pfSelector": {}, "reclaimPolicy": policy, kind: what,
            },
            "vm": {"namespace": "vms", "name": "w1", "uid": "vm"},
            "launcher": {"vmiUID": "vmi", "podUID": "pod"},
        }});
        let name = host_claim_name(uid);
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .unwrap()
    }

    /// Asks for the claim's deletion.
    pub(super) async fn delete(&self, claim: &VFClaim) {
        let name = claim.metadata.name.as_deref().unwrap();
        self.claims()
            .delete(name, &DeleteParams::default())
            .await
            .unwrap();
    }

    /// Deletes it, with nobody to keep it.
    pub(super) async fn tear_off(&self, claim: &VFClaim) {
        let name = claim.metadata.name.as_deref().unwrap();
        let none = json!({"metadata": {"finalizers": null}});
        self.claims()
            .patch(name, &PatchParams::default(), &Patch::Merge(none))
            .await
            .unwrap();
        self.delete(claim).await;
    }

    pub(super) async fn now(&self, claim: &VFClaim) -> VFClaim {
        let name = claim.metadata.name.as_deref().unwrap();
        self.claims().get(name).await.unwrap()
    }

    /// The claims' VM runs, its QEMU has these VFIO groups open, and its monitor does not answer.
    pub(super) fn run_vm(&self, groups: &[u32]) {
        fixture::qemu(self.proc.path(), 12, "pod", groups);
    }

    /// Where the agent sees the processes.
    pub(super) fn proc(&self) -> &Path {
        self.proc.path()
    }

    /// VFs that the ledger says somebody has.
    pub(super) fn taken(&self) -> usize {
        let ledger = self.agent.ledger.lock();
        ledger.functions().map(|f| ledger.on(f).count()).sum()
    }
}

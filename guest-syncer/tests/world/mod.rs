//! Two real API servers, a host's and a guest's, and a syncer between them that
//! runs with the rights it gets in the field: the chart's rules in the guest,
//! and on the host a certificate that may only touch its own claim namespace.

#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::api::{
    GUEST_USER_PREFIX, GuestCluster, VFClaim, VFClaimStatus, condition, host_claim_name,
};
use common::kube::{ClientOptions, KubeClient};
use common::telemetry::{self, Metrics};
use guest_syncer::host_link::HostLink;
use guest_syncer::mirror::orphan_pass::Pace;
use guest_syncer::syncer::{self, Options};
use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use test_apiserver::TestApiServer;
use test_apiserver::gate::Gate;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub mod wire;
use wire::Wire;

/// How long anything may take; a claim's whole way takes well under a second.
const PATIENCE: Duration = Duration::from_secs(30);

/// The name of our GuestCluster.
pub const CLUSTER: &str = "blue";
/// Its claim namespace on the host.
pub const CLAIMS: &str = "claims-blue";
pub const UUID: &str = "6f1c1c3e-0d3d-4d4b-9a57-8a3a0f4f6a01";

/// A syncer at work.
pub type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// One pair at a time: four API servers at once starve a small machine.
static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

pub struct World {
    pub guest: TestApiServer,
    pub host: TestApiServer,
    /// To the host.
    pub wire: Wire,
    /// To the guest.
    pub guest_wire: Wire,
    /// When the syncer looks for orphans: once, unless a test says otherwise.
    pub pace: Pace,
    /// Of the syncer that was started last.
    pub metrics: Metrics,
    pub dir: tempfile::TempDir,
    /// Bound of a syncer's calls to the host.
    pub timeout: Duration,
    syncers: Vec<(CancellationToken, JoinHandle<()>)>,
    _one: tokio::sync::MutexGuard<'static, ()>,
}

fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

impl World {
    /// Both servers with our CRDs, RBAC, the node `w1` and the GuestCluster; no
    /// syncer yet.
    pub async fn new() -> Self {
        let one = ONE.lock().await;
        let crds = repo("manifests/vf-crds/templates");
        let crds = [crds.as_path()];
        let (guest, host) = tokio::join!(TestApiServer::lend(&crds), TestApiServer::lend(&crds));
        let (guest, host) = (guest.unwrap(), host.unwrap());
        let wire = Wire::to(host.url()).await;
        let guest_wire = Wire::to(guest.url()).await;
        let world = Self {
            guest,
            host,
            wire,
            guest_wire,
            pace: Pace {
                interval: Duration::from_secs(600),
                between_looks: Duration::from_secs(60),
                timeout: Duration::from_secs(3),
            },
            metrics: telemetry::metrics(),
            dir: tempfile::tempdir().unwrap(),
            timeout: Duration::from_secs(3),
            syncers: Vec::new(),
            _one: one,
        };
        world.furnish().await;
        world
    }

    async fn furnish(&self) {
        let rules =
            std::fs::read_to_string(repo("manifests/guest-syncer/files/rules.yaml")).unwrap();
        let rules: Value = serde_saphyr::from_str(&rules).unwrap();
        grant(&self.guest.admin(), "guest-syncer", rules, None).await;
        let host = self.host.admin();
        ensure_namespace(&host, CLAIMS).await;
        ensure_namespace(&self.guest.admin(), "team").await;
        let user = format!("{GUEST_USER_PREFIX}{CLUSTER}");
        let claims = json!([{"apiGroups": ["sriov.harvesterhci.io"], "resources": ["vfclaims"],
            "verbs": ["get", "list", "watch", "create", "patch", "delete"]}]);
        grant(&host, &user, claims, Some(CLAIMS)).await;
        let own = json!([{"apiGroups": ["sriov.harvesterhci.io"], "resources": ["guestclusters"],
            "resourceNames": [CLUSTER], "verbs": ["get", "list", "watch"]}]);
        grant(&host, &user, own, None).await;
        self.make_guest_cluster().await;
        self.make_node("w1", UUID).await;
    }

    pub async fn make_guest_cluster(&self) {
        let found = json!({"metadata": {"name": CLUSTER},
            "spec": {"claimNamespace": CLAIMS, "vmNamespace": "vms-blue", "classes": ["gold"]}});
        let api: Api<GuestCluster> = Api::all(self.host.admin());
        create(&api, found).await;
    }

    pub async fn make_node(&self, name: &str, uuid: &str) {
        let api: Api<Node> = Api::all(self.guest.admin());
        create(&api, json!({"metadata": {"name": name}})).await;
        let status = json!({"status": {
            "addresses": [{"type": "InternalIP", "address": "10.0.0.7"}],
            "nodeInfo": {"machineID": "m", "systemUUID": uuid, "bootID": "b",
                "kernelVersion": "k", "osImage": "o", "containerRuntimeVersion": "c",
                "kubeletVersion": "v", "kubeProxyVersion": "", "operatingSystem": "linux",
                "architecture": "amd64"}}});
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .unwrap();
    }

    /// A file with the host kubeconfig of `user`, through the wire.
    pub fn host_kubeconfig(&self, user: &str) -> PathBuf {
        self.kubeconfig("host", user, &self.host, &self.wire)
    }

    fn kubeconfig(&self, name: &str, user: &str, server: &TestApiServer, wire: &Wire) -> PathBuf {
        let text = server.kubeconfig_for(user, &[]).unwrap();
        let text = text.replace(server.url(), &wire.url());
        let path = self.dir.path().join(format!("{name}.kubeconfig"));
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Starts one more syncer with the certificate of this guest. What it writes
    /// goes through the gate.
    pub async fn start(&mut self) -> Gate {
        self.start_as(&format!("{GUEST_USER_PREFIX}{CLUSTER}"))
            .await
    }

    pub async fn start_as(&mut self, host_user: &str) -> Gate {
        let uid = syncer::cluster_uid(&self.guest.admin()).await.unwrap();
        self.start_with(host_user, uid).await
    }

    /// Starts a syncer that began when this cluster's UID was `cluster_uid`.
    pub async fn start_with(&mut self, host_user: &str, cluster_uid: String) -> Gate {
        let gate = Gate::default();
        let work = self.syncer(&gate, host_user, cluster_uid).await;
        let stop = CancellationToken::new();
        let task = tokio::spawn(work(stop.clone()));
        self.syncers.push((stop, task));
        gate
    }

    /// A syncer of this guest, as leader election gets it.
    pub async fn syncer_to_lead(
        &mut self,
        gate: &Gate,
    ) -> impl FnOnce(CancellationToken) -> Work + use<> {
        let uid = syncer::cluster_uid(&self.guest.admin()).await.unwrap();
        let user = format!("{GUEST_USER_PREFIX}{CLUSTER}");
        self.syncer(gate, &user, uid).await
    }

    async fn syncer(
        &mut self,
        gate: &Gate,
        host_user: &str,
        cluster_uid: String,
    ) -> impl FnOnce(CancellationToken) -> Work + use<> {
        let to = |path| ClientOptions {
            kubeconfig: Some(path),
            qps: 0.0,
            burst: 1,
            look: Duration::from_millis(100),
        };
        let path = self.host_kubeconfig(host_user);
        let host = KubeClient::new(&to(path)).await.unwrap();
        let path = self.kubeconfig("guest", "guest-syncer", &self.guest, &self.guest_wire);
        let guest = KubeClient::new(&to(path)).await.unwrap();
        let options = Options {
            guest_cluster: CLUSTER.to_owned(),
            workers: 8,
            timeout: self.timeout,
            retry_start: Duration::from_millis(200),
            retry_max: Duration::from_secs(2),
            orphans: self.pace,
            identity: None,
        };
        self.metrics = telemetry::metrics();
        let metrics = self.metrics.clone();
        let link = gate.client(host.client());
        let client = gate.client(guest.client());
        move |stop| {
            Box::pin(async move {
                let link = Arc::new(HostLink::new(link, options.timeout));
                syncer::run(client, link, cluster_uid, &options, &metrics, stop)
                    .await
                    .unwrap();
                drop((guest, host));
            })
        }
    }

    /// What the syncer counts under a metric's name and labels.
    pub fn counted(&self, metric: &str) -> u64 {
        let mut text = String::new();
        let registry = self.metrics.lock().unwrap();
        telemetry::prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let metric = format!("vf_provisioner_syncer_{metric} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&metric));
        value.map_or(0, |v| v.parse().unwrap())
    }

    /// Waits until so many passes for orphans have ended so.
    pub async fn passes(&self, outcome: &str, times: u64) {
        let metric = format!("orphan_passes_total{{outcome=\"{outcome}\"}}");
        let before = self.counted(&metric);
        eventually(&format!("{times} passes: {outcome}"), || async {
            (self.counted(&metric) >= before + times).then_some(())
        })
        .await;
    }

    /// Stops all syncers in order.
    pub async fn stop(&mut self) {
        for (stop, task) in self.syncers.drain(..) {
            stop.cancel();
            task.await.unwrap();
        }
    }

    pub fn guest_claims(&self) -> Api<VFClaim> {
        Api::namespaced(self.guest.admin(), "team")
    }

    pub fn host_claims(&self) -> Api<VFClaim> {
        Api::namespaced(self.host.admin(), CLAIMS)
    }

    /// A tenant's claim for the node.
    pub async fn claim(&self, name: &str, node: &str) -> VFClaim {
        let claim = json!({"metadata": {"name": name}, "spec": {"className": "gold",
            "nodeName": node, "network": {"vlan": {"id": 100, "qos": 3}}}});
        create(&self.guest_claims(), claim).await
    }

    /// The copy of a guest's claim, once it is there.
    pub async fn copy_of(&self, claim: &VFClaim) -> VFClaim {
        let name = host_claim_name(&claim.uid().unwrap());
        let api = self.host_claims();
        eventually("the copy on the host", || async {
            api.get_opt(&name).await.unwrap()
        })
        .await
    }

    /// The guest's claim once `condition` has this status and reason.
    pub async fn says(&self, name: &str, type_: &str, status: &str, reason: &str) -> VFClaim {
        self.says_in_words(name, type_, status, reason, "").await
    }

    /// The same, once the message has `part` in it: the first reason is often refined.
    pub async fn says_in_words(
        &self,
        name: &str,
        type_: &str,
        status: &str,
        reason: &str,
        part: &str,
    ) -> VFClaim {
        let api = self.guest_claims();
        let what = format!("{name}: {type_}={status} {reason} {part:?}");
        eventually(&what, || async {
            let claim = api.get_opt(name).await.unwrap()?;
            let conditions = claim.status.as_ref()?.conditions.clone();
            let c = condition(&conditions, type_)?;
            (c.status == status && c.reason == reason && c.message.contains(part)).then_some(claim)
        })
        .await
    }

    /// A tenant's deletion of a claim.
    pub async fn delete(&self, name: &str) {
        self.guest_claims()
            .delete(name, &DeleteParams::default())
            .await
            .unwrap();
    }

    pub async fn gone(&self, name: &str) {
        let api = self.guest_claims();
        eventually(&format!("{name} gone"), || async {
            api.get_opt(name).await.unwrap().is_none().then_some(())
        })
        .await;
    }

    /// Writes a copy's status as the host's programs would.
    pub async fn host_says(&self, copy: &VFClaim, status: &VFClaimStatus) {
        let patch = json!({ "status": status });
        self.host_claims()
            .patch_status(
                &copy.name_any(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            )
            .await
            .unwrap();
    }

    /// A kind of the host's admission API.
    pub fn admission(&self, kind: &str) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("admissionregistration.k8s.io", "v1", kind);
        let resource = match kind.kind.strip_suffix("Policy") {
            Some(stem) => ApiResource::from_gvk_with_plural(
                &kind,
                &format!("{}policies", stem.to_lowercase()),
            ),
            None => ApiResource::from_gvk(&kind),
        };
        Api::all_with(self.host.admin(), &resource)
    }

    /// Waits until the host refuses a claim: policies take a moment to load.
    pub async fn policy_in_force(&self) {
        let api = self.host_claims();
        let probe: VFClaim =
            serde_json::from_value(json!({"apiVersion": "sriov.harvesterhci.io/v1alpha1",
            "kind": "VFClaim", "metadata": {"name": "probe"}, "spec": {"nodeName": "x"}}))
            .unwrap();
        let dry = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        eventually("the policy", || async {
            api.create(&dry, &probe).await.is_err().then_some(())
        })
        .await;
    }

    /// Event reasons on an object of the guest.
    pub async fn events_on(&self, name: &str) -> Vec<String> {
        let all = self.notes_on(name).await;
        all.into_iter().map(|(reason, _)| reason).collect()
    }

    /// Reasons and notes of the events on an object of the guest.
    pub async fn notes_on(&self, name: &str) -> Vec<(String, String)> {
        let kind = GroupVersionKind::gvk("events.k8s.io", "v1", "Event");
        let api: Api<DynamicObject> =
            Api::all_with(self.guest.admin(), &ApiResource::from_gvk(&kind));
        let events = api.list(&Default::default()).await.unwrap();
        let text =
            |e: &DynamicObject, field: &str| e.data[field].as_str().unwrap_or_default().to_owned();
        events
            .iter()
            .filter(|e| e.data["regarding"]["name"] == name)
            .map(|e| (text(e, "reason"), text(e, "note")))
            .collect()
    }
}

pub async fn create<K>(api: &Api<K>, object: Value) -> K
where
    K: Clone + DeserializeOwned + serde::Serialize + std::fmt::Debug,
{
    let object: K = serde_json::from_value(object).unwrap();
    api.create(&PostParams::default(), &object).await.unwrap()
}

/// kube-apiserver makes kube-system itself, a little after it is ready.
async fn ensure_namespace(client: &Client, name: &str) {
    let api: Api<Namespace> = Api::all(client.clone());
    create(&api, json!({"metadata": {"name": name}})).await;
    eventually("kube-system", || async {
        api.get_opt("kube-system").await.unwrap()
    })
    .await;
}

async fn grant(client: &Client, user: &str, rules: Value, namespace: Option<&str>) {
    let scope = if namespace.is_some() { "" } else { "Cluster" };
    let name = user.replace(':', "-");
    let subject = json!([{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}]);
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1",
        "metadata": {"name": name}, "rules": rules});
    let binding = json!({"metadata": {"name": name}, "subjects": subject, "roleRef": {
        "apiGroup": "rbac.authorization.k8s.io", "kind": format!("{scope}Role"), "name": name}});
    for (kind, object) in [("Role", role), ("RoleBinding", binding)] {
        let kind = format!("{scope}{kind}");
        let gvk = GroupVersionKind::gvk("rbac.authorization.k8s.io", "v1", &kind);
        let resource = ApiResource::from_gvk(&gvk);
        let api: Api<DynamicObject> = match namespace {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
            None => Api::all_with(client.clone(), &resource),
        };
        create(&api, object).await;
    }
}

/// Looks until there is something, and fails with what was waited for.
pub async fn eventually<T, F, Fut>(what: &str, mut look: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

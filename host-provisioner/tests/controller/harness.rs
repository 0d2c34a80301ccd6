//! An API server with the CRDs, the chart's rights and policy, and a running
//! controller.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::api::{
    GuestCluster, GuestClusterSpec, GuestRef, NetworkField, VFClaim, VFClaimSpec, VFClass,
    VFClassSpec, condition, host_claim_name,
};
use common::telemetry::{Health, metrics};
use host_provisioner::controller::{ControllerError, Settings, run, vmi};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{GroupVersionKind, TypeMeta};
use kube::discovery::pinned_kind;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use test_apiserver::TestApiServer;
use test_apiserver::gate::Gate;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const CLAIMS: &str = "claims-blue";
pub const UUID: &str = "6d1a3a5e-4e5f-4b7a-9a43-0a7c1f2e3d4c";
const CONTROLLER: &str = "system:serviceaccount:vf-system:hp-controller";
const PATIENCE: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A template of the chart with the few placeholders that it has filled in;
/// whole charts are rendered by helm in the e2e.
fn rendered(template: &str) -> Vec<Value> {
    let path = root()
        .join("manifests/host-provisioner/templates")
        .join(template);
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().filter(|l| !l.trim_start().starts_with("{{-"));
    let mut filled = String::new();
    for line in lines {
        let line = line
            .replace("{{ include \"hp.name\" . }}", "hp")
            .replace("{{ $name }}", "hp")
            .replace("{{ .Release.Namespace }}", "vf-system");
        if line.contains("labels: {{-") {
            continue;
        }
        assert!(!line.contains("{{"), "{template}: {line}");
        filled.push_str(&line);
        filled.push('\n');
    }
    serde_saphyr::from_multiple(&filled).unwrap()
}

pub struct Harness {
    pub server: TestApiServer,
    pub admin: Client,
    running: Vec<(CancellationToken, JoinHandle<()>)>,
}

impl Harness {
    /// Everything but the controller; class `gold` exists.
    pub async fn new() -> Self {
        let (ours, others) = (
            root().join("manifests/vf-crds/templates"),
            root().join("e2e/fixtures"),
        );
        let server = TestApiServer::lend(&[&ours, &others]).await.unwrap();
        let admin = server.admin();
        for name in ["vf-system", "vms"] {
            let namespace = Namespace {
                metadata: ObjectMeta {
                    name: Some(name.to_owned()),
                    ..ObjectMeta::default()
                },
                ..Namespace::default()
            };
            Api::all(admin.clone())
                .create(&PostParams::default(), &namespace)
                .await
                .unwrap();
        }
        let harness = Self {
            server,
            admin,
            running: Vec::new(),
        };
        for template in [
            "controller-rbac.yaml",
            "guest-role.yaml",
            "guest-policy.yaml",
        ] {
            for object in rendered(template) {
                harness.apply(object).await;
            }
        }
        harness.class("gold", &[NetworkField::MacAddress]).await;
        harness
    }

    async fn apply(&self, object: Value) {
        let types: TypeMeta = serde_json::from_value(object.clone()).unwrap();
        let gvk = GroupVersionKind::try_from(&types).unwrap();
        let (resource, _) = pinned_kind(&self.admin, &gvk).await.unwrap();
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        let api: Api<DynamicObject> = match object.namespace() {
            Some(namespace) => Api::namespaced_with(self.admin.clone(), &namespace, &resource),
            None => Api::all_with(self.admin.clone(), &resource),
        };
        let params = PatchParams::apply("test").force();
        api.patch(&object.name_any(), &params, &Patch::Apply(&object))
            .await
            .unwrap();
    }

    /// With the guest cluster `blue`, its VM `a`, and the controller at work.
    pub async fn running() -> Self {
        let mut harness = Self::new().await;
        harness.guest("blue", CLAIMS).await;
        harness.start().await;
        harness.guest_ready("blue").await;
        harness
    }

    /// Starts one more controller; what it writes goes through the gate.
    pub async fn start(&mut self) -> Gate {
        let gate = Gate::default();
        let client = self.controllers_client(&gate).await;
        self.start_through(client);
        gate
    }

    /// A client with the controller's rights, and none to its name.
    pub async fn controllers_client(&self, gate: &Gate) -> Client {
        gate.client(self.server.client_for(CONTROLLER, &[]).await.unwrap())
    }

    pub fn start_through(&mut self, client: Client) {
        let stop = CancellationToken::new();
        let token = stop.clone();
        let task = tokio::spawn(async move { controller(client, token).await.unwrap() });
        self.running.push((stop, task));
    }

    /// Ends the controller that was started last, as SIGKILL would.
    pub async fn kill_last(&mut self) {
        let (_, task) = self.running.pop().unwrap();
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
    }

    /// Stops all controllers in order; they must come to an end.
    pub async fn halt(&mut self) {
        for (stop, task) in self.running.drain(..) {
            stop.cancel();
            tokio::time::timeout(PATIENCE, task)
                .await
                .expect("the controller ends")
                .unwrap();
        }
    }

    pub async fn end(mut self) {
        self.halt().await;
    }

    pub fn claims(&self) -> Api<VFClaim> {
        self.claims_in(CLAIMS)
    }

    pub fn claims_in(&self, namespace: &str) -> Api<VFClaim> {
        Api::namespaced(self.admin.clone(), namespace)
    }

    pub fn guests(&self) -> Api<GuestCluster> {
        Api::all(self.admin.clone())
    }

    pub fn vmis(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.admin.clone(), "vms", &vmi::api_resource())
    }

    pub async fn class(&self, name: &str, overrides: &[NetworkField]) -> VFClass {
        let spec = VFClassSpec {
            allowed_overrides: overrides.to_vec(),
            ..VFClassSpec::default()
        };
        let api: Api<VFClass> = Api::all(self.admin.clone());
        api.create(&PostParams::default(), &VFClass::new(name, spec))
            .await
            .unwrap()
    }

    pub async fn guest(&self, name: &str, namespace: &str) -> GuestCluster {
        let mut spec = GuestClusterSpec {
            claim_namespace: namespace.to_owned(),
            vm_namespace: "vms".to_owned(),
            classes: vec!["gold".to_owned(), "later".to_owned()],
            ..GuestClusterSpec::default()
        };
        spec.vm_selector.match_labels = Some([("guest".to_owned(), name.to_owned())].into());
        let api = self.guests();
        api.create(&PostParams::default(), &GuestCluster::new(name, spec))
            .await
            .unwrap()
    }

    pub async fn guest_ready(&self, name: &str) {
        self.guest_says(name, "Ready").await;
    }

    pub async fn guest_says(&self, name: &str, reason: &str) -> GuestCluster {
        let api = self.guests();
        eventually(&format!("GuestCluster {name} says {reason}"), || async {
            let guest = api.get(name).await.unwrap();
            let conditions = guest.status.clone().unwrap_or_default().conditions;
            let found = condition(&conditions, "Ready").is_some_and(|c| c.reason == reason);
            found.then_some(guest).ok_or(format!("{conditions:?}"))
        })
        .await
    }

    /// Waits until the controller's cache has the guest as it is now.
    pub async fn guest_observed(&self, name: &str) {
        let api = self.guests();
        eventually(&format!("GuestCluster {name} is observed"), || async {
            let guest = api.get(name).await.unwrap();
            let conditions = guest.status.clone().unwrap_or_default().conditions;
            let seen = condition(&conditions, "Ready").and_then(|c| c.observed_generation);
            let now = guest.metadata.generation;
            (seen == now)
                .then_some(())
                .ok_or(format!("{seen:?} of {now:?}"))
        })
        .await;
    }

    /// A VMI of guest `blue`, see [`Self::vmi_of`].
    pub async fn vmi(&self, name: &str, uuid: &str) -> DynamicObject {
        self.vmi_of("blue", name, uuid).await
    }

    /// A VMI as virt-controller writes it, running on `host1`.
    pub async fn vmi_of(&self, guest: &str, name: &str, uuid: &str) -> DynamicObject {
        let object = serde_json::from_value(json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
            "metadata": {"name": name, "labels": {"guest": guest}},
            "spec": {"domain": {"firmware": {"uuid": uuid}, "devices": {}}},
            "status": {
                "phase": "Running", "nodeName": "host1", "activePods": {"pod-1": "host1"},
                "interfaces": [{"name": "default", "ipAddress": "10.0.0.5"}],
            },
        }))
        .unwrap();
        self.vmis()
            .create(&PostParams::default(), &object)
            .await
            .unwrap()
    }

    pub async fn patch_vmi(&self, name: &str, patch: Value) {
        let params = PatchParams::default();
        self.vmis()
            .patch(name, &params, &Patch::Merge(patch))
            .await
            .unwrap();
    }

    pub async fn create(&self, claim: &VFClaim) -> VFClaim {
        let namespace = claim.namespace().unwrap();
        let api = self.claims_in(&namespace);
        api.create(&PostParams::default(), claim).await.unwrap()
    }

    /// Deletes a claim as its guest does, and does not wait.
    pub async fn delete(&self, name: &str) {
        let deleted = self.claims().delete(name, &DeleteParams::default()).await;
        deleted.unwrap();
    }

    /// Waits until the claim's condition has this reason.
    pub async fn says(&self, claim: &VFClaim, type_: &str, reason: &str) -> VFClaim {
        let api = self.claims_in(&claim.namespace().unwrap());
        let name = claim.name_any();
        eventually(&format!("{name}: {type_} is {reason}"), || async {
            let claim = api.get(&name).await.unwrap();
            let conditions = claim.status.clone().unwrap_or_default().conditions;
            let found = condition(&conditions, type_).is_some_and(|c| c.reason == reason);
            found.then_some(claim).ok_or(format!("{conditions:?}"))
        })
        .await
    }

    /// Waits until nothing is left of the claim.
    pub async fn gone(&self, claim: &VFClaim) {
        let api = self.claims_in(&claim.namespace().unwrap());
        let name = claim.name_any();
        eventually(&format!("{name} is gone"), || async {
            match api.get_opt(&name).await.unwrap() {
                None => Ok(()),
                Some(claim) => Err(format!("{:?}", claim.metadata)),
            }
        })
        .await;
    }

    /// Waits for a Warning event about the claim.
    pub async fn warned(&self, claim: &VFClaim, reason: &str) {
        let api: Api<Event> = Api::namespaced(self.admin.clone(), &claim.namespace().unwrap());
        eventually(&format!("event {reason}"), || async {
            let all = api.list(&ListParams::default()).await.unwrap();
            let found = all.items.iter().any(|e| {
                let regards = e.regarding.as_ref().and_then(|r| r.uid.clone());
                regards == claim.uid()
                    && e.reason.as_deref() == Some(reason)
                    && e.type_.as_deref() == Some("Warning")
                    && e.note.as_deref().is_some_and(|n| !n.is_empty())
            });
            found
                .then_some(())
                .ok_or(format!("{} events", all.items.len()))
        })
        .await;
    }
}

/// The controller itself.
pub async fn controller(client: Client, stop: CancellationToken) -> Result<(), ControllerError> {
    let settings = Settings {
        guest_cluster_role: "hp-guest".to_owned(),
        workers: 8,
        timeout: Duration::from_secs(15),
        retry_start: Duration::from_millis(200),
        retry_max: Duration::from_secs(5),
        instance: Some("test".to_owned()),
    };
    let check = Health::default().check("controller", "starting");
    run(client, settings, &metrics(), check, stop).await
}

/// A host copy of the claim with UID `uid` in guest cluster `blue`.
pub fn claim(uid: &str) -> VFClaim {
    let guest = GuestRef {
        cluster: "blue".into(),
        cluster_uid: "kube-system-of-blue".into(),
        namespace: "default".into(),
        name: "mine".into(),
        uid: uid.into(),
        node_name: "worker".into(),
        system_uuid: UUID.into(),
        provider_id: None,
    };
    let spec = VFClaimSpec {
        class_name: Some("gold".into()),
        guest: Some(guest),
        vm_ip: Some("10.0.0.5".into()),
        ..VFClaimSpec::default()
    };
    let mut claim = VFClaim::new(&host_claim_name(uid), spec);
    claim.metadata.namespace = Some(CLAIMS.to_owned());
    claim
}

/// Tries until `probe` gives a value; its last complaint is the failure.
pub async fn eventually<F, Fut, T>(what: &str, mut probe: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, String>>,
{
    let begun = Instant::now();
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(last) => assert!(begun.elapsed() < PATIENCE, "never: {what}: {last}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

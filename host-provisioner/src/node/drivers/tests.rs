//! What is due for modules, and doing it: a real API server, modules that remember.

use std::collections::BTreeSet;

use common::api::{HostDriverSpec, SriovNodeSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, DynamicObject, PostParams};
use kube::runtime::wait::await_condition;
use kube::runtime::wait::conditions::is_crd_established;
use proptest::prelude::*;
use tokio_util::sync::DropGuard;

use super::*;
use crate::kernel::modules::fake::FakeModules;
use crate::node::test_stage::{NODE, Stage};

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

fn wish(name: &str, module: &str, parameters: &[(&str, &str)]) -> HostDriver {
    let spec = HostDriverSpec {
        module: module.into(),
        parameters: map(parameters),
        ..HostDriverSpec::default()
    };
    HostDriver::new(name, spec)
}

fn wanted(parameters: &[(&str, &str)]) -> Wanted {
    plan::wanted([&wish("d", "igb", parameters)], &[], &BTreeMap::new()).remove(0)
}

fn live(parameters: &[(&str, &str)], users: &[&str]) -> ModuleFacts {
    ModuleFacts {
        state: ModuleState::Live,
        parameters: map(parameters),
        users: users.iter().map(|&user| user.to_owned()).collect(),
        ..ModuleFacts::default()
    }
}

fn loaded(given: &[(&str, &str)], shown: &[(&str, &str)]) -> Loaded {
    Loaded {
        given: map(given),
        shown: map(shown),
    }
}

fn word(due: Due) -> Word {
    match due {
        Due::Nothing(word) => word,
        other => panic!("{other:?} is due"),
    }
}

#[test]
fn modules_are_loaded_in_order_and_each_has_one_owner() {
    let at = |driver: HostDriver, second: i64, order: i32| {
        let mut driver = driver;
        let when = Timestamp::from_second(second).unwrap();
        driver.metadata.creation_timestamp = Some(Time(when));
        driver.spec.order = order;
        driver
    };
    let mut elsewhere = at(wish("elsewhere", "ice", &[]), 1, 0);
    elsewhere.spec.node_selector = map(&[("zone", "b")]);
    let mut going = at(wish("going", "qat", &[]), 1, 0);
    going.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    let all = [
        at(wish("late", "vfio-pci", &[]), 9, -5),
        at(wish("b", "igb", &[]), 2, 0),
        at(wish("a", "mlx5_core", &[]), 3, 0),
        at(wish("early", "vfio_pci", &[]), 1, 7),
        elsewhere,
        going,
    ];
    let found = plan::wanted(&all, &[], &map(&[("zone", "a")]));
    let names: Vec<&str> = found.iter().map(|w| w.name.as_str()).collect();
    assert_eq!(names, ["late", "a", "b", "early"]);
    assert_eq!(found[0].conflict.as_deref(), Some("early"));
    let due = plan::due(&found[0], &ModuleFacts::default(), None);
    assert_eq!(word(due).reason, reason::CONFLICT);
    assert!(found[1..].iter().all(|w| w.conflict.is_none()));
}

#[test]
fn what_the_operator_loads_on_this_node_is_left_to_it() {
    let theirs = |zone: &str| others::Theirs {
        name: "kmm/card".into(),
        module: ModuleName::new("igb"),
        selector: map(&[("zone", zone)]),
    };
    let all = [wish("d", "igb", &[("debug", "1")])];
    let labels = map(&[("zone", "a")]);
    let elsewhere = plan::wanted(&all, &[theirs("b")], &labels).remove(0);
    assert_eq!(
        plan::due(&elsewhere, &ModuleFacts::default(), None),
        Due::Load
    );
    let here = plan::wanted(&all, &[theirs("b"), theirs("a")], &labels).remove(0);
    for (facts, ready) in [
        (ModuleFacts::default(), false),
        (live(&[("debug", "0")], &[]), true),
    ] {
        let said = word(plan::due(&here, &facts, None));
        assert_eq!((said.ready, said.reason), (ready, reason::HANDED_OVER));
        assert!(said.message.contains("kmm/card"), "{}", said.message);
    }
}

#[test]
fn what_is_there_as_asked_is_left_alone() {
    let absent = ModuleFacts::default();
    assert_eq!(plan::due(&wanted(&[]), &absent, None), Due::Load);
    let used = live(&[("debug", "16"), ("on", "Y"), ("list", "1,2")], &["x"]);
    let same = wanted(&[("debug", "0x10"), ("on", "1"), ("list", "1,2")]);
    let said = word(plan::due(&same, &used, None));
    assert_eq!((said.ready, said.reason), (true, reason::LOADED));
}

#[test]
fn other_parameters_are_given_only_when_nothing_uses_the_module() {
    let other = wanted(&[("debug", "1")]);
    let idle = live(&[("debug", "0")], &[]);
    assert_eq!(plan::due(&other, &idle, None), Due::Reload);
    let used = live(&[("debug", "0")], &["0000:01:00.0 (it has 7 VFs)"]);
    let said = word(plan::due(&other, &used, None));
    assert_eq!((said.ready, said.reason), (false, reason::MODULE_IN_USE));
    for part in ["debug is 0, wanted 1", "0000:01:00.0 (it has 7 VFs)"] {
        assert!(said.message.contains(part), "{}", said.message);
    }
}

#[test]
fn hidden_parameters_are_known_from_what_was_loaded() {
    let hidden = wanted(&[("max_vfs", "7")]);
    let facts = live(&[("debug", "0")], &[]);
    assert_eq!(
        plan::due(&hidden, &facts, None),
        Due::Reload,
        "nobody knows"
    );
    let ours = loaded(&[("max_vfs", "7")], &[("debug", "0")]);
    assert!(word(plan::due(&hidden, &facts, Some(&ours))).ready);
    // Somebody has loaded it anew since.
    let facts = live(&[("debug", "3")], &[]);
    assert_eq!(plan::due(&hidden, &facts, Some(&ours)), Due::Reload);
}

#[test]
fn a_parameter_that_is_asked_for_no_more_is_taken_back() {
    let facts = live(&[("debug", "3")], &[]);
    let ours = loaded(&[("debug", "3")], &[("debug", "3")]);
    assert_eq!(plan::due(&wanted(&[]), &facts, Some(&ours)), Due::Reload);
    // The host gave it, and nobody asked us for anything.
    assert!(word(plan::due(&wanted(&[]), &facts, None)).ready);
}

#[test]
fn what_a_module_makes_of_its_parameters_is_no_reason_to_load_it_for_ever() {
    let wanted = wanted(&[("depth", "5000")]);
    let ours = loaded(&[("depth", "5000")], &[("depth", "4095")]);
    let said = word(plan::due(
        &wanted,
        &live(&[("depth", "4095")], &[]),
        Some(&ours),
    ));
    assert!(said.ready);
    assert!(
        said.message.contains("given depth=5000 and shows 4095"),
        "{}",
        said.message
    );
}

#[test]
fn a_built_in_module_is_ready_unless_it_needs_parameters() {
    let facts = ModuleFacts {
        state: ModuleState::BuiltIn,
        ..live(&[("debug", "0")], &[])
    };
    assert!(word(plan::due(&wanted(&[("debug", "0")]), &facts, None)).ready);
    let said = word(plan::due(&wanted(&[("debug", "1")]), &facts, None));
    assert_eq!((said.ready, said.reason), (false, reason::BUILT_IN));
    assert!(said.message.contains("command line"), "{}", said.message);
}

#[test]
fn a_parameter_that_the_module_has_not_is_refused_before_it_is_loaded() {
    let known: BTreeSet<String> = ["debug".to_owned()].into();
    assert_eq!(plan::unknown(&wanted(&[("debug", "1")]), &known), None);
    let said = plan::unknown(&wanted(&[("debgu", "1")]), &known).unwrap();
    assert_eq!(said.reason, reason::PARAMETER_UNKNOWN);
    for part in ["no parameter debgu", "it has debug"] {
        assert!(said.message.contains(part), "{}", said.message);
    }
}

#[test]
fn kmods_words_become_reasons() {
    let say = |words: &str| {
        let error = KmodError::Failed {
            program: "modprobe",
            words: words.to_owned(),
        };
        plan::failure(&wanted(&[]), &error, "6.12.1", Some("integrity"))
    };
    // Words of kmod 34.
    let said = say("modprobe: FATAL: Module igb not found in directory /lib/modules/6.12.1");
    assert_eq!(said.reason, reason::MODULE_NOT_FOUND);
    assert!(said.message.contains("kernel 6.12.1"), "{}", said.message);
    let said = say("modprobe: ERROR: could not insert 'igb': Key was rejected by service");
    assert_eq!(said.reason, reason::MODULE_REFUSED);
    assert!(
        said.message.contains("lockdown: integrity"),
        "{}",
        said.message
    );
    let said = say("modprobe: ERROR: could not insert 'igb': Exec format error");
    assert_eq!(said.reason, reason::LOAD_FAILED);
    assert!(
        said.message.contains("Exec format error"),
        "{}",
        said.message
    );
    let stuck = crate::kernel::Stuck { pid: 7 };
    let error = KmodError::Stuck {
        program: "modprobe",
        stuck,
    };
    let said = plan::failure(&wanted(&[]), &error, "6", None);
    assert_eq!(said.reason, reason::BROKEN);
    assert!(said.message.contains("process 7"), "{}", said.message);
}

proptest! {
    /// A module in use is never unloaded, whatever is wanted and known of it.
    #[test]
    fn what_is_in_use_is_never_due_to_be_unloaded(
        want in proptest::collection::btree_map("[ab]", "[0-2YN]", 0..3),
        have in proptest::collection::btree_map("[ab]", "[0-2YN]", 0..3),
        given in proptest::option::of(proptest::collection::btree_map("[ab]", "[0-2YN]", 0..3)),
        used in any::<bool>(),
    ) {
        let mut wanted = wanted(&[]);
        wanted.parameters = want;
        let users = used.then(|| "somebody".to_owned()).into_iter().collect();
        let facts = ModuleFacts { users, parameters: have.clone(), ..live(&[], &[]) };
        let ours = given.map(|given| Loaded { given, shown: have });
        let due = plan::due(&wanted, &facts, ours.as_ref());
        prop_assert!(due != Due::Load, "it is loaded");
        prop_assert!(!(used && due == Due::Reload));
        if due == Due::Reload {
            // Once loaded with what is wanted there is nothing more to do.
            let after = Loaded { given: wanted.parameters.clone(), shown: facts.parameters.clone() };
            prop_assert!(word(plan::due(&wanted, &facts, Some(&after))).ready);
        }
    }
}

struct World {
    stage: Stage,
    modules: FakeModules,
    wishes: Api<HostDriver>,
    nodes: Api<SriovNode>,
    drivers: Drivers,
    _folder: tempfile::TempDir,
    _stop: DropGuard,
}

impl World {
    async fn new() -> Self {
        let stage = Stage::new().await;
        let client = stage.agent.client.clone();
        let node: Node = serde_json::from_value(json!({"metadata": {"name": NODE}})).unwrap();
        let api: Api<Node> = Api::all(client.clone());
        api.create(&PostParams::default(), &node).await.unwrap();
        let nodes: Api<SriovNode> = Api::all(client.clone());
        let node = SriovNode::new(NODE, SriovNodeSpec {});
        nodes.create(&PostParams::default(), &node).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let modules = FakeModules::default();
        let stop = CancellationToken::new();
        let drivers = Drivers::new(
            Arc::clone(&stage.agent),
            Arc::new(modules.clone()),
            folder.path().join("modules.json"),
            stop.clone(),
        );
        drivers.wishes.wait_until_ready().await.unwrap();
        Self {
            stage,
            modules,
            wishes: Api::all(client),
            nodes,
            drivers,
            _folder: folder,
            _stop: stop.drop_guard(),
        }
    }

    /// Waits until the cache has the change that `write` made, then passes once.
    async fn pass_after<T>(&mut self, write: impl Future<Output = kube::Result<T>>) {
        self.drivers.changed.mark_unchanged();
        write.await.unwrap();
        let told = self.drivers.changed.changed();
        tokio::time::timeout(Duration::from_secs(30), told)
            .await
            .expect("the change is told")
            .unwrap();
        self.drivers.pass().await.unwrap();
    }

    async fn lines(&self) -> Vec<(String, bool, String)> {
        let status = self.nodes.get(NODE).await.unwrap().status;
        let lines = status.unwrap_or_default().drivers.into_iter();
        lines.map(|l| (l.name, l.ready, l.reason)).collect()
    }
}

fn line(name: &str, ready: bool, reason: &str) -> (String, bool, String) {
    (name.into(), ready, reason.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_is_loaded_once_reloaded_when_idle_and_kept_when_its_wish_goes() {
    let mut world = World::new().await;
    let (wishes, modules) = (world.wishes.clone(), world.modules.clone());
    modules.file("nvme", &[("io_queue_depth", "1024")]);
    let post = PostParams::default();
    let new = wish("storage", "nvme", &[]);
    world.pass_after(wishes.create(&post, &new)).await;
    world.drivers.pass().await.unwrap();
    assert_eq!(modules.done(), ["load nvme"]);
    assert_eq!(world.lines().await, [line("storage", true, "Loaded")]);

    // Another parameter while it is idle, and while it is in use.
    let with = |depth: &str| {
        let patch = json!({"spec": {"parameters": {"io_queue_depth": depth}}});
        let wishes = wishes.clone();
        async move {
            let params = PatchParams::default();
            wishes.patch("storage", &params, &Patch::Merge(patch)).await
        }
    };
    world.pass_after(with("64")).await;
    let reloaded = ["load nvme", "unload nvme", "load nvme io_queue_depth=64"];
    assert_eq!(modules.done(), reloaded);
    assert_eq!(world.lines().await, [line("storage", true, "Loaded")]);
    modules.give("nvme", live(&[("io_queue_depth", "64")], &["a disk"]));
    world.pass_after(with("128")).await;
    assert_eq!(modules.done(), reloaded, "it is in use");
    assert_eq!(world.lines().await, [line("storage", false, "ModuleInUse")]);

    // A module in use outlives its wish.
    world.pass_after(with("64")).await;
    let delete = DeleteParams::default();
    world.pass_after(wishes.delete("storage", &delete)).await;
    assert_eq!(modules.done(), reloaded);
    assert_eq!(world.lines().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_cannot_be_loaded_keeps_no_other_and_is_not_tried_at_every_look() {
    let mut world = World::new().await;
    let (wishes, modules) = (world.wishes.clone(), world.modules.clone());
    modules.file("igb", &[]);
    modules.refuse(
        "igb",
        Some("could not insert 'igb': Key was rejected by service"),
    );
    modules.file("ice", &[("debug", "0")]);
    let post = PostParams::default();
    for (name, module) in [("a", "igb"), ("b", "absent")] {
        world
            .pass_after(wishes.create(&post, &wish(name, module, &[])))
            .await;
    }
    let strange = wish("c", "ice", &[("debgu", "1")]);
    world.pass_after(wishes.create(&post, &strange)).await;
    world
        .pass_after(wishes.create(&post, &wish("d", "ice-sw", &[])))
        .await;
    modules.file("ice_sw", &[]);
    let said = [
        line("a", false, "ModuleRefused"),
        line("b", false, "ModuleNotFound"),
        line("c", false, "ParameterUnknown"),
        line("d", false, "ModuleNotFound"),
    ];
    assert_eq!(world.lines().await, said);
    assert_eq!(modules.done(), [""; 0]);
    // The same wish is not tried again at once; a changed one is.
    modules.refuse("igb", None);
    world.drivers.pass().await.unwrap();
    assert_eq!(modules.done(), [""; 0]);
    let change = Patch::Merge(json!({"spec": {"order": 1}}));
    let params = PatchParams::default();
    world.pass_after(wishes.patch("a", &params, &change)).await;
    assert_eq!(modules.done(), ["load igb"]);
    assert_eq!(world.lines().await[3], line("a", true, "Loaded"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_an_operator_has_is_not_touched() {
    let mut world = World::new().await;
    let (wishes, modules) = (world.wishes.clone(), world.modules.clone());
    modules.file("igb", &[]);
    let client = world.stage.agent.client.clone();
    let crd: CustomResourceDefinition = serde_json::from_value(json!({
        "metadata": {"name": "modules.kmm.sigs.x-k8s.io"},
        "spec": {
            "group": "kmm.sigs.x-k8s.io",
            "names": {"kind": "Module", "plural": "modules", "singular": "module"},
            "scope": "Namespaced",
            "versions": [{"name": "v1beta1", "served": true, "storage": true, "schema": {
                "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            }}],
        },
    }))
    .unwrap();
    let post = PostParams::default();
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    crds.create(&post, &crd).await.unwrap();
    let established = await_condition(crds, "modules.kmm.sigs.x-k8s.io", is_crd_established());
    established.await.unwrap();
    let api: Api<DynamicObject> = Api::default_namespaced_with(client, &others::kind());
    let mut theirs = DynamicObject::new("card", &others::kind());
    theirs.data =
        json!({"spec": {"moduleLoader": {"container": {"modprobe": {"moduleName": "igb"}}}}});
    api.create(&post, &theirs).await.unwrap();

    world
        .pass_after(wishes.create(&post, &wish("a", "igb", &[])))
        .await;
    assert_eq!(world.lines().await, [line("a", false, "HandedOver")]);
    assert_eq!(modules.done(), [""; 0]);
    // Its operator goes: now it is ours to load.
    api.delete("card", &DeleteParams::default()).await.unwrap();
    world.drivers.pass().await.unwrap();
    assert_eq!(world.lines().await, [line("a", true, "Loaded")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn kmods_content_is_not_taken_for_a_loaded_module() {
    let mut world = World::new().await;
    let (wishes, modules) = (world.wishes.clone(), world.modules.clone());
    modules.build_in("vfio");
    modules.replace_by_nothing("igb");
    let post = PostParams::default();
    for (name, module) in [("a", "vfio"), ("b", "igb")] {
        let new = wish(name, module, &[]);
        world.pass_after(wishes.create(&post, &new)).await;
    }
    let said = [line("a", true, "BuiltIn"), line("b", false, "LoadFailed")];
    assert_eq!(world.lines().await, said);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_is_not_unloaded_while_vfs_are_made_on_its_card() {
    let mut world = World::new().await;
    let (wishes, modules) = (world.wishes.clone(), world.modules.clone());
    modules.file("igb", &[("debug", "0")]);
    let mut facts = live(&[("debug", "0")], &[]);
    facts.functions.insert(world.stage.pf.address);
    modules.give("igb", facts.clone());
    let name = inventory::physical_function_name(NODE, &world.stage.pf.identity);
    let turn = world.stage.agent.pf_turns.take(&name).await;
    world.drivers.changed.mark_unchanged();
    let new = wish("card", "igb", &[("debug", "1")]);
    wishes.create(&PostParams::default(), &new).await.unwrap();
    world.drivers.changed.changed().await.unwrap();
    let pass = world.drivers.pass();
    let maker = async {
        // Whoever has the turn makes VFs, and lets go.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(modules.done(), [""; 0]);
        facts.users.push("0000:01:00.0 (it has 7 VFs)".into());
        modules.give("igb", facts);
        drop(turn);
    };
    let (passed, ()) = tokio::join!(pass, maker);
    passed.unwrap();
    assert_eq!(modules.done(), [""; 0]);
    assert_eq!(world.lines().await, [line("card", false, "ModuleInUse")]);
}

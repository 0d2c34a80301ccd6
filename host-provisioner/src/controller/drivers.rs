//! Counts what the node agents say of each `HostDriver`. The counts are a report: they can be
//! made from nothing at any time.

use std::time::Duration;

use common::api::{
    ConditionStatus, HostDriver, NewCondition, NodeCounts, SriovNode, reason, type_,
};
use common::kube::status::{Report, report};
use common::kube::{is_conflict, is_gone};
use kube::runtime::reflector::{self, Store};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Map, json};

use super::MANAGER;
use super::caches::{Guarded, feed, readable, watch};

/// Changes within this time are one look: a fleet of agents starts at once.
const DEBOUNCE: Duration = Duration::from_secs(1);
/// What could not be written is written again after this time.
const AGAIN: Duration = Duration::from_secs(10);
/// How many of the nodes that have it not are named.
const NAMED: usize = 5;

/// What is said of a `HostDriver` whose nodes have reported.
#[must_use]
pub fn summary(driver: &HostDriver, nodes: &[&SriovNode]) -> (NodeCounts, NewCondition) {
    let mut counts = NodeCounts::default();
    let (mut behind, mut failures) = (0_u32, Vec::new());
    for node in nodes {
        let lines = node.status.iter().flat_map(|status| &status.drivers);
        for line in lines.filter(|line| line.name == driver.name_any()) {
            counts.selected += 1;
            if line.observed_generation != driver.metadata.generation {
                behind += 1;
            } else if line.ready {
                counts.loaded += 1;
            } else {
                counts.failed += 1;
                failures.push((node.name_any(), &line.reason));
            }
        }
    }
    failures.sort();
    let not = |reason: &str, message: String| {
        NewCondition::new(type_::READY, ConditionStatus::False, reason, message)
    };
    let condition = if let Some((_, first)) = failures.first() {
        let named = failures
            .iter()
            .take(NAMED)
            .map(|(node, why)| format!("{node} ({why})"));
        let more = failures.len().saturating_sub(NAMED);
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        let named: Vec<String> = named.collect();
        let message = format!(
            "{} of {} nodes have it not: {}{more}; their SriovNodes say why",
            counts.failed,
            counts.selected,
            named.join(", ")
        );
        not(first, message)
    } else if counts.selected == 0 {
        not(
            reason::PENDING,
            "no node agent has said anything of it: no node has these labels, or none runs an agent".to_owned(),
        )
    } else if behind > 0 {
        not(
            reason::PENDING,
            format!("{behind} of {} nodes are still at it", counts.selected),
        )
    } else {
        NewCondition::new(
            type_::READY,
            ConditionStatus::True,
            reason::LOADED,
            format!("{} nodes have it", counts.loaded),
        )
    };
    (counts, condition)
}

/// Keeps the counts until it is dropped.
pub(super) async fn run(client: Client) {
    let (changes, mut changed) = tokio::sync::watch::channel(());
    let (drivers, driver_writer) = reflector::store();
    let (nodes, node_writer) = reflector::store();
    let told = changes.clone();
    let on_drivers = feed("hostdrivers", watch(&client), driver_writer, move |_| {
        told.send_replace(());
    });
    let on_nodes = feed("sriovnodes", watch(&client), node_writer, move |_| {
        changes.send_replace(());
    });
    let count = async {
        if drivers.wait_until_ready().await.is_err() || nodes.wait_until_ready().await.is_err() {
            return;
        }
        loop {
            changed.mark_unchanged();
            let done = count(&client, &drivers, &nodes).await;
            if let Err(error) = &done {
                tracing::warn!(%error, "cannot report of HostDrivers");
            }
            let again = tokio::time::sleep(AGAIN);
            tokio::select! {
                Ok(()) = changed.changed() => tokio::time::sleep(DEBOUNCE).await,
                () = again, if done.is_err() => {}
                else => return,
            }
        }
    };
    // In one task: what writes ends with whoever drops this, as it is with a lost Lease.
    tokio::join!(on_drivers, on_nodes, count);
}

async fn count(
    client: &Client,
    drivers: &Store<Guarded<HostDriver>>,
    nodes: &Store<Guarded<SriovNode>>,
) -> Result<(), kube::Error> {
    let api: Api<HostDriver> = Api::all(client.clone());
    let (drivers, nodes) = (drivers.state(), nodes.state());
    let nodes = readable(&nodes);
    for driver in readable(&drivers) {
        let (counts, condition) = summary(driver, &nodes);
        let status = driver.status.clone().unwrap_or_default();
        let fields = |counts| Map::from_iter([("nodes".to_owned(), json!(counts))]);
        let says = Report {
            manager: MANAGER,
            owned: &[type_::READY],
            conditions: vec![condition],
            observed_generation: driver.metadata.generation,
            fields: fields(counts),
        };
        let before = status.conditions.clone();
        let written = report(&api, driver, &before, &fields(status.nodes), &says).await;
        match written {
            Ok(_) => {}
            // Gone, or made anew: its event is on its way.
            Err(error) if is_conflict(&error) || is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use common::api::{DriverStatus, HostDriverSpec, SriovNodeSpec, SriovNodeStatus};

    use super::*;

    fn node(name: &str, generation: i64, ready: bool, reason: &str) -> SriovNode {
        let mut node = SriovNode::new(name, SriovNodeSpec {});
        node.status = Some(SriovNodeStatus {
            drivers: vec![
                DriverStatus {
                    name: "other".into(),
                    reason: "LoadFailed".into(),
                    ..DriverStatus::default()
                },
                DriverStatus {
                    name: "igb".into(),
                    ready,
                    reason: reason.into(),
                    observed_generation: Some(generation),
                    ..DriverStatus::default()
                },
            ],
            ..SriovNodeStatus::default()
        });
        node
    }

    fn said(nodes: &[SriovNode]) -> (NodeCounts, NewCondition) {
        let mut driver = HostDriver::new("igb", HostDriverSpec::default());
        driver.metadata.generation = Some(2);
        summary(&driver, &nodes.iter().collect::<Vec<_>>())
    }

    #[test]
    fn nodes_that_have_it_are_counted() {
        let (counts, condition) =
            said(&[node("a", 2, true, "Loaded"), node("b", 2, true, "BuiltIn")]);
        assert_eq!((counts.selected, counts.loaded, counts.failed), (2, 2, 0));
        assert_eq!(condition.status, ConditionStatus::True);
    }

    #[test]
    fn nodes_that_have_it_not_are_named_with_why() {
        let nodes: Vec<SriovNode> = (0..7)
            .map(|i| node(&format!("n{i}"), 2, i == 0, "ModuleNotFound"))
            .collect();
        let (counts, condition) = said(&nodes);
        assert_eq!((counts.selected, counts.loaded, counts.failed), (7, 1, 6));
        assert_eq!(
            (condition.status, condition.reason.as_str()),
            (ConditionStatus::False, "ModuleNotFound")
        );
        assert!(
            condition.message.contains("n1 (ModuleNotFound)"),
            "{}",
            condition.message
        );
        assert!(
            condition.message.contains("and 1 more"),
            "{}",
            condition.message
        );
    }

    #[test]
    fn what_is_about_an_earlier_spec_is_no_answer() {
        let (counts, condition) =
            said(&[node("a", 2, true, "Loaded"), node("b", 1, true, "Loaded")]);
        assert_eq!((counts.selected, counts.loaded, counts.failed), (2, 1, 0));
        assert_eq!(condition.reason, "Pending");
        assert!(
            condition.message.contains("1 of 2"),
            "{}",
            condition.message
        );
    }

    #[test]
    fn a_wish_for_no_node_says_so() {
        let (counts, condition) = said(&[]);
        assert_eq!(counts, NodeCounts::default());
        assert_eq!(condition.reason, "Pending");
    }
}

//! A model of a small world, over all its histories: two claims, their copies on the host,
//! controller, guest-syncer, node agent, kernel, QEMU and its launcher's gates, with kills, lost
//! answers, deaths, strangers and claims that are made again. The decisions are those of the
//! project's own planners; see `docs/model.md`.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod agent;
mod checker;
mod cluster_facts;
mod clusters;
mod decisions;
mod facts;
mod host;
mod moments;
mod nature;
mod reclaim;
mod settle;
mod world;
mod worlds;

use std::time::Instant;

use checker::{Action, Checked};
use stateright::{Checker as _, Expectation, HasDiscoveries, Model as _};
use world::{Setting, World};

/// Checks a world over all its histories and says what was found, with the trace to it.
fn check(name: &str, setting: Setting) {
    let began = Instant::now();
    let checker = Checked::new(setting)
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!(
        "{name}: {} states, {} steps tried, depth {}, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64(),
    );
    let mut wrong = Vec::new();
    let mut missed = Vec::new();
    for property in checker.model().properties() {
        let found = checker.discovery(property.name);
        match (property.expectation, found) {
            (Expectation::Always, Some(trace)) => {
                tell(&setting, property.name, trace.into_vec());
                wrong.push(property.name);
            }
            (Expectation::Sometimes, None) => missed.push(property.name),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{name}: broken: {wrong:?}");
    assert!(missed.is_empty(), "{name}: never reached: {missed:?}");
}

/// Prints a trace: what happened, and what the agent was about where it was its step.
fn tell(setting: &Setting, broken: &str, trace: Vec<(World, Option<Action>)>) {
    println!("{broken} is broken after {} steps:", trace.len() - 1);
    for (world, action) in &trace {
        let Some(action) = action else { continue };
        match action {
            Action::AgentSteps(slot, _) | Action::AgentIsKilledWithin(slot) => {
                println!("    {action:?}: {}", agent::about(world, *slot));
            }
            Action::ControllerSteps(slot) => {
                println!("    {action:?}: {:?}", world.controllers[*slot]);
            }
            Action::SyncerSteps(slot) => println!("    {action:?}: {:?}", world.syncers[*slot]),
            _ => println!("    {action:?}"),
        }
    }
    if let Some((last, _)) = trace.last() {
        println!("  in {last:?}");
        println!("  which ends so: {}", settle::explain(setting, last));
    }
}

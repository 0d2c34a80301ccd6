//! The mirrored classes, carried out: brings the guest's `VFClass` copies in
//! line with what the host lists, when either changes and now and then.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use common::api::VFClass;
use common::kube::{is_conflict, is_gone};
use futures::{FutureExt as _, StreamExt as _};
use kube::api::{Api, DeleteParams, ListParams, PostParams, Preconditions};
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Resource as _, ResourceExt as _};
use tokio_util::sync::CancellationToken;

use super::claims::Context;
use super::classes::{ClassAction, is_other, plan};
use crate::host_link::Facts;

/// A look although nothing seems to have changed.
const RESYNC: Duration = Duration::from_secs(600);
/// The least time between two looks, and with it between two writes of one object: the host's
/// numbers of free VFs change all the time.
const PAUSE: Duration = Duration::from_secs(3);
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(10);

/// Mirrors until `stop`.
pub async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let api: Api<VFClass> = Api::all(ctx.guest.clone());
    let metadata: Api<PartialObjectMeta<VFClass>> = Api::all(ctx.guest.clone());
    let mut facts = ctx.host.facts();
    let mut touched = watcher(metadata, watcher::Config::default())
        .default_backoff()
        .touched_objects()
        .boxed();
    // Conflicts that were said already, by UID of the foreign class.
    let mut said = HashSet::new();
    loop {
        let facts_now = facts.borrow_and_update().clone();
        let wait = match mirror(&ctx, &api, &facts_now, &mut said).await {
            Ok(()) => RESYNC,
            Err(error) => {
                tracing::warn!(%error, "mirroring the classes");
                RETRY
            }
        };
        let pause = match facts_now {
            Facts::Known(_) => PAUSE,
            Facts::Missing | Facts::Unknown(_) => Duration::ZERO,
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
            changed = facts.changed() => if changed.is_err() { return },
            seen = touched.next() => {
                note(seen);
                // All that came since, our own writes among it, is one look.
                while let Some(seen @ Some(_)) = touched.next().now_or_never() {
                    note(seen);
                }
            }
        }
    }
}

fn note(seen: Option<Result<PartialObjectMeta<VFClass>, watcher::Error>>) {
    if let Some(Err(error)) = seen {
        tracing::warn!(%error, "watching this cluster's VFClasses");
    }
}

async fn mirror(
    ctx: &Context,
    api: &Api<VFClass>,
    facts: &Facts,
    said: &mut HashSet<String>,
) -> Result<(), kube::Error> {
    let listed = match facts {
        Facts::Known(found) => found.status.as_ref().map(|s| s.classes.as_slice()),
        Facts::Missing | Facts::Unknown(_) => None,
    };
    if listed.is_none() {
        return Ok(());
    }
    let present = api.list(&ListParams::default()).await?.items;
    for action in plan(&ctx.cluster, listed, &present) {
        match apply(api, &action).await {
            // Somebody was quicker: the watch brings us back.
            Err(error) if is_conflict(&error) || is_gone(&error) => {}
            done => done?,
        }
        if let ClassAction::Conflict { name } = &action {
            let foreign = present.iter().find(|c| c.name_any() == *name);
            complain(ctx, foreign, said).await;
        }
    }
    Ok(())
}

async fn apply(api: &Api<VFClass>, action: &ClassAction) -> Result<(), kube::Error> {
    let params = PostParams {
        field_manager: Some(super::MANAGER.to_owned()),
        ..PostParams::default()
    };
    match action {
        ClassAction::Create(class) => {
            let made = api.create(&params, class).await?;
            report(api, &params, made, class).await
        }
        // The uid and resourceVersion that were read are in the object.
        ClassAction::Replace(class) => {
            let written = api.replace(&class.name_any(), &params, class).await?;
            report(api, &params, written, class).await
        }
        ClassAction::Report(class) => {
            let name = class.name_any();
            api.replace_status(&name, &params, class).await.map(drop)
        }
        ClassAction::Delete { name, uid } => {
            let params = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: Some(uid.clone()),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            api.delete(name, &params).await.map(drop)
        }
        ClassAction::Conflict { .. } => Ok(()),
    }
}

/// Gives an object that was just written the status that is wanted.
async fn report(
    api: &Api<VFClass>,
    params: &PostParams,
    written: VFClass,
    wanted: &VFClass,
) -> Result<(), kube::Error> {
    if !is_other(written.status.as_ref(), wanted.status.as_ref()) {
        return Ok(());
    }
    let reported = VFClass {
        status: wanted.status.clone(),
        ..written
    };
    let name = reported.name_any();
    api.replace_status(&name, params, &reported).await.map(drop)
}

async fn complain(ctx: &Context, foreign: Option<&VFClass>, said: &mut HashSet<String>) {
    let Some(class) = foreign else { return };
    if !said.insert(class.uid().unwrap_or_default()) {
        return;
    }
    let note = "the host has a VFClass of this name, which cannot be shown here: this object was \
                not made by the guest-syncer and is left alone. Claims that name the class get the \
                host's; delete this object to see it";
    tracing::warn!(class = class.name_any(), note);
    ctx.events
        .warning(
            &class.object_ref(&()),
            "Mirror",
            common::api::reason::CONFLICT,
            note,
        )
        .await;
}

//! `cargo e2e test`: cargo's tests, then the scenarios on a data centre that runs already
//! or is set up for the run and taken down after it.

use anyhow::Result;
use e2e::context::{self, Ctx, DataCentre};
use e2e::docker::Docker;
use e2e::paths::Paths;
use e2e::runner::{self, Count};
use e2e::scenarios::{self, Needs, Scenario};
use e2e::{interrupt, logs, progress};

pub(crate) async fn run(paths: Paths, names: &[String], most: Needs, keep: bool) -> Result<()> {
    let wanted = scenarios::matching(names, most)?;
    let ctx = Ctx::prepare(paths)?;
    let mut count = Count::default();
    if names.is_empty() {
        count = count.and(runner::unit(&ctx.paths)?);
    }
    let was_running = Docker::find(&ctx.paths)?.is_some();
    let result = hardware(&ctx, &wanted).await;
    // What ran before stays; of its own an interrupted run leaves nothing.
    let stopped = interrupt::requested();
    if !was_running && (stopped || !keep) {
        interrupt::begin_teardown();
        if let Err(e) = context::down(&ctx) {
            progress::line(&format!("{e:#}"));
            count.failed += 1;
        }
    }
    count = count.and(result?);
    runner::summary(count, ctx.paths.run_logs());
    if count.failed > 0 {
        // The counts are the last line: nothing more is said.
        std::process::exit(1);
    }
    Ok(())
}

/// A data centre that cannot be set up counts as every scenario failed.
async fn hardware(ctx: &Ctx, wanted: &[Scenario]) -> Result<Count> {
    let needs = wanted.iter().map(|s| s.needs).max();
    let dc = match super::made_for(ctx, needs.unwrap_or(Needs::Clusters)).await {
        Ok(dc) => dc,
        Err(e) if interrupt::requested() => return Err(e),
        Err(e) => {
            println!("FAILED  setting up the data centre: {e:#}");
            if let Ok(Some(dc)) = DataCentre::find(ctx.clone()).await {
                logs::collect(&dc)?;
            }
            let failed = u64::try_from(wanted.len())?.max(1);
            return Ok(Count { passed: 0, failed });
        }
    };
    let count = runner::scenarios(&dc, wanted).await?;
    if count.failed > 0 {
        progress::step("collecting logs", |_| logs::collect(&dc))?;
    }
    Ok(count)
}

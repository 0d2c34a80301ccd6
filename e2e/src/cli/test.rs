//! `cargo e2e test`: cargo's tests, then the scenarios on a data centre that runs already
//! or is set up for the run and taken down after it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::context::{self, Ctx, DataCentre};
use e2e::machine::{self, Pulse};
use e2e::paths::Paths;
use e2e::runner::{self, Count, Ran};
use e2e::scenarios::{self, Needs, Scenario};
use e2e::{interrupt, logs, progress};

/// What is to be run, and what is left after it.
pub(crate) struct Wish<'a> {
    pub names: &'a [String],
    pub most: Needs,
    /// The scenarios too that take minutes.
    pub long: bool,
    pub keep: bool,
}

pub(crate) async fn run(paths: Paths, wish: Wish<'_>) -> Result<()> {
    let Wish {
        names,
        most,
        long,
        keep,
    } = wish;
    let wanted = scenarios::matching(names, most, long)?;
    let left_out = scenarios::matching(names, most, true)?.len() - wanted.len();
    if left_out > 0 {
        progress::line(&format!(
            "{left_out} scenarios that take minutes are left out: --long runs them too"
        ));
    }
    let ctx = Ctx::prepare(paths)?;
    let mut count = Count::default();
    if names.is_empty() {
        count = count.and(runner::unit(&ctx.paths)?);
    }
    let was_running = context::runs(&ctx)?;
    let (bare, wanted): (Vec<_>, Vec<_>) = wanted
        .into_iter()
        .partition(|s| s.needs == Needs::BareMachines);
    ensure!(
        bare.is_empty() || !was_running,
        "{} needs a boot of its own: end the data centre that runs (cargo e2e down), or name other scenarios",
        bare.first().map_or("", |s| s.name)
    );
    let result = both(&ctx, &wanted, &bare).await;
    // One that lacks what other scenarios need is not kept.
    let keep = keep && bare.is_empty();
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

/// Runs the scenarios, then those that need a boot of their own.
async fn both(ctx: &Ctx, wanted: &[Scenario], bare: &[Scenario]) -> Result<Count> {
    let mut count = Count::default();
    if !wanted.is_empty() {
        count = hardware(ctx, wanted).await?;
    }
    if !bare.is_empty() {
        if context::runs(ctx)? {
            context::down(ctx)?;
        }
        count = count.and(hardware(&ctx.bare(), bare).await?);
    }
    Ok(count)
}

/// How often a run sets its machines up anew after the emulator lost them.
const ANEW: u32 = 8;
/// How long after its begin it still does so: the rest must fit into the time that a check of
/// a change has.
const ANEW_WITHIN: Duration = Duration::from_secs(45 * 60);

/// Runs the scenarios. One that met the loss of an emulated machine runs again on new ones,
/// and the run says so; with no try left it has failed, and those after it too.
async fn hardware(ctx: &Ctx, wanted: &[Scenario]) -> Result<Count> {
    let mut count = Count::default();
    let mut rest = wanted;
    let begun = Instant::now();
    for left in (0..=ANEW).rev() {
        let (ran, dc) = match set_up(ctx, rest).await {
            Ok((dc, pulse)) => (
                runner::scenarios(&dc, rest, pulse.as_ref()).await?,
                Some(dc),
            ),
            Err(e) if interrupt::requested() => return Err(e),
            Err(e) => {
                let seen = format!("setting up the data centre: {e:#}");
                println!("LOST    {seen}");
                let lost = Some((0, seen));
                let count = Count::default();
                // For the logs of what there is; that there is nothing is no error here.
                let dc = DataCentre::find(ctx.clone()).await.unwrap_or_default();
                (Ran { count, lost }, dc)
            }
        };
        count = count.and(ran.count);
        let went_wrong = ran.count.failed > 0 || ran.lost.is_some();
        if let Some(dc) = dc.as_ref().filter(|_| went_wrong) {
            progress::step("collecting logs", |_| logs::collect(dc))?;
        }
        let Some((at, seen)) = ran.lost else {
            return Ok(count);
        };
        rest = rest.get(at..).unwrap_or_default();
        if begun.elapsed() > ANEW_WITHIN {
            break;
        }
        if left > 0 {
            println!("AGAIN   from here, with what was lost set up anew: {seen}");
            let vm_alone = match &dc {
                Some(dc) => machine::give_up_vm(dc).await.is_ok(),
                None => false,
            };
            if !vm_alone {
                context::down(ctx)?;
            }
        }
    }
    for s in rest {
        println!("FAILED  {}: the machines were lost too often", s.name);
    }
    count.failed += u64::try_from(rest.len())?.max(1);
    Ok(count)
}

/// As much of the data centre as `wanted` needs, and the pulse of its machines.
async fn set_up(ctx: &Ctx, wanted: &[Scenario]) -> Result<(DataCentre, Option<Pulse>)> {
    let needs = wanted.iter().map(|s| s.needs).max();
    let needs = needs.unwrap_or(Needs::Clusters);
    let dc = super::made_for(ctx, needs).await?;
    let pulse = match needs {
        Needs::Machines | Needs::BareMachines => Some(Pulse::take(&dc).await?),
        Needs::Clusters => None,
    };
    Ok((dc, pulse))
}

//! `cargo e2e demo`: the story on a data centre that runs already or is set up for it and
//! taken down after it, unless it is to be kept.

use anyhow::Result;
use e2e::context::{self, Ctx};
use e2e::paths::Paths;
use e2e::{demo, interrupt, progress};

pub(crate) async fn run(paths: Paths, keep: bool) -> Result<()> {
    let ctx = Ctx::prepare(paths)?;
    let was_running = context::runs(&ctx)?;
    let told = story(&ctx, keep).await;
    if !(was_running || keep && told.is_ok()) {
        interrupt::begin_teardown();
        if let Err(e) = context::down(&ctx) {
            progress::line(&format!("{e:#}"));
            return told.and(Err(e));
        }
    }
    told
}

async fn story(ctx: &Ctx, keep: bool) -> Result<()> {
    let dc = super::made(ctx).await?;
    tokio::select! {
        r = demo::run(&dc) => r?,
        stop = interrupt::wait() => return Err(stop.into()),
    }
    if keep {
        super::print_access(&dc);
    }
    Ok(())
}

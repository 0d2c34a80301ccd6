//! `cargo e2e demo`: one claim from its creation to the first ping over its VF and back
//! to the pool, told as it happens and summed up in a table at the end.
//!
//! Each moment is taken where it happens: API objects by watching them, L1's kernel by its
//! write trace, QEMU by what it opens, the guest by its own kernel. The machines' clocks
//! are set against this one's first; a moment is as exact as that was.

mod story;
mod timeline;

use anyhow::{Context, Result};

use crate::context::DataCentre;
use crate::scenarios::support::Lab;
use timeline::Timeline;

/// Tells the story on a running data centre; leaves no claim behind.
pub async fn run(dc: &DataCentre) -> Result<()> {
    let lab = Lab::open(dc).await.context("looking at the data centre")?;
    lab.tidy().await?;
    let timeline = Timeline::default();
    let told = story::tell(&lab, &timeline).await;
    let tidied = lab.tidy().await;
    told?;
    tidied.context("tidying up after the story")?;
    println!("\n{}", timeline.table());
    Ok(())
}

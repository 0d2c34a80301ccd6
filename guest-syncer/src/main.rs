//! The guest-syncer's process; everything is in the library.

use clap::Parser as _;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    guest_syncer::program::run(guest_syncer::args::Args::parse()).await
}

//! Entry point of `cargo e2e`.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}

//! Writes the CRDs of the chart `vf-crds` from the Rust types.
//!
//! `cargo run -p common --bin crdgen` prints nothing and writes
//! `manifests/vf-crds/templates/<plural>.yaml`; a test holds the files against
//! the types.

use std::process::ExitCode;

fn main() -> ExitCode {
    let chart = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/vf-crds");
    match common::crdgen::write(&chart.join("templates")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crdgen: {error}");
            ExitCode::FAILURE
        }
    }
}

//! The program that is released has no points at which it could be stopped.
#![cfg(not(feature = "crash-points"))]

use std::path::Path;

fn contains(program: &[u8], text: &str) -> bool {
    program.windows(text.len()).any(|w| w == text.as_bytes())
}

#[test]
fn a_program_built_without_the_feature_has_no_points() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_host-provisioner")).unwrap();
    // What is compiled in can be found, so what is not found is not compiled in.
    assert!(contains(&program, "/run/vf-provisioner"));
    for text in ["/run/vf-provisioner/points", "an armed point is reached"] {
        assert!(!contains(&program, text), "{text}");
    }
}

#[test]
fn the_released_image_is_built_without_the_feature() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let image = std::fs::read_to_string(root.join("Containerfile")).unwrap();
    assert!(image.contains("cargo build"));
    assert!(!image.contains("crash-points") && !image.contains("all-features"));
    let manifest = std::fs::read_to_string(root.join("host-provisioner/Cargo.toml")).unwrap();
    assert!(!manifest.contains("default = "), "the feature is asked for");
}

#!/bin/sh
# RUSTC_WORKSPACE_WRAPPER of `cargo e2e fuzz`: compiles the workspace's own crates, and no
# dependency, with the counters that libFuzzer reads. The passes are LLVM's and the flags
# stable; opt-level makes the dev profile's slow code worth running.
exec "$@" \
    -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Cdebug-assertions=yes \
    -Coverflow-checks=yes \
    -Copt-level=1

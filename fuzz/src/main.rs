//! The fuzzers' program. Plain, it runs a target on the files it is given, as one replays what
//! a fuzzer found: `cargo run -p fuzz -- TARGET FILE...`. With the feature `libfuzzer` its
//! `main` is libFuzzer's, and `VF_FUZZ_TARGET` names the target.
#![cfg_attr(feature = "libfuzzer", no_main)]
// libFuzzer's entry points are unmangled symbols.
#![cfg_attr(feature = "libfuzzer", allow(unsafe_code, clippy::expect_used))]

#[cfg(feature = "libfuzzer")]
mod libfuzzer {
    use std::sync::LazyLock;

    use fuzz::Target;
    use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

    static TARGET: LazyLock<&Target> = LazyLock::new(|| {
        let name = std::env::var("VF_FUZZ_TARGET").unwrap_or_default();
        fuzz::find(&name).expect("VF_FUZZ_TARGET names no target")
    });

    fuzz_target!(|data: &[u8]| (TARGET.run)(data));

    fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
        if TARGET.json
            && let Some(size) = fuzz::json::mutate(data, size, max_size, seed, fuzzer_mutate)
        {
            return size;
        }
        fuzzer_mutate(data, size, max_size)
    });
}

#[cfg(not(feature = "libfuzzer"))]
fn main() -> std::process::ExitCode {
    let mut args = std::env::args().skip(1);
    let target = args.next().and_then(|name| fuzz::find(&name));
    let files: Vec<String> = args.collect();
    let Some(target) = target.filter(|_| !files.is_empty()) else {
        let names: Vec<&str> = fuzz::TARGETS.iter().map(|t| t.name).collect();
        eprintln!("give a target ({}) and files", names.join(", "));
        return std::process::ExitCode::FAILURE;
    };
    for file in files {
        match fuzz::replay(target, file.as_ref()) {
            Ok(count) => println!("{file}: {count} inputs, all well"),
            Err(e) => {
                eprintln!("{file}: {e}");
                return std::process::ExitCode::FAILURE;
            }
        }
    }
    std::process::ExitCode::SUCCESS
}

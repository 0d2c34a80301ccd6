//! A short run without counters: the kept inputs, changed at random from a fixed seed. The same
//! inputs each time, so that a finding belongs to the change that brought it.

use std::cell::RefCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use fastrand::Rng;

use crate::{Target, corpus, files, json};

/// Most bytes that an input grows by in one run.
const GROWTH: usize = 256;
/// Changes to one input, at most.
const CHANGES: usize = 6;

thread_local! {
    // libFuzzer's mutator takes no state either.
    static RANDOM: RefCell<Rng> = const { RefCell::new(Rng::with_seed(0)) };
}

/// Runs the target on so many changed inputs. One that it does not survive is written to a file
/// of the temporary folder, whose name is printed.
///
/// # Errors
/// The kept inputs cannot be read.
///
/// # Panics
/// The target's panic goes on.
pub fn run(target: &Target, inputs: usize) -> io::Result<()> {
    let kept = files(&corpus().join(target.name))?;
    let kept = kept
        .iter()
        .map(std::fs::read)
        .collect::<io::Result<Vec<_>>>()?;
    RANDOM.set(Rng::with_seed(1));
    for _ in 0..inputs {
        let (at, changes) =
            RANDOM.with_borrow_mut(|r| (r.usize(..kept.len()), r.usize(1..=CHANGES)));
        let mut input = kept.get(at).cloned().unwrap_or_default();
        for _ in 0..changes {
            input = changed(target, input);
        }
        let survived = catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
        if let Err(panic) = survived {
            let path = std::env::temp_dir().join(format!("vf-fuzz-{}", target.name));
            std::fs::write(&path, &input)?;
            eprintln!("the input is {}; keep it in the corpus", path.display());
            resume_unwind(panic);
        }
    }
    Ok(())
}

fn changed(target: &Target, input: Vec<u8>) -> Vec<u8> {
    let (size, most) = (input.len(), input.len() + GROWTH);
    let mut buffer = input;
    buffer.resize(most, 0);
    let seed = RANDOM.with_borrow_mut(|r| r.u32(..));
    let as_json = target
        .json
        .then(|| json::mutate(&mut buffer, size, most, seed, bytewise));
    let size = as_json
        .flatten()
        .unwrap_or_else(|| bytewise(&mut buffer, size, most));
    buffer.truncate(size);
    buffer
}

/// One change of bytes: set, flipped, taken out, put in, or a part of it again.
fn bytewise(data: &mut [u8], size: usize, most: usize) -> usize {
    RANDOM.with_borrow_mut(|random| {
        let mut bytes: Vec<u8> = data.iter().take(size).copied().collect();
        let at = random.usize(..=bytes.len());
        match random.u8(..6) {
            0 => bytes.insert(at, random.u8(..)),
            1 if at < bytes.len() => {
                let end = random.usize(at..bytes.len());
                bytes.drain(at..=end);
            }
            2 if at < bytes.len() => {
                let end = random.usize(at..=bytes.len());
                let part: Vec<u8> = bytes.iter().skip(at).take(end - at).copied().collect();
                bytes.splice(at..at, part);
            }
            3 => {
                // What stands for something: ends of lines, signs, bounds.
                let word = random.choice(WORDS).unwrap_or_default();
                bytes.splice(at..at, word.iter().copied());
            }
            _ => {
                let (bit, any) = (1 << random.u8(..8), random.u8(..));
                let flip = random.bool();
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = if flip { *byte ^ bit } else { any };
                }
            }
        }
        bytes.truncate(most.min(data.len()));
        for (to, from) in data.iter_mut().zip(&bytes) {
            *to = *from;
        }
        bytes.len()
    })
}

const WORDS: [&[u8]; 12] = [
    b"\0",
    b"\n",
    b"\r\n",
    b" ",
    b":",
    b"-1",
    b"0x",
    b"4294967296",
    b"\xff\xff",
    b"{",
    b"[",
    b"\"",
];

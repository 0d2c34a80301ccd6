//! One file a target. Each `run` takes any bytes; what it asserts is what the programs rely on.

pub mod controller;
pub mod filter;
pub mod kernel;
pub mod kubeconfig;
pub mod mirror;
pub mod procfs;
pub mod qmp;
pub mod values;

/// Cuts fixed pieces off an input; zeros when it has run out.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let n = self.0.len().min(N);
        let (head, rest) = self.0.split_at(n);
        for (to, from) in out.iter_mut().zip(head) {
            *to = *from;
        }
        self.0 = rest;
        out
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }
}

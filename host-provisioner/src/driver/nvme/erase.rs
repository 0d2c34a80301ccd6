//! Taking a namespace back: erased, proven to be, and only then detached.

use super::{able, amiss, list};
use crate::driver::DriverError;
use crate::kernel::nvme::{Blocks, Subsystem};

/// The proof reads in pieces of so many bytes, and at most so many of them: of a larger namespace
/// pieces at even distances, the first and the last among them.
const PIECE: u64 = 1 << 20;
const MOST: u64 = 256;

/// Erases a namespace that the controller `own` has, or nobody, and detaches it. What fails is
/// told; then it stays with `own`, so that nobody takes it for an erased one.
pub(super) fn take_back(
    of: Subsystem<'_>,
    nsid: u32,
    own: u16,
    controllers: &[u16],
    errors: &mut Vec<DriverError>,
) {
    let before = errors.len();
    // Until it is with nobody: what the host has of it is our doing.
    let _lent = of.nvme.lend(of.pf, nsid);
    match by_primary(of, nsid, own, controllers) {
        Err(error) => errors.push(error),
        Ok(primary) => {
            if let Err(error) = erase(of, nsid) {
                errors.push(error);
            }
            if let Err(error) = of.detach(nsid, primary) {
                errors.push(error.into());
            }
        }
    }
    if errors.len() > before || !controllers.contains(&own) {
        return;
    }
    if let Err(error) = of.detach(nsid, own) {
        errors.push(error.into());
    }
}

/// Sees to it that the primary controller has the namespace, and says its number.
fn by_primary(
    of: Subsystem<'_>,
    nsid: u32,
    own: u16,
    controllers: &[u16],
) -> Result<u16, DriverError> {
    let controller = of.controller()?;
    able(of, controller)?;
    let primary = controller.id;
    let others = controllers.iter().filter(|id| ![own, primary].contains(id));
    let others: Vec<u16> = others.copied().collect();
    if !others.is_empty() {
        let words = format!(
            "namespace {nsid} is attached to controller {} as well, which may be in use, so it is \
             not erased; detach it there first (nvme detach-ns)",
            list(others)
        );
        return Err(amiss(of, words));
    }
    // One that was interrupted has left it there.
    if !controllers.contains(&primary) {
        of.attach(nsid, primary)?;
    }
    Ok(primary)
}

fn erase(of: Subsystem<'_>, nsid: u32) -> Result<(), DriverError> {
    let format = of.format_of(nsid)?;
    let disk = of.nvme.open(of.pf, nsid)?;
    of.format(nsid, format)?;
    let size = format.blocks.checked_mul(format.block_size);
    if size != Some(disk.size()) {
        let words = format!(
            "namespace {nsid} has {} bytes by its disk and {} blocks of {} by its controller, so \
             that it cannot be read whole",
            disk.size(),
            format.blocks,
            format.block_size
        );
        return Err(amiss(of, words));
    }
    match written(disk.as_ref())? {
        None => Ok(()),
        Some(at) => Err(amiss(
            of,
            format!(
                "namespace {nsid} was formatted and is not empty: from byte {at} on it reads \
                 neither as zeros nor as ones; nobody gets it until an administrator has erased \
                 it and detached it (nvme format, nvme detach-ns)"
            ),
        )),
    }
}

/// Where of the pieces that are read the first byte is that is not what an erased medium reads
/// as: all zeros, or all ones.
fn written(disk: &dyn Blocks) -> Result<Option<u64>, DriverError> {
    let mut empty = None;
    for piece in pieces(disk.size()) {
        let length = PIECE.min(disk.size() - piece);
        let read = disk.read(piece, usize::try_from(length).unwrap_or(0))?;
        let expected = *empty.get_or_insert(match read.first() {
            Some(0xff) => 0xff,
            _ => 0x00,
        });
        let other = read.iter().position(|byte| *byte != expected);
        if let Some(other) = other {
            return Ok(Some(piece + other as u64));
        }
    }
    Ok(None)
}

/// Where the pieces begin.
fn pieces(size: u64) -> impl Iterator<Item = u64> {
    let all = size.div_ceil(PIECE);
    let read = all.min(MOST);
    (0..read).map(move |n| match read {
        _ if all == read => n * PIECE,
        _ => n * (all - 1) / (read - 1) * PIECE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_one_is_read_whole_and_of_a_large_one_both_ends() {
        let of = |size| pieces(size).collect::<Vec<_>>();
        assert_eq!(of(0), [0; 0]);
        assert_eq!(of(1), [0]);
        assert_eq!(of(2 * PIECE + 512), [0, PIECE, 2 * PIECE]);
        assert_eq!(of(MOST * PIECE).len() as u64, MOST);
        let large = of(1000 * PIECE - 512);
        assert_eq!(large.len() as u64, MOST);
        assert_eq!((large[0], large[255]), (0, 999 * PIECE));
        assert!(large.windows(2).all(|two| two[0] < two[1]));
        // The largest that there can be.
        assert_eq!(of(u64::MAX).len() as u64, MOST);
    }
}

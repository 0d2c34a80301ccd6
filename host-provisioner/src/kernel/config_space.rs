//! What is read from a PCIe function's configuration space: the device serial number, for
//! which sysfs has no file, and the number of VFs. Pure; the read is in `real.rs`.

/// Extended capabilities begin here (PCIe base specification, 7.6).
const EXTENDED_START: usize = 0x100;
/// Capability id "Device Serial Number" (PCIe base specification, 7.9.3).
const SERIAL_NUMBER: u16 = 0x0003;
/// Capability id "Single Root I/O Virtualization"; NumVFs is at 0x10 of it (PCIe base
/// specification, 9.3.3).
const SRIOV: u16 = 0x0010;
/// No list of 4-byte-aligned headers in 4 KiB is longer; a loop ends here.
const MOST_CAPABILITIES: usize = (4096 - EXTENDED_START) / 4;

/// The serial number as 16 hex digits; `None` when the function has none, or
/// has one that tells nothing apart (all zero or all one).
///
/// `config` is as much of the configuration space as could be read: without
/// CAP_SYS_ADMIN the kernel gives 64 bytes, and then there is no answer.
#[must_use]
pub(super) fn serial_number(config: &[u8]) -> Option<String> {
    let offset = capability(config, SERIAL_NUMBER)?;
    let low = dword(config, offset + 4)?;
    let high = dword(config, offset + 8)?;
    let serial = (u64::from(high) << 32) | u64::from(low);
    (serial != 0 && serial != u64::MAX).then(|| format!("{serial:016x}"))
}

/// The number of VFs that the function has; `None` when it cannot have any or the space could
/// not be read.
///
/// Not from `sriov_numvfs`: on some kernels its readers wait, uninterruptible, for whoever writes
/// to it (drivers/pci/iov.c, `sriov_numvfs_show`; Linux commit 35ff867b7657, reverted later), and
/// a write may not come back.
#[must_use]
pub(super) fn num_vfs(config: &[u8]) -> Option<u16> {
    let offset = capability(config, SRIOV)?;
    u16::try_from(dword(config, offset + 0x10)? & 0xffff).ok()
}

/// Where the extended capability of that id begins.
fn capability(config: &[u8], id: u16) -> Option<usize> {
    let mut offset = EXTENDED_START;
    for _ in 0..MOST_CAPABILITIES {
        let header = dword(config, offset)?;
        // All zero: no extended capability. All one: the device does not answer.
        if header == 0 || header == u32::MAX {
            return None;
        }
        if header & 0xffff == u32::from(id) {
            return Some(offset);
        }
        let next = usize::try_from(header >> 20).ok()? & !3;
        if next < EXTENDED_START {
            return None;
        }
        offset = next;
    }
    None
}

fn dword(config: &[u8], offset: usize) -> Option<u32> {
    let bytes = config.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(headers: &[(usize, u32)]) -> Vec<u8> {
        let mut config = vec![0_u8; 4096];
        for (offset, value) in headers {
            config[*offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        }
        config
    }

    #[test]
    fn the_serial_number_is_found_behind_other_capabilities() {
        // AER at 0x100, then the serial number at 0x140.
        let config = space(&[
            (0x100, 0x1401_0001),
            (0x140, 0x0001_0003),
            (0x144, 0xff12_3456),
            (0x148, 0x5254_00ff),
        ]);
        assert_eq!(serial_number(&config).as_deref(), Some("525400ffff123456"));
    }

    #[test]
    fn the_number_of_vfs_is_found_behind_other_capabilities() {
        // The serial number at 0x140, SR-IOV at 0x160; the dependency link beside NumVFs.
        let config = space(&[
            (0x100, 0x1401_0001),
            (0x140, 0x1601_0003),
            (0x160, 0x0001_0010),
            (0x170, 0x0001_0007),
        ]);
        assert_eq!(num_vfs(&config), Some(7));
        assert_eq!(num_vfs(&config[..0x170]), None);
    }

    #[test]
    fn none_is_none() {
        let loops = space(&[(0x100, 0x1001_0001)]);
        let blank = space(&[(0x100, 0x0001_0003)]);
        let gone = vec![0xff; 4096];
        for config in [&loops, &blank, &gone, &vec![0; 4096], &vec![0; 64], &vec![]] {
            assert_eq!(serial_number(config), None);
            assert_eq!(num_vfs(config), None);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(config in proptest::collection::vec(0_u8.., 0..4096)) {
            let _ = serial_number(&config);
            let _ = num_vfs(&config);
        }
    }
}

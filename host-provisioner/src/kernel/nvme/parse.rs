//! The answers to NVMe admin commands, from their bytes. Pure; any bytes end in an answer.

use super::PAGE;

fn bytes<const N: usize>(page: &[u8], at: usize) -> Option<[u8; N]> {
    page.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u8_at(page: &[u8], at: usize) -> Option<u8> {
    page.get(at).copied()
}

fn u16_at(page: &[u8], at: usize) -> Option<u16> {
    bytes(page, at).map(u16::from_le_bytes)
}

fn u32_at(page: &[u8], at: usize) -> Option<u32> {
    bytes(page, at).map(u32::from_le_bytes)
}

fn u64_at(page: &[u8], at: usize) -> Option<u64> {
    bytes(page, at).map(u64::from_le_bytes)
}

/// A controller (`nvme_id_ctrl` in Linux).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controller {
    /// Its number in the subsystem.
    pub id: u16,
    /// Format NVM.
    pub formats: bool,
    /// Namespace Management and Attachment.
    pub manages_namespaces: bool,
    /// Virtualization Management.
    pub virtualizes: bool,
    /// A Format NVM of one namespace formats, or its erase erases, all of them.
    pub erases_all: bool,
}

pub(crate) fn controller(page: &[u8]) -> Option<Controller> {
    let oacs = u16_at(page, 256)?;
    let fna = u8_at(page, 524)?;
    Some(Controller {
        id: u16_at(page, 78)?,
        formats: oacs & (1 << 1) != 0,
        manages_namespaces: oacs & (1 << 3) != 0,
        virtualizes: oacs & (1 << 7) != 0,
        erases_all: fna & 0b11 != 0,
    })
}

/// One kind of flexible resources of a primary controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// All that can be given.
    pub total: u32,
    /// What secondary controllers have.
    pub secondaries: u32,
    /// What the primary controller has.
    pub primary: u16,
    /// The most that one secondary controller can have.
    pub most: u16,
    /// What is given is best a multiple of it.
    pub granularity: u16,
}

/// What a primary controller can give to its secondary ones (`NvmePriCtrlCap` in QEMU).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Primary {
    /// Number of the primary controller.
    pub id: u16,
    /// `None`: secondary controllers have theirs by nature.
    pub queues: Option<Pool>,
    pub interrupts: Option<Pool>,
}

pub(crate) fn primary(page: &[u8]) -> Option<Primary> {
    let types = u8_at(page, 4)?;
    let pool = |bit: u8, at: usize| -> Option<Option<Pool>> {
        if types & bit == 0 {
            return Some(None);
        }
        Some(Some(Pool {
            total: u32_at(page, at)?,
            secondaries: u32_at(page, at + 4)?,
            primary: u16_at(page, at + 8)?,
            most: u16_at(page, at + 12)?,
            granularity: u16_at(page, at + 14)?,
        }))
    };
    Some(Primary {
        id: u16_at(page, 0)?,
        queues: pool(1, 32)?,
        interrupts: pool(2, 64)?,
    })
}

/// A secondary controller (`NvmeSecCtrlEntry` in QEMU).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Secondary {
    pub id: u16,
    pub online: bool,
    /// Number of its VF, from 1 on; 0: it has none.
    pub vf: u16,
    pub queues: u16,
    pub interrupts: u16,
}

/// Length of an entry, and of what comes before the first one.
const ENTRY: usize = 32;

pub(crate) fn secondaries(page: &[u8]) -> Option<Vec<Secondary>> {
    let count = usize::from(u8_at(page, 0)?);
    let one = |index: usize| {
        let at = ENTRY * (index + 1);
        Some(Secondary {
            id: u16_at(page, at)?,
            online: u8_at(page, at + 4)? & 1 != 0,
            vf: u16_at(page, at + 8)?,
            queues: u16_at(page, at + 10)?,
            interrupts: u16_at(page, at + 12)?,
        })
    };
    (0..count).map(one).collect()
}

/// A list of namespaces ends with the first 0.
pub(crate) fn namespaces(page: &[u8]) -> Vec<u32> {
    (0..page.len() / 4)
        .map_while(|index| u32_at(page, index * 4).filter(|nsid| *nsid != 0))
        .collect()
}

/// A list of controllers says first how many there are.
pub(crate) fn controllers(page: &[u8]) -> Option<Vec<u16>> {
    let count = usize::from(u16_at(page, 0)?);
    let mut ids: Vec<u16> = (1..=count)
        .map(|index| u16_at(page, index * 2))
        .collect::<Option<_>>()?;
    ids.sort_unstable();
    Some(ids)
}

/// The list of this one controller.
pub(crate) fn controller_list(id: u16) -> Box<[u8; PAGE]> {
    let mut page = Box::new([0; PAGE]);
    let words = [1_u16, id];
    let bytes = words.into_iter().flat_map(u16::to_le_bytes);
    page.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    page
}

/// How a namespace is formatted (`nvme_id_ns` in Linux).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Its size in logical blocks; 0: there is no such namespace.
    pub blocks: u64,
    /// Of a logical block without its metadata, in bytes.
    pub block_size: u64,
    /// Field FLBAS.
    flbas: u8,
    /// Field DPS.
    dps: u8,
}

/// The least and the most of a logical block that are met, as powers of two.
const BLOCK_SIZES: std::ops::RangeInclusive<u8> = 9..=16;

pub(crate) fn format(page: &[u8]) -> Option<Format> {
    let flbas = u8_at(page, 26)?;
    let index = usize::from((flbas & 0xf) | ((flbas >> 1) & 0x30));
    let blocks = u64_at(page, 0)?;
    let power = u8_at(page, 128 + 4 * index + 2)?;
    if blocks != 0 && !BLOCK_SIZES.contains(&power) {
        return None;
    }
    Some(Format {
        blocks,
        block_size: 1_u64.checked_shl(u32::from(power)).unwrap_or(0),
        flbas,
        dps: u8_at(page, 29)?,
    })
}

impl Format {
    /// Dword 10 of a Format NVM that keeps the format and erases the user data (`nvme_format` in
    /// QEMU): LBA format, metadata and protection as they are, secure erase 1.
    pub(super) fn erasing(self) -> u32 {
        let (flbas, dps) = (u32::from(self.flbas), u32::from(self.dps));
        let format = flbas & 0xf;
        let extended = (flbas >> 4) & 1;
        let protection = dps & 0x7;
        let first = (dps >> 3) & 1;
        let upper = (flbas >> 5) & 0x3;
        format | (extended << 4) | (protection << 5) | (first << 8) | (1 << 9) | (upper << 12)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(fields: &[(usize, &[u8])]) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        for (at, bytes) in fields {
            page[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        page
    }

    #[test]
    fn a_controller_says_what_it_can() {
        // Number 0x0102; Format, Namespace Management, Virtualization Management.
        let qemus = page(&[(78, &[2, 1]), (256, &[0x8a, 0])]);
        let expected = Controller {
            id: 0x0102,
            formats: true,
            manages_namespaces: true,
            virtualizes: true,
            erases_all: false,
        };
        assert_eq!(controller(&qemus), Some(expected));
        for fna in [1, 2] {
            let all = page(&[(256, &[0x8a, 0]), (524, &[fna])]);
            assert!(controller(&all).unwrap().erases_all);
        }
        let less = controller(&page(&[(256, &[0x75, 0])])).unwrap();
        assert!(!less.formats && !less.manages_namespaces && !less.virtualizes);
        assert_eq!(controller(&[0; 524]), None);
    }

    #[test]
    fn resources_are_those_of_each_kind() {
        let both = page(&[
            (0, &[3, 0]),
            (4, &[3]),
            (32, &[8, 0, 0, 0, 2, 0, 0, 0, 6, 0, 5, 0, 4, 0, 1, 0]),
            (64, &[9, 0, 0, 0, 1, 0, 0, 0, 8, 0, 5, 0, 2, 0, 2, 0]),
        ]);
        let pool = |total, secondaries, primary, most, granularity| Pool {
            total,
            secondaries,
            primary,
            most,
            granularity,
        };
        let expected = Primary {
            id: 3,
            queues: Some(pool(8, 2, 6, 4, 1)),
            interrupts: Some(pool(9, 1, 8, 2, 2)),
        };
        assert_eq!(primary(&both), Some(expected));
        let none = Primary {
            id: 0,
            queues: None,
            interrupts: None,
        };
        assert_eq!(primary(&page(&[])), Some(none));
        assert_eq!(primary(&both[..70]), None);
    }

    #[test]
    fn secondary_controllers_are_listed_and_a_list_that_is_cut_is_none() {
        let two = page(&[
            (0, &[2]),
            (32, &[1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 2, 0, 3, 0]),
            (64, &[2, 0, 0, 0, 0, 0, 0, 0, 2, 0]),
        ]);
        let entry = |id, online, vf, queues, interrupts| Secondary {
            id,
            online,
            vf,
            queues,
            interrupts,
        };
        let expected = vec![entry(1, true, 1, 2, 3), entry(2, false, 2, 0, 0)];
        assert_eq!(secondaries(&two), Some(expected));
        assert_eq!(secondaries(&two[..80]), Some(secondaries(&two).unwrap()));
        assert_eq!(secondaries(&two[..77]), None);
    }

    #[test]
    fn lists_end_where_they_say() {
        assert_eq!(namespaces(&page(&[(0, &[1, 0, 0, 0, 5])])), [1, 5]);
        assert_eq!(namespaces(&[7; PAGE]).len(), PAGE / 4);
        let some = page(&[(0, &[2, 0, 9, 0, 1, 0, 4, 0])]);
        assert_eq!(controllers(&some), Some(vec![1, 9]));
        assert_eq!(controllers(&page(&[(0, &[0xff, 0xff])])), None);
        assert_eq!(
            controllers(controller_list(0x0305).as_slice()),
            Some(vec![0x0305])
        );
    }

    #[test]
    fn a_format_is_kept_and_the_data_erased() {
        // Format 18 (2 in the low, 1 in the high bits) with metadata at the end, protection 1
        // first; 4096 bytes in a block.
        let fields: &[(usize, &[u8])] = &[
            (0, &[0, 1]),
            (26, &[0x32]),
            (29, &[0x09]),
            (128 + 4 * 18, &[8, 0, 12, 0]),
        ];
        let found = format(&page(fields)).unwrap();
        assert_eq!((found.blocks, found.block_size), (256, 4096));
        assert_eq!(found.erasing(), 0x1332);
        let plain = format(&page(&[(0, &[1]), (130, &[9])])).unwrap();
        assert_eq!((plain.block_size, plain.erasing()), (512, 0x200));
        // A namespace that there is not is all zeros; a block of one byte is none.
        assert_eq!(format(&page(&[])).unwrap().blocks, 0);
        assert_eq!(format(&page(&[(0, &[1])])), None);
    }

    proptest! {
        #[test]
        fn any_page_ends_in_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..PAGE)) {
            controller(&bytes);
            primary(&bytes);
            secondaries(&bytes);
            namespaces(&bytes);
            controllers(&bytes);
            if let Some(format) = format(&bytes) {
                // Never another command than an erase with the fields that there are.
                prop_assert_eq!(format.erasing() & !0x31ff, 0x200);
            }
        }
    }
}

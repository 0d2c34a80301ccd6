//! Device programs that somebody else attached to a launcher's cgroup, and what they become.

use std::path::PathBuf;

use host_provisioner::hypervisor::gates::cgroup::{Action, Level, Program, plan};
use host_provisioner::hypervisor::gates::filter::{
    FilterError, Instruction, allows, run as asked, widen,
};
use host_provisioner::hypervisor::gates::journal::Device;

use super::Bytes;

/// BPF_DEVCG_DEV_CHAR; the accesses are in the upper half.
const CHAR: u32 = 2;
const READ_WRITE: u32 = 6;
/// Contexts beside the input's own, about each device.
const ACCESSES: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let [flags, count] = bytes.take();
    let devices: Vec<Device> = (0..count % 4)
        .map(|_| Device {
            major: number(&mut bytes),
            minor: number(&mut bytes),
        })
        .collect();
    let context = [number(&mut bytes), number(&mut bytes), number(&mut bytes)];
    let program: Vec<Instruction> = bytes
        .0
        .as_chunks::<8>()
        .0
        .iter()
        .map(|chunk| {
            let instruction = Instruction::from_bytes(*chunk);
            assert_eq!(instruction.to_bytes(), *chunk);
            instruction
        })
        .collect();
    let wider = widen(&program, &devices);
    compare(&program, &wider, &devices, context);
    for device in &devices {
        for access in ACCESSES {
            for kind in [1, CHAR, 3] {
                for minor in [device.minor, device.minor ^ 1] {
                    let context = [kind | (access << 16), device.major, minor];
                    compare(&program, &wider, &devices, context);
                }
            }
        }
    }
    planned(&program, &devices, flags);
}

fn number(bytes: &mut Bytes<'_>) -> u32 {
    u32::from_le_bytes(bytes.take())
}

/// The wider program allows the devices, and says of all else what the old one said.
fn compare(old: &[Instruction], new: &[Instruction], devices: &[Device], context: [u32; 3]) {
    let [access, major, minor] = context;
    let before = asked(old, context);
    let after = asked(new, context);
    let named = devices.contains(&Device { major, minor });
    if named && access & 0xffff == CHAR && (access >> 16) & !READ_WRITE == 0 {
        assert_eq!(after, Ok(true), "{context:?}");
    } else if let Ok(before) = before {
        assert_eq!(after, Ok(before), "{context:?}");
    } else if matches!(
        before,
        Err(FilterError::Unknown { .. } | FilterError::Empty | FilterError::NoEnd)
    ) {
        // What is not understood does not become a program that is.
        assert!(after.is_err(), "{context:?}: {before:?}, then {after:?}");
    }
}

/// What the gate does about such a program, on a cgroup of its own.
fn planned(program: &[Instruction], wanted: &[Device], flags: u8) {
    let level = Level {
        cgroup: PathBuf::from("/x"),
        programs: vec![Program {
            id: 1,
            tag: "t".to_owned(),
            multi: flags & 1 == 0,
            plain: flags & 2 == 0,
            instructions: program.to_vec(),
            base: None,
        }],
    };
    let denied: Vec<Device> = wanted
        .iter()
        .filter(|device| allows(program, **device) == Ok(false))
        .copied()
        .collect();
    let unread = wanted
        .iter()
        .any(|device| allows(program, *device).is_err());
    match plan(&[level], &[], wanted) {
        Err(words) => assert!(unread || flags & 3 != 0 && !denied.is_empty(), "{words}"),
        Ok(actions) => {
            assert!(
                !unread,
                "a program that is not understood is left or widened"
            );
            match actions.as_slice() {
                [] => assert!(denied.is_empty()),
                [
                    Action::Widen {
                        rules,
                        instructions,
                        ..
                    },
                ] => {
                    assert_eq!((rules, flags & 3), (&denied, 0));
                    for device in wanted {
                        assert_eq!(allows(instructions, *device), Ok(true));
                    }
                }
                other => panic!("one program, and {other:?}"),
            }
        }
    }
}

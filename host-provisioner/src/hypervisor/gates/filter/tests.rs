//! Programs as runc and systemd write them, and anything at all.

use super::*;
use proptest::prelude::*;

const GROUP: Device = Device {
    major: 511,
    minor: 6,
};
const CONTAINER: Device = Device {
    major: 10,
    minor: 196,
};
const NULL: Device = Device { major: 1, minor: 3 };

fn i(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction::new(code, destination, source, offset, immediate)
}

/// Allows character device 1:3 for anything, then denies: the manner of runc (libcontainer
/// devicefilter): type, access, major and minor in r2 to r5.
pub(crate) fn runc_like() -> Vec<Instruction> {
    vec![
        i(0x61, 2, 1, 0, 0),
        i(0x54, 2, 0, 0, 0xffff),
        i(0x61, 3, 1, 0, 0),
        i(0x74, 3, 0, 0, 16),
        i(0x61, 4, 1, 4, 0),
        i(0x61, 5, 1, 8, 0),
        i(0x55, 2, 0, 4, 2),
        i(0x55, 4, 0, 3, 1),
        i(0x55, 5, 0, 2, 3),
        i(0xb4, 0, 0, 0, 1),
        i(0x95, 0, 0, 0, 0),
        i(0xb4, 0, 0, 0, 0),
        i(0x95, 0, 0, 0, 0),
    ]
}

#[test]
fn a_filter_is_understood_and_widened_by_these_devices_alone() {
    let old = runc_like();
    assert_eq!(allows(&old, NULL), Ok(true));
    assert_eq!(allows(&old, GROUP), Ok(false));
    let new = widen(&old, &[CONTAINER, GROUP]);
    for device in [NULL, GROUP, CONTAINER] {
        assert_eq!(allows(&new, device), Ok(true), "{device:?}");
    }
    for (major, minor) in [(511, 7), (10, 6), (512, 6), (511, 196)] {
        assert_eq!(allows(&new, Device { major, minor }), Ok(false));
    }
    // Making the node, and a block device of the same numbers, stay forbidden.
    assert_eq!(run(&new, [2 | (1 << 16), 511, 6]), Ok(false));
    assert_eq!(run(&new, [2 | (7 << 16), 511, 6]), Ok(false));
    assert_eq!(run(&new, [1 | (6 << 16), 511, 6]), Ok(false));
    assert_eq!(run(&new, [2 | (2 << 16), 511, 6]), Ok(true));
    assert_eq!(widen(&old, &[]), old);
}

#[test]
fn what_is_no_plain_filter_is_refused_with_its_place() {
    let end = i(0x95, 0, 0, 0, 0);
    let unknown = |program: &[Instruction]| {
        matches!(allows(program, GROUP), Err(FilterError::Unknown { .. }))
    };
    assert!(unknown(&[i(0x85, 0, 0, 0, 1), end]), "call");
    assert!(
        unknown(&[i(0x18, 1, 1, 0, 5), i(0, 0, 0, 0, 0), end]),
        "map"
    );
    assert!(unknown(&[i(0x7b, 1, 1, 0, 0), end]), "store");
    assert!(unknown(&[i(0x61, 2, 1, 12, 0), end]), "beyond the context");
    assert!(unknown(&[i(0x61, 2, 1, -1, 0), end]), "before the context");
    assert_eq!(
        allows(&[i(0x05, 0, 0, -1, 0), end], GROUP),
        Err(FilterError::Jump { at: 0 })
    );
    assert_eq!(
        allows(&[i(0x05, 0, 0, 9, 0), end], GROUP),
        Err(FilterError::Jump { at: 0 })
    );
    assert_eq!(allows(&[], GROUP), Err(FilterError::Empty));
    assert_eq!(allows(&[end], GROUP), Err(FilterError::Unset { at: 0 }));
    assert_eq!(
        allows(&[i(0xb7, 0, 0, 0, 1)], GROUP),
        Err(FilterError::NoEnd)
    );
    assert_eq!(
        allows(&[i(0xbf, 11, 1, 0, 0), end], GROUP),
        Err(FilterError::Unset { at: 0 })
    );
}

#[test]
fn wide_and_narrow_arithmetic_differ_as_in_the_kernel() {
    // w2 = -1; r2 == 0xffffffff; r3 = -1 (64 bit); r3 != 0xffffffff as unsigned
    let program = [
        i(0xb4, 2, 0, 0, -1),
        i(0x18, 4, 0, 0, -1),
        i(0x00, 0, 0, 0, 0),
        i(0xb7, 0, 0, 0, 0),
        i(0x5d, 2, 4, 1, 0),
        i(0xb7, 0, 0, 0, 1),
        i(0x95, 0, 0, 0, 0),
    ];
    assert_eq!(run(&program, [0; 3]), Ok(true));
    let program = [
        i(0xb7, 3, 0, 0, -1),
        i(0xb7, 0, 0, 0, 0),
        i(0x75, 3, 0, 1, 0), // r3 s>= 0
        i(0xb7, 0, 0, 0, 1),
        i(0x95, 0, 0, 0, 0),
    ];
    // -1 is not >= 0 as a signed number, so the jump is not taken.
    assert_eq!(run(&program, [0; 3]), Ok(true));
}

fn instruction() -> impl Strategy<Value = Instruction> {
    any::<[u8; 8]>().prop_map(Instruction::from_bytes)
}

proptest! {
    #[test]
    fn bytes_are_kept(bytes in any::<[u8; 8]>()) {
        prop_assert_eq!(Instruction::from_bytes(bytes).to_bytes(), bytes);
    }

    #[test]
    fn no_program_whatever_makes_it_panic_or_hang(
        program in proptest::collection::vec(instruction(), 0..40), context in any::<[u32; 3]>(),
    ) {
        drop(run(&program, context));
    }

    #[test]
    fn likely_programs_neither(
        shapes in proptest::collection::vec(
            (prop::sample::select(vec![0x61u8, 0x69, 0x71, 0x54, 0x57, 0x74, 0xbc, 0xbf, 0xb4, 0xb7, 0x55,
                0x15, 0x1d, 0x5d, 0x56, 0x05, 0x95, 0x18, 0x37, 0x9f, 0xcf]), 0u8..12, 0u8..12, 0i16..6, any::<i32>()),
            0..60),
        context in any::<[u32; 3]>(),
    ) {
        let program: Vec<_> = shapes.iter().map(|(c, d, s, o, n)| i(*c, *d, *s, *o, *n)).collect();
        drop(run(&program, context));
    }

    /// Whatever else is asked, the wider program says what the old one said.
    #[test]
    fn widening_changes_nothing_else(
        kind in 1u32..3, access in 0u32..8, major in 0u32..600, minor in 0u32..300,
    ) {
        let context = [kind | (access << 16), major, minor];
        let old = runc_like();
        let new = widen(&old, &[CONTAINER, GROUP]);
        let named = [CONTAINER, GROUP].contains(&Device { major, minor });
        if !(named && kind == 2 && access & !6 == 0) {
            prop_assert_eq!(run(&new, context), run(&old, context));
        } else {
            prop_assert_eq!(run(&new, context), Ok(true));
        }
    }
}

//! The planner over invented hierarchies; the real kernel's is in `tests/gates.rs`.

use super::*;

const GROUP: Device = Device {
    major: 511,
    minor: 6,
};
const CONTAINER: Device = Device {
    major: 10,
    minor: 196,
};

fn returning(value: i32) -> Vec<Instruction> {
    vec![
        Instruction::new(0xb7, 0, 0, 0, value),
        Instruction::new(0x95, 0, 0, 0, 0),
    ]
}

fn program(id: u32, instructions: Vec<Instruction>) -> Program {
    Program {
        id,
        tag: format!("t{id}"),
        multi: true,
        plain: true,
        instructions,
        base: None,
    }
}

fn level(cgroup: &str, programs: Vec<Program>) -> Level {
    Level {
        cgroup: cgroup.into(),
        programs,
    }
}

fn record(cgroup: &str, ours: u32, rules: &[Device]) -> ProgramRecord {
    ProgramRecord {
        cgroup: cgroup.into(),
        old_id: 1,
        old_tag: "t1".into(),
        pin: "/pin".into(),
        ours: vec![OurProgram {
            id: ours,
            tag: format!("t{ours}"),
            rules: rules.to_vec(),
        }],
    }
}

#[test]
fn every_program_that_denies_is_widened_and_no_other() {
    let levels = [
        level(
            "/a/b",
            vec![program(1, returning(0)), program(2, returning(1))],
        ),
        level("/a", vec![]),
        level("/", vec![program(3, returning(0))]),
    ];
    let actions = plan(&levels, &[], &[CONTAINER, GROUP]).unwrap();
    let ids: Vec<_> = actions
        .iter()
        .map(|a| match a {
            Action::Widen {
                id,
                rules,
                instructions,
                ..
            } => {
                assert_eq!(rules, &[CONTAINER, GROUP]);
                assert_eq!(filter::allows(instructions, GROUP), Ok(true));
                *id
            }
            Action::Restore { .. } => panic!("nothing is ours"),
        })
        .collect();
    assert_eq!(ids, [1, 3]);
    assert_eq!(plan(&levels, &[], &[]), Ok(vec![]));
}

#[test]
fn ours_follow_what_is_wanted_and_go_when_nothing_is() {
    let mut ours = program(9, filter::widen(&returning(0), &[CONTAINER, GROUP]));
    ours.base = Some(returning(0));
    let levels = [level("/a", vec![ours])];
    let records = [record("/a", 9, &[CONTAINER, GROUP])];
    assert_eq!(plan(&levels, &records, &[CONTAINER, GROUP]), Ok(vec![]));
    let narrower = plan(&levels, &records, &[CONTAINER]).unwrap();
    let [
        Action::Widen {
            id: 9,
            instructions,
            ..
        },
    ] = narrower.as_slice()
    else {
        panic!("{narrower:?}");
    };
    assert_eq!(filter::allows(instructions, GROUP), Ok(false));
    assert_eq!(filter::allows(instructions, CONTAINER), Ok(true));
    assert_eq!(
        plan(&levels, &records, &[]),
        Ok(vec![Action::Restore {
            cgroup: "/a".into(),
            id: 9
        }])
    );
}

#[test]
fn what_somebody_else_put_in_our_place_is_theirs() {
    // Same id, another tag: a number used again.
    let mut theirs = program(9, returning(1));
    theirs.tag = "other".into();
    let levels = [level("/a", vec![theirs])];
    let records = [record("/a", 9, &[CONTAINER])];
    assert_eq!(plan(&levels, &records, &[]), Ok(vec![]));
}

#[test]
fn what_cannot_be_widened_safely_is_refused_in_words() {
    let refused = |p: Program| {
        plan(&[level("/a", vec![p])], &[], &[GROUP]).expect_err("it cannot be widened")
    };
    let mut single = program(1, returning(0));
    single.multi = false;
    assert!(refused(single).contains("replaced alone"));
    let mut maps = program(1, returning(0));
    maps.plain = false;
    assert!(refused(maps).contains("maps"));
    assert!(refused(program(7, vec![])).contains("bpf_jit_harden"));
    // One that allows needs no change, whatever its manner.
    let mut allows = program(1, returning(1));
    allows.multi = false;
    assert_eq!(
        plan(&[level("/a", vec![allows])], &[], &[GROUP]),
        Ok(vec![])
    );
}

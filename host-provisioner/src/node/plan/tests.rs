use super::*;
use crate::kernel::VfConfig;

fn claim(deleting: bool, device: bool, attachment: bool) -> ClaimFacts {
    ClaimFacts {
        deleting,
        bound: true,
        device,
        attachment,
        reported: false,
        doubled: false,
        reclaim: ReclaimPolicy::Return,
        withheld: false,
        withheld_from_it: false,
        storage: false,
    }
}

fn vf(vf: Vf, configured: bool, clean: bool) -> Option<VfSeen> {
    Some(VfSeen {
        vf,
        configured,
        clean,
    })
}

#[test]
fn a_claim_goes_up_step_by_step() {
    let mut seen = Seen::default();
    assert_eq!(
        next_step(claim(false, false, false), &seen),
        Step::LookForLeft
    );
    seen.left = Some(Left::Nothing);
    assert_eq!(
        next_step(claim(false, false, false), &seen),
        Step::LookAtQemu
    );
    // It is prepared for while it starts.
    seen.qemu = Some(Qemu::Gone);
    assert_eq!(next_step(claim(false, false, false), &seen), Step::Allocate);
    seen.qemu = None;
    assert_eq!(next_step(claim(false, true, false), &seen), Step::LookAtVf);
    seen.vf = vf(Vf::Absent, false, false);
    assert_eq!(next_step(claim(false, true, false), &seen), Step::CreateVfs);
    seen.vf = vf(Vf::Driverless, false, true);
    assert_eq!(next_step(claim(false, true, false), &seen), Step::Prepare);
    seen.vf = vf(Vf::VfioFree, true, false);
    assert_eq!(
        next_step(claim(false, true, false), &seen),
        Step::LookAtQemu
    );
    seen.qemu = Some(Qemu::Running(InQemu::Absent));
    assert_eq!(
        next_step(claim(false, true, false), &seen),
        Step::RecordAttachment
    );
    assert_eq!(next_step(claim(false, true, true), &seen), Step::Plug);
    seen.qemu = Some(Qemu::Running(InQemu::Plugged));
    assert_eq!(next_step(claim(false, true, true), &seen), Step::AwaitGuest);
    seen.qemu = Some(Qemu::Running(InQemu::Configured("0000:05:00.0".into())));
    assert_eq!(
        next_step(claim(false, true, true), &seen),
        Step::LookAtService
    );
    seen.service = Some(Service::AsGranted);
    assert_eq!(
        next_step(claim(false, true, true), &seen),
        Step::ReportAttached {
            guest_address: "0000:05:00.0".into()
        }
    );
}

#[test]
fn a_vm_without_a_port_keeps_no_vf_from_others() {
    let full = Qemu::Unsupported {
        reason: reason::NO_FREE_PORT,
        message: "no port".into(),
    };
    let paused = Qemu::Unsupported {
        reason: reason::VM_NOT_RUNNING,
        message: "paused".into(),
    };
    let waits = |step: &Step, why| matches!(step, Step::Wait(w) if w.reason == why);
    let step = |device, qemu: &Qemu, vf| {
        let seen = Seen {
            qemu: Some(qemu.clone()),
            left: Some(Left::Nothing),
            vf,
            ..Seen::default()
        };
        next_step(claim(false, device, false), &seen)
    };
    assert!(waits(&step(false, &full, None), reason::NO_FREE_PORT));
    assert!(waits(&step(false, &paused, None), reason::VM_NOT_RUNNING));
    // One that lost the race for the last port gives back what it took.
    let ready = vf(Vf::VfioFree, true, false);
    assert_eq!(step(true, &full, ready.clone()), Step::Clean);
    assert_eq!(
        step(true, &full, vf(Vf::Driverless, false, false)),
        Step::Clean
    );
    assert_eq!(
        step(true, &full, vf(Vf::Driverless, false, true)),
        Step::ClearDevice
    );
    // A VM that is paused for a moment has it when it goes on.
    assert!(waits(&step(true, &paused, ready), reason::VM_NOT_RUNNING));
    // What somebody else has is not ours to clean.
    for held in [Vf::VfioHeld, Vf::OtherDriver("igbvf".into())] {
        let step = step(true, &full, vf(held, false, false));
        assert!(waits(&step, reason::PENDING), "{step:?}");
    }
}

#[test]
fn what_an_earlier_copy_left_in_the_vm_is_taken_over_on_the_way_up_and_down() {
    let why = Wait {
        reason: reason::CONFLICT,
        message: "it has one".into(),
    };
    let of = |deleting, left| {
        let seen = Seen {
            left: Some(left),
            ..Seen::default()
        };
        next_step(claim(deleting, false, false), &seen)
    };
    for deleting in [false, true] {
        assert_eq!(of(deleting, Left::Device), Step::TakeOver);
        assert_eq!(
            of(deleting, Left::Unknown(why.clone())),
            Step::Wait(why.clone())
        );
        let seen = Seen::default();
        assert_eq!(
            next_step(claim(deleting, false, false), &seen),
            Step::LookForLeft
        );
    }
    assert_eq!(of(true, Left::Nothing), Step::Rest);
    // The record of the attachment alone may be lost.
    let held = |deleting, left| {
        let seen = Seen {
            vf: vf(Vf::VfioHeld, true, false),
            left,
            ..Seen::default()
        };
        next_step(claim(deleting, true, false), &seen)
    };
    for deleting in [false, true] {
        assert_eq!(held(deleting, None), Step::LookForLeft);
        assert_eq!(held(deleting, Some(Left::Device)), Step::TakeOver);
    }
    assert!(matches!(held(false, Some(Left::Nothing)), Step::Wait(_)));
    assert_eq!(held(true, Some(Left::Nothing)), Step::ClearDevice);
    let unbound = ClaimFacts {
        bound: false,
        ..claim(true, false, false)
    };
    assert_eq!(next_step(unbound, &Seen::default()), Step::Rest);
}

#[test]
fn an_attached_claim_is_judged_by_qemu_before_its_group_is_probed() {
    assert_eq!(
        next_step(claim(false, true, true), &Seen::default()),
        Step::LookAtQemu
    );
    let seen = Seen {
        qemu: Some(Qemu::Running(InQemu::Plugged)),
        vf: None,
        service: None,
        left: None,
    };
    assert_eq!(next_step(claim(false, true, true), &seen), Step::AwaitGuest);
}

#[test]
fn nothing_is_done_about_a_vf_whose_last_write_has_not_come_back() {
    let seen = Seen {
        qemu: Some(Qemu::Gone),
        vf: vf(Vf::Stuck("it waits".into()), false, false),
        service: None,
        left: None,
    };
    for deleting in [false, true] {
        for attachment in [false, true] {
            let step = next_step(claim(deleting, true, attachment), &seen);
            let Step::Wait(Wait { reason, message }) = step else {
                panic!("{deleting} {attachment}: {step:?}")
            };
            assert_eq!(reason, reason::BROKEN);
            assert!(message.starts_with("it waits. "), "{message}");
        }
    }
}

#[test]
fn release_touches_the_vf_only_when_qemu_let_go_and_the_group_opens() {
    let mut seen = Seen::default();
    assert_eq!(next_step(claim(true, true, true), &seen), Step::LookAtQemu);
    seen.qemu = Some(Qemu::Running(InQemu::Configured("0000:05:00.0".into())));
    for held in [Vf::VfioHeld, Vf::VfioFree, Vf::Driverless] {
        seen.vf = vf(held, true, false);
        assert_eq!(next_step(claim(true, true, true), &seen), Step::Unplug);
    }
    seen.qemu = Some(Qemu::Running(InQemu::Absent));
    seen.vf = vf(Vf::VfioHeld, true, false);
    assert!(matches!(
        next_step(claim(true, true, true), &seen),
        Step::Wait(_)
    ));
    seen.vf = vf(Vf::VfioFree, true, false);
    assert_eq!(next_step(claim(true, true, true), &seen), Step::Clean);
    seen.vf = vf(Vf::Driverless, false, true);
    assert_eq!(next_step(claim(true, true, true), &seen), Step::ClearDevice);
    seen.left = Some(Left::Nothing);
    assert_eq!(next_step(claim(true, false, false), &seen), Step::Rest);
}

#[test]
fn what_somebody_else_has_is_never_cleaned() {
    for foreign in [Vf::VfioHeld, Vf::OtherDriver("igbvf".into())] {
        let seen = Seen {
            vf: vf(foreign.clone(), false, false),
            qemu: None,
            service: None,
            left: Some(Left::Nothing),
        };
        assert_eq!(
            next_step(claim(true, true, false), &seen),
            Step::ClearDevice
        );
        assert!(matches!(
            next_step(claim(false, true, false), &seen),
            Step::Wait(_)
        ));
    }
}

#[test]
fn a_guest_that_has_its_device_is_kept_served() {
    let kept = ClaimFacts {
        reported: true,
        ..claim(false, true, true)
    };
    let address = "0000:05:00.0".to_owned();
    let mut seen = Seen {
        qemu: Some(Qemu::Running(InQemu::Configured(address.clone()))),
        ..Seen::default()
    };
    assert_eq!(next_step(kept, &seen), Step::LookAtService);
    let drift = Drift::of(false, &VfConfig::CLEAN, VfConfig::CLEAN).unwrap();
    seen.service = Some(Service::Drifted(drift.clone()));
    assert_eq!(next_step(kept, &seen), Step::Repair(drift));
    seen.service = Some(Service::AsGranted);
    let report = Step::ReportAttached {
        guest_address: address,
    };
    assert_eq!(next_step(kept, &seen), report);
}

#[test]
fn a_device_that_left_unasked_is_lost_with_its_cause_and_a_new_one_is_none() {
    let kept = ClaimFacts {
        reported: true,
        ..claim(false, true, true)
    };
    let mut seen = Seen {
        qemu: Some(Qemu::Running(InQemu::Absent)),
        ..Seen::default()
    };
    assert_eq!(next_step(kept, &seen), Step::LookAtVf);
    for (now, cause) in [
        (Vf::Absent, "number of VFs"),
        (Vf::Driverless, "taken from vfio-pci"),
        (Vf::VfioFree, "ejected"),
    ] {
        seen.vf = vf(now, true, false);
        let Step::Lose(wait) = next_step(kept, &seen) else {
            panic!("not lost")
        };
        assert_eq!(wait.reason, reason::LOST);
        assert!(wait.message.contains(cause), "{}", wait.message);
    }
    assert_eq!(next_step(claim(false, true, true), &seen), Step::Plug);
    let going = ClaimFacts {
        deleting: true,
        ..kept
    };
    assert_eq!(next_step(going, &seen), Step::Clean);
}

#[test]
fn a_claim_that_the_controller_has_not_bound_is_left_alone() {
    let facts = ClaimFacts {
        bound: false,
        ..claim(false, false, false)
    };
    assert_eq!(next_step(facts, &Seen::default()), Step::Rest);
}

#[test]
fn of_two_claims_on_one_vf_the_one_that_no_qemu_has_a_device_of_lets_go_untouched() {
    let configured = InQemu::Configured("0000:05:00.0".into());
    for deleting in [false, true] {
        let mut facts = claim(deleting, true, false);
        facts.doubled = true;
        assert_eq!(next_step(facts, &Seen::default()), Step::ClearDevice);
        facts.attachment = true;
        assert_eq!(next_step(facts, &Seen::default()), Step::LookAtQemu);
        let of = |qemu| {
            let seen = Seen {
                qemu: Some(qemu),
                ..Seen::default()
            };
            next_step(facts, &seen)
        };
        for without in [Qemu::Gone, Qemu::Running(InQemu::Absent)] {
            assert_eq!(of(without), Step::ClearDevice);
        }
        for has in [InQemu::Plugged, configured.clone()] {
            let step = of(Qemu::Running(has));
            match deleting {
                true => assert_eq!(step, Step::Unplug),
                false => assert!(matches!(step, Step::Wait(_)), "{step:?}"),
            }
        }
    }
}

#[test]
fn what_vfs_share_stays_open_while_qemu_may_have_one() {
    assert_eq!(close_after_add(Added::Yes, 0), Close::Group);
    assert_eq!(close_after_add(Added::Unknown, 0), Close::Group);
    assert_eq!(close_after_add(Added::No, 0), Close::All);
    assert_eq!(close_after_add(Added::No, 1), Close::Group);
    assert_eq!(close_after_release(0), Close::All);
    assert_eq!(close_after_release(1), Close::Group);
}

#[test]
fn a_vf_that_does_not_go_back_is_let_go_of_when_it_is_withheld() {
    let going = |reclaim, attachment, withheld| ClaimFacts {
        reclaim,
        withheld,
        ..claim(true, true, attachment)
    };
    let seen = |state: Vf, clean| Seen {
        qemu: Some(Qemu::Gone),
        vf: vf(state, true, clean),
        left: Some(Left::Nothing),
        ..Seen::default()
    };
    use ReclaimPolicy::{Destroy, Retain, Return};
    for attachment in [true, false] {
        // What goes is cleaned first, what stays is not touched.
        for (policy, free) in [
            (Return, Step::Clean),
            (Destroy, Step::Clean),
            (Retain, Step::AwaitWithheld),
        ] {
            let facts = going(policy, attachment, false);
            assert_eq!(next_step(facts, &seen(Vf::VfioFree, false)), free);
        }
        for state in [Vf::Driverless, Vf::Absent, Vf::OtherDriver("igbvf".into())] {
            let seen = seen(state, true);
            for policy in [Destroy, Retain] {
                let step = next_step(going(policy, attachment, false), &seen);
                assert_eq!(step, Step::AwaitWithheld);
                let step = next_step(going(policy, attachment, true), &seen);
                assert_eq!(step, Step::ClearDevice);
            }
            let step = next_step(going(Return, attachment, false), &seen);
            assert_eq!(step, Step::ClearDevice);
        }
    }
    // Nothing of this comes before the device is out and its group is let go.
    let held = Seen {
        vf: vf(Vf::VfioHeld, true, false),
        ..seen(Vf::Absent, true)
    };
    let step = next_step(going(Retain, true, true), &held);
    assert!(matches!(step, Step::Wait(wait) if wait.reason == reason::UNPLUG_PENDING));
    let somebodys = next_step(going(Destroy, false, false), &held);
    assert_eq!(somebodys, Step::AwaitWithheld);
}

#[test]
fn a_claim_that_names_a_vf_withheld_since_another_had_it_lets_go_of_it_untouched() {
    for deleting in [false, true] {
        let facts = ClaimFacts {
            withheld_from_it: true,
            ..claim(deleting, true, false)
        };
        assert_eq!(next_step(facts, &Seen::default()), Step::ClearDevice);
        // Unless it is in use: then it is the claim's until it is given back.
        let attached = ClaimFacts {
            attachment: true,
            ..facts
        };
        assert_eq!(next_step(attached, &Seen::default()), Step::LookAtQemu);
    }
}

#[test]
fn a_namespace_is_kept_while_its_claim_lives_and_erased_when_it_goes() {
    let storage = |deleting| ClaimFacts {
        storage: true,
        ..claim(deleting, true, false)
    };
    let no_port = Seen {
        vf: vf(Vf::VfioFree, true, false),
        qemu: Some(Qemu::Unsupported {
            reason: reason::NO_FREE_PORT,
            message: "no port".into(),
        }),
        ..Seen::default()
    };
    // A network VF goes back, and this one waits.
    assert_eq!(next_step(claim(false, true, false), &no_port), Step::Clean);
    assert!(matches!(
        next_step(storage(false), &no_port),
        Step::Wait(Wait { reason, .. }) if reason == reason::NO_FREE_PORT
    ));
    // Without its VF, which a restart of the host takes, it is erased all the same.
    for (clean, step) in [(false, Step::Clean), (true, Step::ClearDevice)] {
        let seen = Seen {
            vf: vf(Vf::Absent, false, clean),
            ..Seen::default()
        };
        assert_eq!(next_step(storage(true), &seen), step);
    }
}

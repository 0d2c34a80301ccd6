//! The worlds that are checked: which claims, VMs, groups and how much may go wrong. What may go
//! wrong is bounded, and everything that may is tried in every order.

use common::api::ReclaimPolicy;

use crate::check;
use crate::world::{Budget, Setting};

const NOTHING: Budget = Budget {
    kills: 0,
    lost: 0,
    deaths: 0,
    foreign: 0,
    deletes: [0, 0],
    remakes: [0, 0],
    copies: 0,
    torn: 0,
};

/// One claim, one VF, and every program in steps of its own.
const ALONE: Setting = Setting {
    claims: 1,
    total_vfs: 1,
    group_of: [0, 1],
    vm_of: [0, 0],
    stepwise: true,
    reclaim: ReclaimPolicy::Return,
    budget: NOTHING,
};

/// Two claims of one VM, two VFs in groups of their own. Controller and guest-syncer look and
/// write in one.
const PAIR: Setting = Setting {
    claims: 2,
    total_vfs: 2,
    stepwise: false,
    ..ALONE
};

#[test]
fn a_claim_and_its_successor() {
    let budget = Budget {
        kills: 1,
        lost: 1,
        deletes: [2, 0],
        remakes: [1, 0],
        ..NOTHING
    };
    check("a claim and its successor", Setting { budget, ..ALONE });
}

#[test]
fn claims_whose_vfs_do_not_go_back() {
    let budget = Budget {
        kills: 1,
        lost: 1,
        deletes: [1, 0],
        remakes: [1, 0],
        ..NOTHING
    };
    for (name, reclaim) in [
        (
            "a claim whose VF is destroyed, and its successor",
            ReclaimPolicy::Destroy,
        ),
        (
            "a claim whose VF is retained, and its successor",
            ReclaimPolicy::Retain,
        ),
    ] {
        let setting = Setting {
            reclaim,
            budget,
            ..ALONE
        };
        check(name, setting);
        // Two claims over it, and a stranger.
        let setting = Setting {
            reclaim,
            total_vfs: 1,
            budget: Budget {
                foreign: 1,
                deletes: [1, 0],
                ..NOTHING
            },
            ..PAIR
        };
        check(&format!("{name}, two claims"), setting);
    }
}

#[test]
fn a_claim_whose_copy_is_deleted_on_the_host() {
    let budget = Budget {
        kills: 1,
        deletes: [1, 0],
        copies: 1,
        ..NOTHING
    };
    check("a deleted copy", Setting { budget, ..ALONE });
}

#[test]
fn a_claim_whose_copy_is_torn_off() {
    let budget = Budget {
        kills: 1,
        lost: 1,
        torn: 1,
        ..NOTHING
    };
    check("a copy torn off", Setting { budget, ..ALONE });
}

#[test]
fn two_claims_of_one_vm_and_a_copy_torn_off() {
    let budget = Budget {
        torn: 1,
        deletes: [0, 1],
        ..NOTHING
    };
    check("a copy of two torn off", Setting { budget, ..PAIR });
    let group_of = [0, 0];
    let shared = Setting {
        group_of,
        budget,
        ..PAIR
    };
    check("a copy of two in one group torn off", shared);
}

#[test]
fn a_claim_whose_vm_dies_and_whose_vf_a_stranger_takes() {
    let budget = Budget {
        kills: 1,
        lost: 1,
        deaths: 1,
        foreign: 1,
        deletes: [1, 0],
        ..NOTHING
    };
    check("death and a stranger", Setting { budget, ..ALONE });
}

#[test]
fn two_claims_of_one_vm() {
    let budget = Budget {
        deletes: [1, 1],
        ..NOTHING
    };
    check("two claims of one VM", Setting { budget, ..PAIR });
}

#[test]
fn two_claims_for_one_vf() {
    let setting = Setting {
        total_vfs: 1,
        budget: Budget {
            kills: 1,
            lost: 1,
            deletes: [1, 0],
            ..NOTHING
        },
        ..PAIR
    };
    check("two claims for one VF", setting);
}

#[test]
fn a_vf_that_changes_hands_among_strangers() {
    let setting = Setting {
        total_vfs: 1,
        budget: Budget {
            deaths: 1,
            foreign: 1,
            deletes: [1, 0],
            ..NOTHING
        },
        ..PAIR
    };
    check("a VF that changes hands", setting);
}

#[test]
fn two_vfs_of_one_group_for_one_vm() {
    let setting = Setting {
        group_of: [0, 0],
        budget: Budget {
            deletes: [1, 0],
            ..NOTHING
        },
        ..PAIR
    };
    check("one group, one VM", setting);
}

#[test]
fn two_vfs_of_one_group_for_two_vms() {
    let setting = Setting {
        group_of: [0, 0],
        vm_of: [0, 1],
        budget: Budget {
            kills: 1,
            lost: 1,
            deletes: [1, 0],
            ..NOTHING
        },
        ..PAIR
    };
    check("one group, two VMs", setting);
}

/// Hours of failures in minutes: `docs/model.md` says how long it takes and what it visits.
#[test]
#[cfg(feature = "long-tests")]
fn larger_worlds() {
    let alone = Budget {
        kills: 2,
        lost: 1,
        deaths: 1,
        deletes: [2, 0],
        remakes: [1, 0],
        copies: 1,
        ..NOTHING
    };
    check(
        "larger: a claim",
        Setting {
            budget: alone,
            ..ALONE
        },
    );
    let pair = Budget {
        kills: 1,
        lost: 1,
        deletes: [1, 1],
        ..NOTHING
    };
    check(
        "larger: two claims",
        Setting {
            budget: pair,
            ..PAIR
        },
    );
    let deaths = Budget {
        deaths: 1,
        deletes: [1, 1],
        ..NOTHING
    };
    check(
        "larger: two claims, a death",
        Setting {
            budget: deaths,
            ..PAIR
        },
    );
    let two_vms = Setting {
        vm_of: [0, 1],
        budget: deaths,
        ..PAIR
    };
    check("larger: two VMs, a death", two_vms);
    let strangers = Setting {
        total_vfs: 1,
        budget: Budget {
            kills: 1,
            lost: 1,
            deaths: 1,
            foreign: 1,
            deletes: [1, 0],
            ..NOTHING
        },
        ..PAIR
    };
    check("larger: strangers", strangers);
    let shared = Setting {
        group_of: [0, 0],
        budget: pair,
        ..PAIR
    };
    check("larger: one group", shared);
    let steps = Setting {
        total_vfs: 1,
        stepwise: true,
        budget: Budget {
            kills: 1,
            deletes: [1, 0],
            remakes: [1, 0],
            ..NOTHING
        },
        ..PAIR
    };
    check("larger: two claims in steps", steps);
}

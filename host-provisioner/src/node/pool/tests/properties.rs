//! one-to-one and in-use-stays, whatever comes in.

use proptest::prelude::*;

use super::*;

/// How a VF is found.
#[derive(Clone, Copy, Debug)]
enum Found {
    Driverless,
    HostDriver,
    Vfio(Probe),
}

#[derive(Clone, Copy, Debug)]
enum Probe {
    Free,
    Busy,
    None,
}

fn found() -> impl Strategy<Value = Found> {
    prop_oneof![
        4 => Just(Found::Driverless),
        1 => Just(Found::HostDriver),
        2 => Just(Found::Vfio(Probe::Free)),
        2 => Just(Found::Vfio(Probe::Busy)),
        1 => Just(Found::Vfio(Probe::None)),
    ]
}

/// A PF with some VFs in any state and claims on any index, existing or not.
pub(super) fn any_pf(address: &'static str) -> impl Strategy<Value = PfInput> {
    (
        proptest::collection::vec(found(), 0..=7),
        proptest::collection::vec((0_u16..7, any::<bool>(), 1_u8..4), 0..4),
        proptest::option::of(0_u16..9),
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.1),
    )
        .prop_map(move |(states, claims, desired, managed, host)| {
            let mut pool = input(address, u16::try_from(states.len()).unwrap());
            pool.desired = desired;
            pool.managed = managed;
            pool.facts.in_use_by_host = host.then(|| "default route via x".to_owned());
            for (vf, state) in pool.vfs.iter_mut().zip(states) {
                let group = vf.iommu_group.unwrap();
                let driver = match state {
                    Found::Driverless => continue,
                    Found::HostDriver => "igbvf",
                    Found::Vfio(probe) => {
                        match probe {
                            Probe::Free => pool.probes.insert(group, GroupProbe::Free),
                            Probe::Busy => pool.probes.insert(group, GroupProbe::Busy),
                            Probe::None => None,
                        };
                        VFIO_PCI
                    }
                };
                vf.driver = Some(driver.to_owned());
            }
            for (number, (index, attached, vm)) in claims.into_iter().enumerate() {
                if pool.holders.iter().any(|holder| holder.vf_index == index) {
                    continue;
                }
                pool.holders.push(Holder {
                    attached,
                    vm_uid: format!("vm-{vm}"),
                    ..holder(&format!("{address}-{number}"), index)
                });
            }
            pool
        })
}

fn wish_number(number: u8) -> Wish {
    let mut wish = wish(&format!("new-{number}"));
    wish.config.mac = MacAddr([2, 1, 0, 0, 0, number]);
    wish
}

proptest! {
    /// Claims one after the other, each choice recorded before the next: no VF
    /// goes to two, and none goes that is not proven free.
    #[test]
    fn one_to_one(mut one in any_pf(PF1), mut two in any_pf(PF2), claims in 1_u8..20) {
        let mut given: Vec<(String, u16)> = Vec::new();
        for number in 0..claims {
            let pfs = [PfView::new(one.clone()), PfView::new(two.clone())];
            let wish = wish_number(number);
            let Ok(choice) = choose(&pfs, &wish) else { continue };
            let pool = if choice.physical_function == one.name { &mut one } else { &mut two };
            prop_assert!(pool.managed && pool.facts.in_use_by_host.is_none());
            prop_assert!(choice.vf_index < pool.facts.total_vfs);
            prop_assert!(!pool.holders.iter().any(|holder| holder.vf_index == choice.vf_index));
            let vf = pool.vfs.iter().find(|vf| vf.index == choice.vf_index);
            prop_assert_eq!(vf.map(|vf| vf.address), choice.address);
            if let Some(vf) = vf {
                let free = match vf.driver.as_deref() {
                    None => true,
                    Some(VFIO_PCI) => {
                        let group = vf.iommu_group.unwrap();
                        pool.probes.get(&group) == Some(&GroupProbe::Free)
                    }
                    Some(_) => false,
                };
                prop_assert!(free, "{:?}", vf);
            }
            let place = (choice.physical_function.clone(), choice.vf_index);
            prop_assert!(!given.contains(&place));
            given.push(place);
            pool.holders.push(Holder {
                mac: Some(wish.config.mac),
                ..holder(&wish.claim.name, choice.vf_index)
            });
            // Asked again, the same answer.
            let again = [PfView::new(one.clone()), PfView::new(two.clone())];
            let same = choose(&again, &wish).unwrap();
            prop_assert_eq!(same.vf_index, choice.vf_index);
            prop_assert_eq!(same.physical_function, choice.physical_function);
        }
    }

    /// VFs are made by count only where there is none, and the number changes
    /// only where each VF is proven free and no claim names any.
    #[test]
    fn in_use_stays(pool in any_pf(PF1)) {
        let view = PfView::new(pool.clone());
        if let Ok(choice) = choose(std::slice::from_ref(&view), &wish("new"))
            && let Some(count) = choice.create
        {
            prop_assert_eq!(pool.facts.num_vfs, 0);
            prop_assert!(pool.vfs.is_empty());
            prop_assert!(choice.vf_index < count && count <= pool.facts.total_vfs);
            prop_assert!(pool.holders.iter().all(|holder| holder.vf_index < count));
        }
        if let Resize::Apply(Change { from, to, .. }) = super::resize(&view) {
            prop_assert!(pool.holders.is_empty());
            prop_assert!(pool.managed && pool.facts.in_use_by_host.is_none());
            prop_assert_eq!(from, pool.facts.num_vfs);
            prop_assert!(to <= pool.facts.total_vfs);
            for vf in &pool.vfs {
                let probe = pool.probes.get(&vf.iommu_group.unwrap());
                let free = vf.driver.is_none()
                    || vf.driver.as_deref() == Some(VFIO_PCI) && probe == Some(&GroupProbe::Free);
                prop_assert!(free, "{:?}", vf);
            }
        }
    }

    /// Every refusal has a reason and a sentence, and names no claim of another
    /// namespace to the tenant.
    #[test]
    fn refusals_speak(mut pool in any_pf(PF1)) {
        for holder in &mut pool.holders {
            holder.claim.namespace = "guest-b".to_owned();
        }
        if let Err(error) = choose(&[PfView::new(pool)], &wish("new")) {
            prop_assert!(!error.reason().is_empty());
            let words = error.message();
            prop_assert!(words.len() > 40 && !words.contains("guest-b"), "{}", words);
        }
    }
}

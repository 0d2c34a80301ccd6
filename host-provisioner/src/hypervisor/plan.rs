//! Decisions about a VM that is about to get a VF: whether it can have one at
//! all, on which port, under which id. No I/O.

use thiserror::Error;

use super::{Machine, RootPort};

/// Prefix of our device ids. KubeVirt's own are `ua-`, `hostdevice-`, `pci.` and the like, and
/// libvirt's `hostdev`, `net`, `virtio-disk`: none starts so.
pub const DEVICE_PREFIX: &str = "vfc-";

/// How many root ports stay free for KubeVirt's own hotplugs.
pub const DEFAULT_RESERVED_PORTS: usize = 2;

/// Why a VM cannot have a VF, for its owner to read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Unsupported {
    #[error(
        "the VM has machine type {0}, which has no PCIe root ports to hot-add a device to; only q35 machines can be given a VF: change spec.template.spec.domain.machine.type to q35 and restart the VM"
    )]
    MachineType(String),
    #[error(
        "the VM is confidential (its memory is encrypted); a VF cannot be hot-added to it: use a VM without launch security"
    )]
    Confidential,
    #[error(
        "the VM's own IOMMU ({0}) does not report its mappings to the host (caching mode); a VF cannot be hot-added to it: enable caching mode or remove the IOMMU from the VM"
    )]
    Viommu(String),
    #[error("the VM is {0}, not running; the VF is attached once it runs")]
    NotRunning(String),
    #[error(
        "the VM has no PCIe root port that a device can be hot-added to; KubeVirt gives spare ports to VMs that do not set placePCIDevicesOnRootComplex: remove that annotation and restart the VM"
    )]
    NoPorts,
    #[error(
        "all PCIe root ports of the VM are taken: {occupied} occupied and {free} free, of which {reserved} are kept for the VM's own hotplugs; release another VF of this VM, or restart it with more ports"
    )]
    NoFreePort {
        occupied: usize,
        free: usize,
        reserved: usize,
    },
    #[error(
        "the VM already has a device {0}, which is this claim's id, and the claim does not record it; nothing was changed: remove that device, or restart the VM"
    )]
    IdTaken(String),
    #[error(
        "the VM's launcher pod runs in a user namespace, where a device node cannot be opened; a VF cannot be given to it: run the VM without user namespaces"
    )]
    UserNamespace,
    #[error(
        "the node runs with cgroup v1, where a launcher's device rules cannot be widened safely; a VF needs a node with cgroup v2"
    )]
    CgroupV1,
}

impl Unsupported {
    /// True for a lack that goes away by itself or by releasing another claim.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        matches!(self, Self::NotRunning(_) | Self::NoFreePort { .. })
    }
}

/// The id under which a claim's device is known to QEMU: a function of the
/// guest claim's UID alone, so that a lost record can be found again.
#[must_use]
pub fn device_id(guest_claim_uid: &str) -> String {
    format!("{DEVICE_PREFIX}{guest_claim_uid}")
}

/// How many of our devices the VM has; KubeVirt's own host devices are none of them.
#[must_use]
pub fn our_devices(machine: &Machine) -> usize {
    machine
        .vfio_devices()
        .filter(|id| id.starts_with(DEVICE_PREFIX))
        .count()
}

/// Chooses the port for a new device, or says why the VM cannot have one.
///
/// The highest free port is taken: libvirt fills from the lowest and does not
/// see a device that was added behind its back.
pub fn choose_port(machine: &Machine, reserved: usize) -> Result<&RootPort, Unsupported> {
    check(machine)?;
    let mut ports: Vec<&RootPort> = machine.ports.iter().filter(|p| p.hotplug).collect();
    if ports.is_empty() {
        return Err(Unsupported::NoPorts);
    }
    ports.sort_by_key(|p| (natural(&p.id), p.address));
    let free: Vec<&RootPort> = ports.iter().copied().filter(|p| !p.occupied).collect();
    match free.last() {
        Some(port) if free.len() > reserved => Ok(*port),
        _ => Err(Unsupported::NoFreePort {
            occupied: ports.len() - free.len(),
            free: free.len(),
            reserved,
        }),
    }
}

/// Whether this VM can have a VF at all, ports apart.
pub fn check(machine: &Machine) -> Result<(), Unsupported> {
    if !machine.machine_type.contains("q35") {
        return Err(Unsupported::MachineType(machine.machine_type.clone()));
    }
    if machine.confidential {
        return Err(Unsupported::Confidential);
    }
    if let Some(viommu) = &machine.viommu
        && !viommu.caching_mode
    {
        return Err(Unsupported::Viommu(viommu.type_.clone()));
    }
    if machine.run_state != "running" {
        return Err(Unsupported::NotRunning(machine.run_state.clone()));
    }
    Ok(())
}

/// Whether the VM has no device of that id yet.
pub fn id_is_free(machine: &Machine, id: &str) -> Result<(), Unsupported> {
    match machine.peripherals.iter().any(|p| p.id == id) {
        true => Err(Unsupported::IdTaken(id.to_owned())),
        false => Ok(()),
    }
}

/// Orders `pci.9` before `pci.10`: digits compare as numbers.
fn natural(id: &str) -> Vec<(String, u64)> {
    let mut parts = Vec::new();
    let mut text = String::new();
    let mut number: Option<u64> = None;
    for c in id.chars() {
        match (c.to_digit(10), number) {
            (Some(d), n) => {
                number = Some(
                    n.unwrap_or(0)
                        .saturating_mul(10)
                        .saturating_add(u64::from(d)),
                );
            }
            (None, Some(n)) => {
                parts.push((std::mem::take(&mut text), n));
                number = None;
                text.push(c);
            }
            (None, None) => text.push(c),
        }
    }
    parts.push((text, number.unwrap_or(0)));
    parts
}

#[cfg(test)]
mod tests {
    use super::super::{GuestMemory, ViommuFacts};
    use super::*;
    use proptest::prelude::*;

    fn port(id: &str, occupied: bool, hotplug: bool) -> RootPort {
        RootPort {
            id: id.to_owned(),
            address: None,
            hotplug,
            occupied,
            secondary_bus: 0,
        }
    }

    fn machine(ports: Vec<RootPort>) -> Machine {
        Machine {
            machine_type: "pc-q35-10.0-machine".into(),
            uuid: "12345678-1111-2222-3333-123456789abc".into(),
            run_state: "running".into(),
            viommu: None,
            confidential: false,
            memory: GuestMemory::default(),
            ports,
            peripherals: Vec::new(),
        }
    }

    #[test]
    fn the_highest_free_port_is_taken_and_the_lowest_stay() {
        let m = machine(vec![
            port("pci.10", false, true),
            port("pci.2", false, true),
            port("pci.9", false, true),
            port("pci.11", true, true),
            port("pci.12", false, false),
        ]);
        assert_eq!(choose_port(&m, 2).map(|p| p.id.as_str()), Ok("pci.10"));
        assert_eq!(
            choose_port(&m, 3).map(|p| p.id.as_str()),
            Err(Unsupported::NoFreePort {
                occupied: 1,
                free: 3,
                reserved: 3
            })
        );
    }

    #[test]
    fn a_host_device_of_kubevirt_is_none_of_ours() {
        let mut m = machine(Vec::new());
        m.peripherals = [
            ("vfc-u1", "vfio-pci"),
            ("hostdevice-gpu", "vfio-pci"),
            ("vfc-u2", "pcie-root-port"),
        ]
        .map(|(id, type_)| super::super::Peripheral {
            id: id.into(),
            type_: type_.into(),
        })
        .into();
        assert_eq!(our_devices(&m), 1);
    }

    #[test]
    fn what_cannot_have_a_vf_is_refused_in_words() {
        let free = || vec![port("a", false, true)];
        let mut m = machine(free());
        m.machine_type = "pc-i440fx-7.2-machine".into();
        let said = choose_port(&m, 0).unwrap_err().to_string();
        assert!(said.contains("q35"), "{said}");

        let mut m = machine(free());
        m.confidential = true;
        assert_eq!(choose_port(&m, 0), Err(Unsupported::Confidential));

        let mut m = machine(free());
        m.viommu = Some(ViommuFacts {
            type_: "intel-iommu".into(),
            caching_mode: false,
        });
        assert!(matches!(choose_port(&m, 0), Err(Unsupported::Viommu(_))));
        m.viommu = Some(ViommuFacts {
            type_: "intel-iommu".into(),
            caching_mode: true,
        });
        assert!(choose_port(&m, 0).is_ok());

        let mut m = machine(free());
        m.run_state = "paused".into();
        assert!(choose_port(&m, 0).unwrap_err().may_pass());

        assert_eq!(choose_port(&machine(vec![]), 0), Err(Unsupported::NoPorts));
        assert_eq!(
            choose_port(&machine(vec![port("a", false, false)]), 0),
            Err(Unsupported::NoPorts)
        );
    }

    proptest! {
        #[test]
        fn a_chosen_port_is_free_and_leaves_the_reserved(
            states in proptest::collection::vec((any::<bool>(), any::<bool>()), 0..20),
            reserved in 0usize..5,
        ) {
            let ports: Vec<_> = states
                .iter()
                .enumerate()
                .map(|(n, (occupied, hotplug))| port(&format!("pci.{n}"), *occupied, *hotplug))
                .collect();
            let usable = ports.iter().filter(|p| p.hotplug && !p.occupied).count();
            let m = machine(ports);
            match choose_port(&m, reserved) {
                Ok(p) => {
                    prop_assert!(p.hotplug && !p.occupied);
                    prop_assert!(usable > reserved);
                }
                Err(_) => prop_assert!(usable <= reserved || usable == 0),
            }
        }
    }
}

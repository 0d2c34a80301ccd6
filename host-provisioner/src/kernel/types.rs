//! What the kernel tells and takes, as plain values. No I/O.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use common::api::{LinkState, VlanProtocol};
use common::pci::{PciAddress, PciId};
use thiserror::Error;

/// The driver that hands a function to user space.
pub const VFIO_PCI: &str = "vfio-pci";

/// Where the kernel's file systems are; tests put folders of their own here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    pub sys: PathBuf,
    pub dev: PathBuf,
    pub proc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            sys: PathBuf::from("/sys"),
            dev: PathBuf::from("/dev"),
            proc: PathBuf::from("/proc"),
        }
    }
}

/// Not a MAC address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a MAC address of six bytes, as in 02:00:00:00:00:01")]
pub struct MacError(pub String);

/// A 48-bit MAC address.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// What an unset VF has: "none given, the guest's driver makes one up".
    pub const ZERO: Self = Self([0; 6]);

    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }

    /// Group addresses are no station's own.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        let [first, ..] = self.0;
        first & 1 == 1
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let bad = || MacError(text.to_owned());
        let mut bytes = [0_u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(bad()),
        }
    }
}

/// What the node itself can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// As `uname -r`.
    pub kernel_release: String,
    /// `/proc/sys/kernel/random/boot_id`: another one means another boot.
    pub boot_id: String,
    /// Number of IOMMU groups; 0 means that there is no IOMMU or it is off.
    pub iommu_groups: u32,
    /// Mode of the kernel's lockdown; absent when it has none.
    pub lockdown: Option<String>,
    /// vfio-pci is registered with the PCI bus.
    pub vfio_pci: bool,
    /// `/dev/vfio/vfio` exists: the type1 container interface that QEMU opens.
    pub vfio_container: bool,
}

/// How a card's eswitch forwards between its PF and VFs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eswitch {
    /// By MAC and VLAN, as the PF's settings of the VFs say.
    Legacy,
    /// By rules for each VF's representor.
    Switchdev,
}

/// One SR-IOV-capable function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PfFacts {
    pub address: PciAddress,
    pub vendor: PciId,
    pub device: PciId,
    /// The bound kernel driver.
    pub driver: Option<String>,
    /// Name of its network interface.
    pub interface: Option<String>,
    /// The interface's present MAC address.
    pub mac: Option<MacAddr>,
    /// The address burnt into the hardware (`IFLA_PERM_ADDRESS`).
    pub permanent_mac: Option<MacAddr>,
    /// Device serial number from the PCIe capability, 16 hex digits; without it the NVMe
    /// controller's.
    pub serial: Option<String>,
    /// Physical slot, as named in `/sys/bus/pci/slots`.
    pub slot: Option<String>,
    /// The most VFs that it can have (`sriov_totalvfs`).
    pub total_vfs: u16,
    /// The VFs that it has (`sriov_numvfs`).
    pub num_vfs: u16,
    /// Absent when the machine has one node or does not say.
    pub numa_node: Option<u16>,
    pub iommu_group: Option<u32>,
    /// Every function of its IOMMU group, itself among them, by address.
    pub group_members: Vec<PciAddress>,
    /// Why this PF is the host's own, in words: never written to then.
    pub in_use_by_host: Option<String>,
    /// Its network interface is administratively up.
    pub up: bool,
    /// Mode of its eswitch; absent where the driver has no choice of it.
    pub eswitch: Option<Eswitch>,
    /// What tells this piece of hardware from every other, see [`PfFacts::identify`].
    pub identity: String,
}

impl PfFacts {
    /// The identity from the other fields: the serial number and function
    /// number; without a serial number the permanent MAC; without either the
    /// slot or address. PCI addresses renumber when a card is added, so they are
    /// the last resort. The function number is there because the two ports of a
    /// card share one serial number (seen on mlx5).
    #[must_use]
    pub fn identify(&self) -> String {
        let ids = format!("{}:{}", self.vendor, self.device);
        if let Some(serial) = &self.serial {
            return format!("{ids} serial {serial} function {}", self.address.function());
        }
        if let Some(mac) = self.permanent_mac {
            return format!("{ids} mac {mac}");
        }
        match &self.slot {
            Some(slot) => format!("{ids} slot {slot} function {}", self.address.function()),
            None => format!("{ids} address {}", self.address),
        }
    }
}

/// One virtual function that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfFacts {
    /// As in the PF's `virtfn<index>`.
    pub index: u16,
    pub address: PciAddress,
    pub vendor: PciId,
    pub device: PciId,
    /// The bound kernel driver.
    pub driver: Option<String>,
    pub iommu_group: Option<u32>,
    /// Every function of its IOMMU group, itself among them, by address.
    pub group_members: Vec<PciAddress>,
}

/// A VLAN tag that the PF puts on and takes off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VlanTag {
    /// 1 to 4094.
    pub id: u16,
    /// Priority, 0 to 7.
    pub qos: u8,
    pub protocol: VlanProtocol,
}

impl VlanTag {
    /// An 802.1Q tag.
    #[must_use]
    pub const fn new(id: u16, qos: u8) -> Self {
        Self {
            id,
            qos,
            protocol: VlanProtocol::Ieee8021Q,
        }
    }
}

impl fmt::Display for VlanTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} qos {}", self.id, self.qos)?;
        match self.protocol {
            VlanProtocol::Ieee8021Q => Ok(()),
            other => write!(f, " {other}"),
        }
    }
}

/// Bounds of what a VF sends, in Mbit/s; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxRate {
    /// What the VF can count on.
    pub min: u32,
    /// What the VF cannot exceed.
    pub max: u32,
}

impl fmt::Display for TxRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bound = |rate| match rate {
            0 => "none".to_owned(),
            rate => format!("{rate} Mbit/s"),
        };
        write!(f, "min {}, max {}", bound(self.min), bound(self.max))
    }
}

/// What the controller of a VF has, where the PF is an NVMe subsystem's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// The PF is none: a network card's.
    #[default]
    Foreign,
    /// No namespace.
    Nothing,
    /// This namespace alone, which no other controller has.
    Namespace(u32),
    /// Something that serves nobody; what.
    Amiss(&'static str),
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("no controller"),
            Self::Nothing => f.write_str("no namespace"),
            Self::Namespace(nsid) => write!(f, "namespace {nsid}"),
            Self::Amiss(what) => f.write_str(what),
        }
    }
}

/// What a PF does for one of its VFs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VfConfig {
    /// Zero: none given.
    pub mac: MacAddr,
    pub vlan: Option<VlanTag>,
    pub spoof_check: bool,
    pub trust: bool,
    pub link_state: LinkState,
    pub rate: TxRate,
    pub storage: Storage,
}

impl VfConfig {
    /// What a VF has that nobody holds: nothing of its last holder.
    pub const CLEAN: Self = Self {
        mac: MacAddr::ZERO,
        vlan: None,
        spoof_check: true,
        trust: false,
        link_state: LinkState::Auto,
        rate: TxRate { min: 0, max: 0 },
        storage: Storage::Foreign,
    };

    /// What a VF has that is no network interface.
    #[must_use]
    pub const fn of_storage(storage: Storage) -> Self {
        Self {
            spoof_check: false,
            storage,
            ..Self::CLEAN
        }
    }

    /// Whether it is of a VF of an NVMe subsystem.
    #[must_use]
    pub fn is_storage(&self) -> bool {
        self.storage != Storage::Foreign
    }
}

impl VfConfig {
    /// The settings in which what the kernel reports is not what was admitted.
    ///
    /// A trusted guest may change its own MAC, so the MAC of one is no drift. What a driver
    /// does not have it reports as 0 or not at all, which reads as in [`VfConfig::CLEAN`], and
    /// that is all that is ever granted of it.
    #[must_use]
    pub fn drift(&self, reported: &Self) -> Vec<&'static str> {
        let differs = [
            ("MAC", self.mac != reported.mac && !self.trust),
            ("VLAN", self.vlan != reported.vlan),
            ("spoof check", self.spoof_check != reported.spoof_check),
            ("trust", self.trust != reported.trust),
            ("link state", self.link_state != reported.link_state),
            ("transmit rate", self.rate != reported.rate),
            ("namespace", self.storage != reported.storage),
        ];
        let drifted = differs.into_iter().filter(|(_, differs)| *differs);
        drifted.map(|(setting, _)| setting).collect()
    }
}

impl fmt::Display for VfConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_storage() {
            return self.storage.fmt(f);
        }
        let on = |flag| if flag { "on" } else { "off" };
        write!(f, "MAC {}, ", self.mac)?;
        match self.vlan {
            Some(tag) => write!(f, "VLAN {tag}, ")?,
            None => write!(f, "no VLAN, ")?,
        }
        write!(
            f,
            "spoof check {}, trust {}",
            on(self.spoof_check),
            on(self.trust)
        )?;
        // Few drivers have them, so they are told only when they are not as usual.
        if self.link_state != LinkState::Auto {
            write!(f, ", link state {}", self.link_state)?;
        }
        if self.rate != TxRate::default() {
            write!(f, ", transmit rate {}", self.rate)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_reads_back_as_it_was_written() {
        for text in [
            "00:00:00:00:00:00",
            "02:00:00:00:00:aa",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert_eq!(text.parse::<MacAddr>().unwrap().to_string(), text);
        }
        assert!("00:00:00:00:00:00".parse::<MacAddr>().unwrap().is_zero());
        assert!(
            "01:00:00:00:00:00"
                .parse::<MacAddr>()
                .unwrap()
                .is_multicast()
        );
    }

    #[test]
    fn what_is_no_mac_is_refused() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:aa:bb",
            "02:00:00:00:00:a",
            "02-00-00-00-00-aa",
            "+2:00:00:00:00:aa",
            "02:00:00:00:00:aa\n",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn drift_names_the_settings() {
        let other = VfConfig {
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            vlan: Some(VlanTag::new(5, 0)),
            spoof_check: false,
            trust: true,
            link_state: LinkState::Disable,
            rate: TxRate { min: 0, max: 100 },
            ..VfConfig::CLEAN
        };
        assert_eq!(VfConfig::CLEAN.drift(&VfConfig::CLEAN), Vec::<&str>::new());
        let all = [
            "MAC",
            "VLAN",
            "spoof check",
            "trust",
            "link state",
            "transmit rate",
        ];
        assert_eq!(VfConfig::CLEAN.drift(&other), all);
        assert_eq!(other.drift(&VfConfig::CLEAN), all[1..]);
        let service = VlanTag {
            protocol: VlanProtocol::Ieee8021Ad,
            ..other.vlan.unwrap()
        };
        let service = VfConfig {
            vlan: Some(service),
            ..other
        };
        assert_eq!(other.drift(&service), ["VLAN"]);
    }

    #[test]
    fn settings_are_told_as_they_are() {
        let usual = "MAC 00:00:00:00:00:00, no VLAN, spoof check on, trust off";
        assert_eq!(VfConfig::CLEAN.to_string(), usual);
        let limited = VfConfig {
            link_state: LinkState::Enable,
            rate: TxRate { min: 0, max: 50 },
            ..VfConfig::CLEAN
        };
        assert_eq!(
            limited.to_string(),
            format!("{usual}, link state Enable, transmit rate min none, max 50 Mbit/s")
        );
        let storage = VfConfig::of_storage(Storage::Namespace(7));
        assert_eq!(storage.to_string(), "namespace 7");
        assert!(storage.is_storage() && !VfConfig::CLEAN.is_storage());
    }
}

//! The host's kernel, as far as SR-IOV and vfio need it: the only code of this
//! program that touches `/sys`, `/dev/vfio` and netlink.
//!
//! Everything here blocks; an async caller uses `spawn_blocking`. No function
//! decides whether a device may be touched: that is the planner's, and every
//! writing function says what its caller must have proven.

mod changes;
mod config_space;
mod error;
#[cfg(any(test, feature = "fake-kernel"))]
pub mod fake;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod helper;
mod host_use;
pub mod modules;
mod netlink;
pub mod nvme;
mod real;
mod sysfs;
mod types;
mod vfio;

use std::collections::BTreeMap;

use common::pci::PciAddress;

use crate::cpus::CpuList;

pub use changes::{Change, Watcher};
pub use error::{HoldError, KernelError};
pub use helper::{Helpers, Stuck};
pub use nvme::Nvme;
pub use real::RealKernel;
pub use types::{
    Eswitch, MacAddr, MacError, NodeFacts, PfFacts, Roots, Storage, TxRate, VFIO_PCI, VfConfig,
    VfFacts, VlanTag,
};
pub use vfio::GroupHold;

/// What the node agent asks of the kernel of its host.
pub trait Kernel: Send + Sync + 'static {
    /// What the node can do: kernel, boot, IOMMU, lockdown, vfio.
    fn node_facts(&self) -> Result<NodeFacts, KernelError>;

    /// The NUMA nodes with the CPUs of each; none where the kernel does not say.
    fn numa_nodes(&self) -> Result<BTreeMap<u16, CpuList>, KernelError>;

    /// Every PCI function with `sriov_totalvfs` above 0, by address.
    fn physical_functions(&self) -> Result<Vec<PfFacts>, KernelError>;

    /// One physical function.
    fn physical_function(&self, pf: PciAddress) -> Result<PfFacts, KernelError>;

    /// The VFs that exist, by index; empty when there is none.
    fn virtual_functions(&self, pf: PciAddress) -> Result<Vec<VfFacts>, KernelError>;

    /// Brings the number of VFs to `count`: from 0, or to 0.
    ///
    /// The VFs get no driver (`sriov_drivers_autoprobe` is turned off first).
    /// Returns when the kernel reads back `count` and every VF's links exist;
    /// a driver that made another number is [`KernelError::VfCount`], because
    /// the kernel calls that a success (drivers/pci/iov.c, `sriov_numvfs_store`).
    ///
    /// The caller has proven that no VF of `pf` is in use: the kernel does not check.
    fn set_num_vfs(&self, pf: PciAddress, count: u16) -> Result<(), KernelError>;

    /// Tells `told` of what changes from now on, on threads made for it, until it
    /// answers that nobody listens any more.
    fn watch(&self, told: Watcher) -> Result<(), KernelError>;

    /// The VF's settings as the kernel reports them.
    fn vf_config(&self, pf: &PfFacts, index: u16) -> Result<VfConfig, KernelError>;

    /// Makes the VF's settings `want`, one netlink request a setting that
    /// differs, and reads them back.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] names the setting and keeps the errno;
    /// [`KernelError::Readback`] when the kernel took it and reports another.
    fn set_vf_config(&self, pf: &PfFacts, index: u16, want: &VfConfig) -> Result<(), KernelError>;

    /// Takes an interface administratively up; no-op when it is.
    fn set_link_up(&self, interface: &str) -> Result<(), KernelError>;

    /// Binds a driverless VF to vfio-pci; no-op when it is bound to it.
    ///
    /// A VF on any other driver is refused ([`KernelError::WrongDriver`]): call
    /// [`Kernel::unbind`] first, having proven that nobody uses it.
    fn bind_vfio(&self, vf: PciAddress) -> Result<(), KernelError>;

    /// Leaves the VF without a driver. The caller has proven that nobody uses
    /// it: unbinding a vfio device in use waits, uninterruptible, for its user.
    /// If somebody has taken it all the same, the write is left waiting and the
    /// answer is [`KernelError::Stuck`].
    fn unbind(&self, vf: PciAddress) -> Result<(), KernelError>;

    /// The functions about which a write has not come back, PFs and VFs. What the kernel
    /// shows of one is not what there is, and nothing about it may be decided or written.
    fn stuck(&self) -> Result<BTreeMap<PciAddress, Stuck>, KernelError>;

    /// Function level reset. The caller has proven that nobody uses the VF, and holds
    /// its group where it is on vfio-pci.
    fn reset_function(&self, vf: PciAddress) -> Result<(), KernelError>;

    /// Opens `/dev/vfio/<group>`, which one process can at a time, and keeps it
    /// until the hold is dropped.
    ///
    /// # Errors
    /// [`HoldError::Busy`] when somebody has it open; [`HoldError::NoDevice`]
    /// when no member is on a vfio driver any more.
    fn hold_group(&self, group: u32) -> Result<GroupHold, HoldError>;

    /// Whether [`Kernel::hold_group`] would succeed: opens the group and lets it
    /// go. Not the cause of a [`HoldError::Busy`] of another call to this kernel, but
    /// for the moment in which a helper is started: until it runs it has all open files.
    ///
    /// # Errors
    /// Those of [`Kernel::hold_group`].
    fn probe_group(&self, group: u32) -> Result<(), HoldError> {
        self.hold_group(group).map(drop)
    }

    /// The NVMe controllers of this host.
    fn nvme(&self) -> &dyn Nvme;
}

//! A sysfs of one igb PF in a temporary folder, and a netlink of one
//! interface, that do on a write what the kernel does.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::pci::PciAddress;
use tempfile::TempDir;

use crate::kernel::netlink::{Link, NetUse, Netlink, VfSetting};
use crate::kernel::sysfs::{Attributes, Files};
use crate::kernel::{Eswitch, KernelError, MacAddr, RealKernel, Roots, VFIO_PCI, VfConfig};

pub const PF: &str = "0000:01:00.0";
const TOTAL: u16 = 7;

pub fn vf_address(index: u16) -> PciAddress {
    let id = 0x80 + 2 * u8::try_from(index).unwrap();
    PciAddress::new(0, 1, id >> 3, id & 7).unwrap()
}

#[derive(Debug)]
struct Manners {
    writes: Vec<(String, String)>,
    at_most: u16,
    delay: Option<Duration>,
    vfio: bool,
    ignore_trust: bool,
    up: bool,
    configs: Vec<VfConfig>,
    orders: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Emulated {
    folder: Arc<TempDir>,
    manners: Arc<Mutex<Manners>>,
}

fn make(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn link(target: &Path, path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    symlink(target, path).unwrap();
}

fn function(root: &Path, address: &str, device: &str, group: u32) -> PathBuf {
    let folder = root.join("bus/pci/devices").join(address);
    make(&folder.join("vendor"), "0x8086\n");
    make(&folder.join("device"), &format!("{device}\n"));
    make(&folder.join("numa_node"), "-1\n");
    let group = root.join("kernel/iommu_groups").join(group.to_string());
    link(&folder, &group.join("devices").join(address));
    link(&group, &folder.join("iommu_group"));
    folder
}

fn config_space() -> Vec<u8> {
    let mut config = vec![0_u8; 4096];
    for (offset, value) in [
        (0x100, 0x0001_0003_u32),
        (0x104, 0xff00_0101),
        (0x108, 0x5254_00ff),
    ] {
        config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    config
}

impl Emulated {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (sys, proc) = (folder.path().join("sys"), folder.path().join("proc"));
        let pf = function(&sys, PF, "0x10c9", 1);
        make(&pf.join("sriov_totalvfs"), "7\n");
        make(&pf.join("sriov_numvfs"), "0\n");
        make(&pf.join("sriov_drivers_autoprobe"), "1\n");
        fs::write(pf.join("config"), config_space()).unwrap();
        fs::create_dir_all(pf.join("net/enp1s0")).unwrap();
        for driver in ["igb", "igbvf", VFIO_PCI] {
            fs::create_dir_all(sys.join("bus/pci/drivers").join(driver)).unwrap();
        }
        link(&sys.join("bus/pci/drivers/igb"), &pf.join("driver"));
        make(&sys.join("bus/pci/slots/3-1/address"), "0000:01:00\n");
        make(&sys.join("bus/pci/devices/0000:00:01.0/vendor"), "0x8086\n");
        make(&sys.join("bus/pci/drivers_probe"), "");
        make(
            &sys.join("kernel/security/lockdown"),
            "none [integrity] confidentiality\n",
        );
        make(&proc.join("sys/kernel/osrelease"), "6.12.0-test\n");
        make(
            &proc.join("sys/kernel/random/boot_id"),
            "7d0f6c1e-0000-4000-8000-000000000001\n",
        );
        make(&proc.join("sys/net/ipv6/conf/enp1s0/accept_ra"), "1\n");
        Self {
            folder: Arc::new(folder),
            manners: Arc::new(Mutex::new(Manners {
                writes: Vec::new(),
                at_most: u16::MAX,
                delay: None,
                vfio: true,
                ignore_trust: false,
                up: false,
                configs: Vec::new(),
                orders: Vec::new(),
            })),
        }
    }

    /// A file of the NUMA nodes' folder.
    pub fn numa(&self, file: &str, text: &str) {
        make(&self.sys().join("devices/system/node").join(file), text);
    }

    pub fn pf_on_numa_node(&self, node: &str) {
        let file = self
            .sys()
            .join("bus/pci/devices")
            .join(PF)
            .join("numa_node");
        make(&file, node);
    }

    pub fn kernel(&self) -> RealKernel {
        RealKernel {
            roots: Roots {
                sys: self.sys(),
                dev: self.folder.path().join("dev"),
                proc: self.folder.path().join("proc"),
            },
            netlink: Arc::new(self.clone()),
            attributes: Arc::new(self.clone()),
            openings: super::super::vfio::Openings::default(),
            helpers: None,
            lending: Default::default(),
        }
    }

    /// Puts a file below `/sys`.
    pub fn file(&self, path: &str, text: &str) {
        make(&self.sys().join(path), text);
    }

    /// Puts an empty file below `/dev`.
    pub fn device_file(&self, name: &str) {
        make(&self.folder.path().join("dev").join(name), "");
    }

    /// The module is loaded, and its driver of the same name has the PF.
    pub fn loaded(&self, module: &str) {
        let folder = self.sys().join("module").join(module);
        let driver = self.sys().join("bus/pci/drivers").join(module);
        make(&folder.join("initstate"), "live\n");
        make(&folder.join("refcnt"), "0\n");
        make(&driver.join("bind"), "");
        link(&folder, &driver.join("module"));
        link(
            &driver,
            &folder.join("drivers").join(format!("pci:{module}")),
        );
        link(&self.device(PF.parse().unwrap()), &driver.join(PF));
    }

    pub fn take_up(&self) {
        self.manners.lock().unwrap().up = true;
    }

    /// The PF is no network card.
    pub fn without_interface(&self) {
        let net = self.device(PF.parse().unwrap()).join("net");
        fs::remove_dir_all(net).unwrap();
    }

    fn sys(&self) -> PathBuf {
        self.folder.path().join("sys")
    }

    fn device(&self, address: PciAddress) -> PathBuf {
        self.sys().join("bus/pci/devices").join(address.to_string())
    }

    /// Writes so far: path below the sysfs or procfs root, and text.
    pub fn writes(&self) -> Vec<(String, String)> {
        self.manners.lock().unwrap().writes.clone()
    }

    pub fn forget_writes(&self) {
        self.manners.lock().unwrap().writes.clear();
    }

    pub fn make_at_most(&self, count: u16) {
        self.manners.lock().unwrap().at_most = count;
    }

    pub fn links_come_after(&self, delay: Duration) {
        self.manners.lock().unwrap().delay = Some(delay);
    }

    pub fn without_vfio(&self) {
        self.manners.lock().unwrap().vfio = false;
    }

    pub fn ignore_trust(&self) {
        self.manners.lock().unwrap().ignore_trust = true;
    }

    pub fn netlink_orders(&self) -> Vec<String> {
        self.manners.lock().unwrap().orders.clone()
    }

    pub fn read(&self, address: PciAddress, file: &str) -> String {
        let text = fs::read_to_string(self.device(address).join(file)).unwrap();
        text.trim().to_owned()
    }

    pub fn driver(&self, address: PciAddress) -> Option<String> {
        let target = fs::read_link(self.device(address).join("driver")).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    pub fn bind(&self, address: PciAddress, driver: &str) {
        let folder = self.sys().join("bus/pci/drivers").join(driver);
        make(&folder.join("unbind"), "");
        link(&folder, &self.device(address).join("driver"));
    }

    fn set_num_vfs(&self, wanted: u16) -> io::Result<()> {
        let pf = self.sys().join("bus/pci/devices").join(PF);
        let have: u16 = fs::read_to_string(pf.join("sriov_numvfs"))?
            .trim()
            .parse()
            .unwrap();
        if wanted > TOTAL {
            return Err(io::Error::from_raw_os_error(libc::ERANGE));
        }
        if wanted != 0 && have != 0 && wanted != have {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        let (count, delay) = {
            let mut manners = self.manners.lock().unwrap();
            let count = wanted.min(manners.at_most);
            manners.configs = vec![VfConfig::CLEAN; usize::from(count)];
            (count, manners.delay)
        };
        fs::write(pf.join("sriov_numvfs"), format!("{count}\n"))?;
        for index in count..have {
            fs::remove_file(pf.join(format!("virtfn{index}")))?;
            fs::remove_dir_all(self.device(vf_address(index)))?;
        }
        let sys = self.sys();
        let links = move || {
            for index in 0..count {
                let name = vf_address(index).to_string();
                let vf = function(&sys, &name, "0x10ca", 10 + u32::from(index));
                make(&vf.join("driver_override"), "(null)\n");
                make(&vf.join("reset"), "");
                link(&vf, &pf.join(format!("virtfn{index}")));
                link(&pf, &vf.join("physfn"));
            }
        };
        match delay {
            None => links(),
            Some(delay) => {
                thread::spawn(move || {
                    thread::sleep(delay);
                    links();
                });
            }
        }
        Ok(())
    }

    fn probe(&self, address: PciAddress) -> io::Result<()> {
        let vfio = self.manners.lock().unwrap().vfio;
        if self.read(address, "driver_override") != VFIO_PCI || !vfio {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.bind(address, VFIO_PCI);
        let group = fs::read_link(self.device(address).join("iommu_group"))?;
        let name = group.file_name().unwrap();
        make(&self.folder.path().join("dev/vfio").join(name), "");
        Ok(())
    }
}

impl Attributes for Emulated {
    fn put(&self, path: &Path, text: &str) -> io::Result<()> {
        let root = self.folder.path();
        let below = path.strip_prefix(root).unwrap();
        let below = below.strip_prefix("sys").or(below.strip_prefix("proc"));
        let name = format!("/{}", below.unwrap().display());
        let entry = (name, text.to_owned());
        self.manners.lock().unwrap().writes.push(entry);
        match path.file_name().unwrap().to_str().unwrap() {
            "sriov_numvfs" => self.set_num_vfs(text.parse().unwrap()),
            "drivers_probe" => self.probe(text.parse().unwrap()),
            "unbind" => fs::remove_file(self.device(text.parse().unwrap()).join("driver")),
            "driver_override" if text.trim().is_empty() => Files.put(path, "(null)\n"),
            _ => Files.put(path, text),
        }
    }
}

impl Netlink for Emulated {
    fn net_use(&self) -> Result<NetUse, KernelError> {
        let mac = Some(MacAddr([0x52, 0x54, 0, 0, 1, 1]));
        Ok(NetUse {
            links: vec![Link {
                index: 2,
                name: "enp1s0".to_owned(),
                up: self.manners.lock().unwrap().up,
                mac,
                permanent_mac: mac,
                ..Link::default()
            }],
            ..NetUse::default()
        })
    }

    fn vf(&self, interface: &str, index: u16) -> Result<VfConfig, KernelError> {
        let configs = &self.manners.lock().unwrap().configs;
        let config = configs.get(usize::from(index)).copied();
        config.ok_or_else(|| KernelError::NoSuchVf {
            interface: interface.to_owned(),
            index,
        })
    }

    fn set_vf(&self, _: &str, index: u16, setting: VfSetting) -> Result<(), KernelError> {
        let mut manners = self.manners.lock().unwrap();
        let order = format!("{} {}", setting.name(), setting.value());
        manners.orders.push(order);
        let ignore = manners.ignore_trust;
        let config = &mut manners.configs[usize::from(index)];
        match setting {
            VfSetting::Mac(mac) => config.mac = mac,
            VfSetting::Vlan(tag) => config.vlan = tag,
            VfSetting::SpoofCheck(on) => config.spoof_check = on,
            VfSetting::Trust(_) if ignore => {}
            VfSetting::Trust(on) => config.trust = on,
            VfSetting::LinkState(state) => config.link_state = state,
            VfSetting::Rate(rate) => config.rate = rate,
        }
        Ok(())
    }

    fn eswitch(&self, _: PciAddress) -> Result<Option<Eswitch>, KernelError> {
        Ok(None)
    }

    fn is_up(&self, _: &str) -> Result<bool, KernelError> {
        Ok(self.manners.lock().unwrap().up)
    }

    fn set_up(&self, _: &str) -> Result<(), KernelError> {
        let mut manners = self.manners.lock().unwrap();
        manners.up = true;
        manners.orders.push("up".to_owned());
        Ok(())
    }
}

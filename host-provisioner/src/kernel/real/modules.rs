//! The running kernel's modules, by sysfs; loading by the host's kmod.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::RealKernel;
use crate::kernel::helper::Apart;
use crate::kernel::modules::{
    KmodError, ModuleFacts, ModuleName, ModuleState, Modules, SUBCOMMAND, load_arguments, named,
};
use crate::kernel::netlink::NetUse;
use crate::kernel::{KernelError, host_use, sysfs};

/// Longest that a module's start is waited for: it may bring up several cards, firmware included.
const LOAD: Duration = Duration::from_secs(120);
/// Reading a module's file.
const LOOK: Duration = Duration::from_secs(20);

/// What is said when there is no process of one's own outside of the pod.
const NO_HELPERS: &str = "this agent runs without helpers";

impl Modules for RealKernel {
    fn module(&self, name: &ModuleName) -> Result<ModuleFacts, KernelError> {
        let folder = self.roots.sys.join("module").join(name.as_str());
        let state = state(&folder)?;
        if matches!(state, ModuleState::Absent | ModuleState::Changing) {
            return Ok(ModuleFacts {
                state,
                ..ModuleFacts::default()
            });
        }
        let mut facts = ModuleFacts {
            state,
            parameters: parameters(&folder.join("parameters"))?,
            ..ModuleFacts::default()
        };
        references(&folder, &mut facts.users)?;
        let usage = self.netlink.net_use()?;
        for driver in sysfs::names(&folder.join("drivers"))? {
            self.devices_of(&folder.join("drivers").join(driver), &usage, &mut facts)?;
        }
        Ok(facts)
    }

    fn parameters(&self, name: &ModuleName) -> Result<BTreeSet<String>, KmodError> {
        let args = ["-0", "-F", "parm", name.as_str()].map(OsString::from);
        Ok(named(&self.kmod("modinfo", name, &args, LOOK)?))
    }

    fn built_in(&self, name: &ModuleName) -> Result<bool, KmodError> {
        let args = ["-F", "filename", name.as_str()].map(OsString::from);
        Ok(self.kmod("modinfo", name, &args, LOOK)?.trim() == "(builtin)")
    }

    fn load(
        &self,
        name: &ModuleName,
        parameters: &BTreeMap<String, String>,
    ) -> Result<(), KmodError> {
        self.kmod("modprobe", name, &load_arguments(name, parameters), LOAD)
            .map(drop)
    }

    fn unload(&self, name: &ModuleName) -> Result<(), KmodError> {
        let args = ["-r", name.as_str()].map(OsString::from);
        self.kmod("modprobe", name, &args, LOAD).map(drop)
    }
}

impl RealKernel {
    /// Runs a program of the host's kmod; what it said.
    fn kmod(
        &self,
        program: &'static str,
        name: &ModuleName,
        args: &[OsString],
        limit: Duration,
    ) -> Result<String, KmodError> {
        let failed = |words: String| KmodError::Failed { program, words };
        let Some(helpers) = &self.helpers else {
            return Err(failed(NO_HELPERS.to_owned()));
        };
        let host = self.roots.proc.join("1/root");
        let mut all: Vec<&OsStr> = vec![SUBCOMMAND.as_ref(), host.as_ref(), program.as_ref()];
        all.extend(args.iter().map(OsString::as_os_str));
        match helpers.apart(&format!("module-{name}"), &all, limit) {
            Ok((status, said)) if status.success() => Ok(said),
            Ok((status, said)) if said.trim().is_empty() => Err(failed(status.to_string())),
            Ok((_, said)) => Err(failed(said.trim().to_owned())),
            Err(Apart::Stuck(stuck)) => Err(KmodError::Stuck { program, stuck }),
            Err(Apart::Helper(words)) => Err(failed(words)),
            Err(Apart::Kernel(error)) => Err(failed(error.to_string())),
        }
    }

    /// Adds the devices that a driver of the module has.
    fn devices_of(
        &self,
        driver: &Path,
        usage: &NetUse,
        facts: &mut ModuleFacts,
    ) -> Result<(), KernelError> {
        for name in sysfs::names(driver)? {
            let device = driver.join(&name);
            // Beside the devices a driver has files, and a link to its module.
            if name == "module" || !device.is_dir() {
                continue;
            }
            if let Ok(address) = name.parse() {
                facts.functions.insert(address);
            }
            if let Some(words) = device_use(&device, usage)? {
                facts.users.push(format!("{name} ({words})"));
            }
        }
        Ok(())
    }
}

fn state(folder: &Path) -> Result<ModuleState, KernelError> {
    if !sysfs::exists(folder)? {
        return Ok(ModuleState::Absent);
    }
    // Built-in modules have a folder for their parameters, and no state.
    Ok(
        match sysfs::read_if_there(&folder.join("initstate"))?.as_deref() {
            None => ModuleState::BuiltIn,
            Some("live") => ModuleState::Live,
            Some(_) => ModuleState::Changing,
        },
    )
}

/// The parameters that may be read; some may only be written.
fn parameters(folder: &Path) -> Result<BTreeMap<String, String>, KernelError> {
    let mut found = BTreeMap::new();
    for name in sysfs::names(folder)? {
        let path = folder.join(&name);
        match fs::read_to_string(&path) {
            Ok(text) => {
                found.insert(name, text.trim().to_owned());
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
            Err(e) => return Err(KernelError::file("read", &path, e)),
        }
    }
    Ok(found)
}

/// Modules that need this one, and other references.
fn references(folder: &Path, users: &mut Vec<String>) -> Result<(), KernelError> {
    let holders = sysfs::names(&folder.join("holders"))?;
    let count = sysfs::read_if_there(&folder.join("refcnt"))?;
    let count = count.and_then(|text| text.parse::<i64>().ok()).unwrap_or(0);
    let others = count - i64::try_from(holders.len()).unwrap_or(i64::MAX);
    users.extend(holders.iter().map(|name| format!("module {name}")));
    if others > 0 {
        users.push(format!("{others} references"));
    }
    Ok(())
}

/// What a device is used for, in words; `None` for a network function that is down and has no
/// VFs. Of other kinds nothing is known, so they count as used.
fn device_use(device: &Path, usage: &NetUse) -> Result<Option<String>, KernelError> {
    let vfs = sysfs::read_if_there(&device.join("sriov_numvfs"))?;
    if let Some(count) = vfs.filter(|count| count != "0") {
        return Ok(Some(format!("it has {count} VFs")));
    }
    let interfaces = sysfs::names(&device.join("net"))?;
    if interfaces.is_empty() {
        return Ok(Some("a device of it".to_owned()));
    }
    for interface in interfaces {
        if let Some(words) = host_use::reason(usage, &interface) {
            return Ok(Some(format!("the host's own traffic: {words}")));
        }
        let link = usage.links.iter().find(|link| link.name == interface);
        if link.is_none_or(|link| link.up) {
            return Ok(Some(format!("{interface} is up")));
        }
    }
    Ok(None)
}

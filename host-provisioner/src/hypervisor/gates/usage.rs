//! Reads what the memory decision needs: QEMU's own memory, the limits of the cgroups above it,
//! what the node has left. Decides nothing (`memory::check` does).

use std::io;
use std::path::Path;

use super::GateError;
use super::cgroup::CgroupGate;
use super::host::read;
use crate::hypervisor::GuestMemory;
use crate::hypervisor::launcher::QemuProcess;
use crate::hypervisor::memory::{self, MemoryCgroup, MemoryFacts};

/// Where to read.
#[derive(Debug)]
pub struct Usage<'a> {
    pub proc: &'a Path,
    pub cgroup: &'a CgroupGate,
}

impl Usage<'_> {
    pub fn facts(
        &self,
        qemu: &QemuProcess,
        guest: GuestMemory,
        vfio_devices: u32,
    ) -> Result<MemoryFacts, GateError> {
        let status = read(&self.proc.join(qemu.pid.to_string()).join("status"))?;
        let path = self.proc.join("meminfo");
        let node_available =
            memory::kib_field(&read(&path)?, "MemAvailable").ok_or_else(|| GateError::Journal {
                path,
                reason: "it has no MemAvailable".to_owned(),
            })?;
        let mut cgroups = Vec::new();
        for cgroup in qemu.cgroup.ancestors().filter(|a| a.is_absolute()) {
            cgroups.extend(self.cgroup_memory(cgroup)?);
        }
        Ok(MemoryFacts {
            guest,
            process: memory::parse_status(&status),
            cgroups,
            node_available,
            vfio_devices,
        })
    }

    fn cgroup_memory(&self, cgroup: &Path) -> Result<Option<MemoryCgroup>, GateError> {
        let folder = self.cgroup.path(cgroup);
        let file = |name: &str| match std::fs::read_to_string(folder.join(name)) {
            Ok(text) => Ok(Some(text)),
            // The root, and where the memory controller is not on, there is no limit.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(GateError::io("read", folder.join(name), e)),
        };
        let (Some(max), Some(current)) = (file("memory.max")?, file("memory.current")?) else {
            return Ok(None);
        };
        let stat = file("memory.stat")?.unwrap_or_default();
        let droppable = ["inactive_file", "active_file"]
            .iter()
            .filter_map(|name| memory::stat_field(&stat, name))
            .fold(0, u64::saturating_add);
        let number = |name: &str, text: &str| {
            text.trim().parse::<u64>().map_err(|e| GateError::Journal {
                path: folder.join(name),
                reason: e.to_string(),
            })
        };
        let limit = match max.trim() {
            "max" => None,
            text => Some(number("memory.max", text)?),
        };
        Ok(Some(MemoryCgroup {
            path: cgroup.display().to_string(),
            limit,
            used: number("memory.current", &current)?,
            droppable,
        }))
    }
}

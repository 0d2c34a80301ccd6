//! On which CPUs a VM may run, by the kernel's word.

use crate::cpus::CpuList;

use super::{LauncherError, Proc, QemuProcess, is_gone, status_field};

impl Proc {
    /// The CPUs on which the VM's vCPUs may run, all of them together. QEMU's other threads may
    /// be pinned elsewhere; where its threads have no names, the process's own count.
    ///
    /// # Errors
    /// [`LauncherError::Gone`] when the process has ended; what cannot be read or understood.
    pub fn vm_cpus(&self, process: &QemuProcess) -> Result<CpuList, LauncherError> {
        let pid = process.pid;
        let mut cpus = CpuList::default();
        let threads = match self.numbers(&self.file(pid, "task")) {
            Err(LauncherError::Io { source, .. }) if is_gone(&source) => Vec::new(),
            threads => threads?,
        };
        for thread in threads {
            match self.vcpu(pid, thread) {
                Ok(allowed) => cpus.extend(allowed.unwrap_or_default()),
                // A vCPU that was taken out of the VM since the folder was read.
                Err(LauncherError::Io { source, .. }) if is_gone(&source) => {}
                Err(error) => return Err(error),
            }
        }
        if !self.is_alive(pid, process.start_time)? {
            return Err(LauncherError::Gone { pid });
        }
        if cpus.is_empty() {
            cpus = self.allowed(pid, "status")?;
        }
        Ok(cpus)
    }

    /// Where this thread may run; `None` when it is no vCPU's.
    fn vcpu(&self, pid: u32, thread: u32) -> Result<Option<CpuList>, LauncherError> {
        let name = self.read(pid, &format!("task/{thread}/comm"))?;
        if !is_vcpu(&name) {
            return Ok(None);
        }
        self.allowed(pid, &format!("task/{thread}/status"))
            .map(Some)
    }

    fn allowed(&self, pid: u32, file: &str) -> Result<CpuList, LauncherError> {
        let status = self.read(pid, file)?;
        let list = status_field(&status, "Cpus_allowed_list").unwrap_or_default();
        list.parse().map_err(|reason| LauncherError::Malformed {
            path: self.file(pid, file),
            reason: format!("Cpus_allowed_list: {reason}"),
        })
    }
}

/// QEMU names a vCPU's thread `CPU <number>/<accelerator>` (accel/kvm/kvm-accel-ops.c), where
/// threads have names; libvirt always has them named.
pub(in crate::hypervisor) fn is_vcpu(comm: &str) -> bool {
    let number = comm
        .strip_prefix("CPU ")
        .and_then(|rest| rest.split_once('/'));
    number
        .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;

    const POD: &str = "0a1b2c3d-1111-2222-3333-444455556666";

    /// A QEMU that may run on CPUs 0 to 15, with these threads.
    fn qemu(threads: &[(u32, &str, &str)]) -> (tempfile::TempDir, Proc, QemuProcess) {
        let dir = tempfile::tempdir().unwrap();
        fixture::qemu(dir.path(), 12, POD, &[]);
        fixture::may_run_on(dir.path(), 12, "0-15");
        for (thread, comm, cpus) in threads {
            fixture::thread(dir.path(), 12, *thread, comm, cpus);
        }
        let proc_ = Proc::new(dir.path());
        let process = proc_.find_qemu(POD).unwrap();
        (dir, proc_, process)
    }

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    #[test]
    fn a_vm_runs_where_its_vcpus_may() {
        let (_dir, proc_, process) = qemu(&[
            (12, "qemu-system-x86", "0"),
            (13, "IO iothread1", "8"),
            (14, "CPU 0/KVM", "4"),
            (15, "CPU 1/KVM", "5-6"),
        ]);
        let mut expected = list("4");
        expected.extend(list("5-6"));
        assert_eq!(proc_.vm_cpus(&process).unwrap(), expected);
    }

    #[test]
    fn without_names_the_process_counts() {
        for threads in [&[][..], &[(12, "qemu-system-x86", "3")][..]] {
            let (_dir, proc_, process) = qemu(threads);
            assert_eq!(proc_.vm_cpus(&process).unwrap(), list("0-15"));
        }
    }

    #[test]
    fn another_process_of_that_number_says_nothing() {
        let (_dir, proc_, mut process) = qemu(&[(14, "CPU 0/KVM", "4")]);
        process.start_time += 1;
        let gone = proc_.vm_cpus(&process);
        assert!(
            matches!(gone, Err(LauncherError::Gone { pid: 12 })),
            "{gone:?}"
        );
    }

    #[test]
    fn what_cannot_be_understood_is_an_error() {
        let (_dir, proc_, process) = qemu(&[(14, "CPU 0/KVM", "4-x")]);
        let error = proc_.vm_cpus(&process).unwrap_err().to_string();
        assert!(
            error.contains("task/14/status") && error.contains("4-x"),
            "{error}"
        );
    }

    #[test]
    fn a_vcpu_is_known_by_its_name() {
        assert!(is_vcpu("CPU 0/KVM\n") && is_vcpu("CPU 12/TCG\n"));
        for other in [
            "qemu-system-x86\n",
            "CPU /KVM",
            "CPU 0",
            "CPU x/KVM",
            "vnc_worker",
        ] {
            assert!(!is_vcpu(other), "{other:?}");
        }
    }

    #[test]
    fn this_process_may_run_somewhere() {
        let proc_ = Proc::new("/proc");
        let me = proc_.process("x", std::process::id()).unwrap();
        assert!(!proc_.vm_cpus(&me).unwrap().is_empty());
    }
}

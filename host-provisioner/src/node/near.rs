//! The NUMA nodes on which a claim's VM runs: what is near it. Asks, never changes, and never
//! fails: it is a preference, and what is not known prefers nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::cpus::nodes_of;
use crate::hypervisor::launcher::{LauncherError, Proc, QemuProcess};
use crate::kernel::Kernel;

/// The NUMA nodes of the VM whose QEMU this is; none where that is not known, or cannot matter
/// because the PFs, which are on the nodes `of_pfs`, are all equally far.
pub async fn nodes(
    proc: &Proc,
    kernel: &Arc<dyn Kernel>,
    process: Option<&QemuProcess>,
    of_pfs: impl Iterator<Item = Option<u16>>,
) -> BTreeSet<u16> {
    let of_pfs: BTreeSet<Option<u16>> = of_pfs.collect();
    let Some(process) = process.filter(|_| of_pfs.len() > 1).cloned() else {
        return BTreeSet::new();
    };
    let (proc, kernel) = (proc.clone(), Arc::clone(kernel));
    let pid = process.pid;
    let looked = tokio::task::spawn_blocking(move || {
        let cpus = proc.vm_cpus(&process).map_err(Unknown::Vm)?;
        let nodes = kernel.numa_nodes();
        let nodes = nodes.map_err(|error| Unknown::Other(error.to_string()))?;
        Ok(nodes_of(&cpus, &nodes))
    });
    let unknown = match looked.await {
        Ok(Ok(near)) => return near,
        // Its claim finds out by itself.
        Ok(Err(Unknown::Vm(LauncherError::Gone { .. }))) => return BTreeSet::new(),
        Ok(Err(Unknown::Vm(error))) => error.to_string(),
        Ok(Err(Unknown::Other(error))) => error,
        Err(error) => error.to_string(),
    };
    tracing::warn!(
        pid,
        error = unknown,
        "where a VM runs is not known; its VF is chosen as if no PF were near to it"
    );
    BTreeSet::new()
}

enum Unknown {
    Vm(LauncherError),
    Other(String),
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::hypervisor::launcher::fixture;
    use crate::kernel::fake::{FakeKernel, igb_pf};
    use crate::node::allocate::{allocate, snapshot};
    use crate::node::test_stage::Stage;

    fn on_two_nodes(kernel: &FakeKernel, zero: &str, one: &str) {
        let nodes = [(0, zero.parse().unwrap()), (1, one.parse().unwrap())];
        kernel.give_cpus(BTreeMap::from(nodes));
    }

    #[tokio::test]
    async fn a_vms_nodes_are_those_of_its_cpus_and_what_is_not_known_prefers_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let fake = FakeKernel::default();
        on_two_nodes(&fake, "0-3", "4-7");
        fixture::qemu(dir.path(), 12, "pod", &[]);
        fixture::may_run_on(dir.path(), 12, "4-7");
        let proc = Proc::new(dir.path());
        let process = proc.find_qemu("pod").unwrap();
        let kernel: Arc<dyn Kernel> = Arc::new(fake.clone());
        let near = async |process: Option<&QemuProcess>, of_pfs: &[Option<u16>]| {
            nodes(&proc, &kernel, process, of_pfs.iter().copied()).await
        };
        let both = [Some(0), Some(1)];
        assert_eq!(near(Some(&process), &both).await, [1].into());
        assert!(near(None, &both).await.is_empty());
        // Where no PF is nearer than another nobody is asked, and an error is as good as unknown.
        fake.fail_next("numa_nodes", libc::EIO);
        assert!(near(Some(&process), &[Some(1), Some(1)]).await.is_empty());
        assert!(near(Some(&process), &both).await.is_empty());
        assert_eq!(near(Some(&process), &[None, Some(1)]).await, [1].into());
        let mut ended = process.clone();
        ended.start_time += 1;
        assert!(near(Some(&ended), &both).await.is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_claim_gets_a_vf_on_the_node_of_its_vm() {
        let mut stage = Stage::new().await;
        let second = igb_pf("0000:02:00.0".parse().unwrap());
        stage.kernel.give_numa_node(stage.pf.address, Some(0));
        let far = stage.function.clone();
        let near = stage.add_pf(second.clone()).await;
        stage.kernel.give_numa_node(second.address, Some(1));
        stage.run_vm(&[]);
        fixture::may_run_on(stage.proc(), 12, "4-7");
        let agent = &stage.agent;
        let process = agent.proc.find_qemu("pod").unwrap();
        for (mac, cpus, wanted) in [
            ("02:00:00:00:00:01", ("0-3", "4-7"), &near),
            ("02:00:00:00:00:02", ("4-7", "0-3"), &far),
        ] {
            on_two_nodes(&stage.kernel, cpus.0, cpus.1);
            let claim = stage.claim(mac).await;
            let (snapshots, _) = snapshot(agent).await.unwrap();
            let api = stage.claims();
            let done = allocate(agent, &api, &claim, Some(&process), &snapshots).await;
            let device = done.unwrap().unwrap().status.unwrap().device.unwrap();
            assert_eq!(device.physical_function, *wanted);
        }
    }
}

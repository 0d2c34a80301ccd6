//! One monitor session for each QEMU process, however many claims work on it: QEMU
//! serves one client of a monitor at a time and keeps the next one waiting.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::agent::Turns;
use crate::hypervisor::launcher::QemuProcess;
use crate::hypervisor::{Hypervisor, HypervisorError, Session};

/// A process of this boot: pids come again, start times do not.
type Key = (u32, u64);

/// The sessions that somebody uses. One that nobody uses any more is closed.
#[derive(Default)]
pub struct Sessions {
    open: Mutex<HashMap<Key, Weak<dyn Session>>>,
    connecting: Turns,
}

impl Sessions {
    /// The session of that process, shared with whoever has it already.
    pub async fn of(
        &self,
        hypervisor: &dyn Hypervisor,
        process: &QemuProcess,
    ) -> Result<Arc<dyn Session>, HypervisorError> {
        let key = (process.pid, process.start_time);
        let _turn = self.connecting.take(&format!("{key:?}")).await;
        if let Some(session) = self.lock().get(&key).and_then(Weak::upgrade) {
            return Ok(session);
        }
        let session = hypervisor.connect(process).await?;
        let mut open = self.lock();
        open.retain(|_, session| session.strong_count() > 0);
        open.insert(key, Arc::downgrade(&session));
        Ok(session)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Weak<dyn Session>>> {
        // The map is whole even if an insertion panicked.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use async_trait::async_trait;
    use common::pci::PciAddress;
    use tokio::sync::broadcast;

    use super::*;
    use crate::hypervisor::root::ContainerRoot;
    use crate::hypervisor::{Event, GuestView, Machine, Plugged, Unplug};

    /// A monitor that serves one client: a second connection fails.
    #[derive(Default)]
    struct Single {
        connected: AtomicUsize,
        clients: Arc<AtomicUsize>,
    }

    struct Client(Arc<AtomicUsize>);

    impl Drop for Client {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn unused<T>() -> Result<T, HypervisorError> {
        Err(HypervisorError::Lost {
            command: "none".into(),
            reason: "not a real one".into(),
        })
    }

    #[async_trait]
    impl Session for Client {
        async fn machine(&self) -> Result<Machine, HypervisorError> {
            unused()
        }
        async fn device_add(
            &self,
            _: &str,
            _: PciAddress,
            _: &str,
            _: Duration,
        ) -> Result<(), HypervisorError> {
            unused()
        }
        async fn device_del(&self, _: &str, _: Duration) -> Result<Unplug, HypervisorError> {
            unused()
        }
        async fn guest_view(&self, _: &str) -> Result<GuestView, HypervisorError> {
            unused()
        }
        async fn host(&self, _: &str) -> Result<Option<PciAddress>, HypervisorError> {
            unused()
        }
        async fn plugged(&self, _: &str) -> Result<Option<Plugged>, HypervisorError> {
            unused()
        }
        async fn events(&self) -> Result<broadcast::Receiver<Event>, HypervisorError> {
            unused()
        }
    }

    #[async_trait]
    impl Hypervisor for Single {
        async fn connect(&self, _: &QemuProcess) -> Result<Arc<dyn Session>, HypervisorError> {
            // Whoever else wants to connect gets the chance to.
            tokio::task::yield_now().await;
            if self.clients.fetch_add(1, Ordering::SeqCst) > 0 {
                return unused();
            }
            self.connected.fetch_add(1, Ordering::SeqCst);
            Ok(Arc::new(Client(Arc::clone(&self.clients))))
        }
    }

    fn process() -> QemuProcess {
        QemuProcess {
            pod_uid: "a".into(),
            pid: 7,
            start_time: 1,
            cgroup: "/".into(),
            uid: 107,
            gid: 107,
            cap_eff: 0,
            user_ns_is_init: true,
            root: Arc::new(ContainerRoot::open(Path::new("/")).unwrap()),
        }
    }

    #[tokio::test]
    async fn claims_at_once_share_a_session_and_the_last_one_closes_it() {
        let (sessions, monitor) = (Sessions::default(), Single::default());
        let process = process();
        let all = (0..8).map(|_| sessions.of(&monitor, &process));
        let all = futures::future::try_join_all(all).await.unwrap();
        assert_eq!(monitor.connected.load(Ordering::SeqCst), 1);
        drop(all);
        assert_eq!(monitor.clients.load(Ordering::SeqCst), 0);
        sessions.of(&monitor, &process).await.unwrap();
        assert_eq!(monitor.connected.load(Ordering::SeqCst), 2);
    }
}

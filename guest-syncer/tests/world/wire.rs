//! The wire between the syncer and an API server, which a test can cut.

use std::sync::{Arc, Mutex};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A TCP relay; while it is cut, nothing listens and nothing flows.
pub struct Wire {
    target: String,
    port: u16,
    open: Mutex<Option<tokio::task::JoinHandle<()>>>,
    frozen: watch::Sender<()>,
}

impl Wire {
    pub async fn to(url: &str) -> Self {
        let target = url.trim_start_matches("https://").to_owned();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let wire = Self {
            target,
            port,
            open: Mutex::new(None),
            frozen: watch::Sender::new(()),
        };
        wire.serve(listener);
        wire
    }

    fn serve(&self, listener: TcpListener) {
        let target = Arc::new(self.target.clone());
        let frozen = self.frozen.clone();
        let task = tokio::spawn(async move {
            // Dropped with this task, and each connection with it.
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let (target, mut frozen) = (target.clone(), frozen.subscribe());
                connections.spawn(async move {
                    let mut far = TcpStream::connect(target.as_str()).await?;
                    tokio::select! {
                        done = copy_bidirectional(&mut near, &mut far) => done,
                        // Both ends stay open until the wire is cut.
                        _ = frozen.changed() => std::future::pending().await,
                    }
                });
            }
        });
        *self.open.lock().unwrap() = Some(task);
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Silences all connections without closing them; new ones are served.
    pub fn freeze(&self) {
        self.frozen.send_replace(());
    }

    /// Cuts all connections and refuses new ones.
    pub async fn cut(&self) {
        let task = self.open.lock().unwrap().take().unwrap();
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
    }

    pub async fn mend(&self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).await.unwrap();
        self.serve(listener);
    }
}

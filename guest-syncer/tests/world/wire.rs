//! The wire between the syncer and an API server, which a test can cut and make long.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// A TCP relay; while it is cut, nothing listens and nothing flows.
pub struct Wire {
    target: String,
    port: u16,
    open: Mutex<Option<tokio::task::JoinHandle<()>>>,
    frozen: watch::Sender<()>,
    /// How long everything is under way, in each direction.
    delay: watch::Sender<Duration>,
}

/// Carries what comes, in its order, each part as long as the wire is then.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    delay: watch::Receiver<Duration>,
) -> io::Result<()> {
    let (parts, mut under_way) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let read = async move {
        let mut part = vec![0; 16 << 10];
        loop {
            let n = from.read(&mut part).await?;
            let due = Instant::now() + *delay.borrow();
            if n == 0 || parts.send((due, part[..n].to_vec())).is_err() {
                return Ok::<(), io::Error>(());
            }
        }
    };
    let write = async move {
        while let Some((due, part)) = under_way.recv().await {
            tokio::time::sleep_until(due).await;
            to.write_all(&part).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(read, write).map(drop)
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
            delay: watch::Sender::new(Duration::ZERO),
        };
        wire.serve(listener);
        wire
    }

    fn serve(&self, listener: TcpListener) {
        let target = Arc::new(self.target.clone());
        let (frozen, delay) = (self.frozen.clone(), self.delay.clone());
        let task = tokio::spawn(async move {
            // Dropped with this task, and each connection with it.
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let (target, mut frozen) = (target.clone(), frozen.subscribe());
                let (there, back) = (delay.subscribe(), delay.subscribe());
                connections.spawn(async move {
                    let far = TcpStream::connect(target.as_str()).await?;
                    let (near, far) = (near.into_split(), far.into_split());
                    let both = async {
                        tokio::try_join!(carry(near.0, far.1, there), carry(far.0, near.1, back))
                    };
                    tokio::select! {
                        done = both => done.map(drop),
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

    /// Makes the wire so long, for what is sent from now on: a way there and back takes twice that.
    pub fn lengthen(&self, delay: Duration) {
        self.delay.send_replace(delay);
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

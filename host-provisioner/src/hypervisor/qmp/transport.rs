//! One QMP connection over a unix stream. Knows nothing of what the commands mean.
//!
//! A task of its own holds the socket and carries out one command after the other, whatever
//! becomes of the caller: a caller that stops waiting leaves its answer to be read and thrown
//! away by the task, so that the next command gets its own. Events go to a broadcast channel as
//! they are, known or not. QEMU runs inside a tenant's pod: nothing it sends may make us panic
//! or grow without bound.

use std::io;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::timeout;

use super::super::{Event, HypervisorError};

/// A greeting comes at once, or never: a monitor that serves another client does not greet.
const GREETING_TIME: Duration = Duration::from_secs(10);
/// The longest line read: query-pci of a machine with hundreds of devices is under 1 MiB.
const LONGEST_LINE: usize = 16 << 20;
const EVENT_BACKLOG: usize = 256;
const COMMAND_BACKLOG: usize = 32;

type Answer = Result<Value, HypervisorError>;

struct Request {
    name: String,
    arguments: Value,
    reply: oneshot::Sender<Answer>,
}

/// A live connection; dropping it closes the socket.
#[derive(Debug)]
pub struct Connection {
    requests: mpsc::Sender<Request>,
    events: broadcast::WeakSender<Event>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Connection {
    /// Greets and negotiates on a fresh stream.
    pub async fn start<S>(stream: S) -> io::Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let weak = events.downgrade();
        let mut wire = Wire {
            stream,
            lines: Lines::default(),
            events,
            next_id: 0,
        };
        timeout(GREETING_TIME, wire.greet()).await.map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                "it does not greet; another program may be using this monitor",
            )
        })??;
        let (requests, queue) = mpsc::channel(COMMAND_BACKLOG);
        let task = tokio::spawn(wire.serve(queue));
        Ok(Self {
            requests,
            events: weak,
            task,
        })
    }

    /// False once the socket is lost; the connection is of no more use then.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.task.is_finished() && !self.requests.is_closed()
    }

    /// Events from now on; `None` when the connection is lost.
    #[must_use]
    pub fn events(&self) -> Option<broadcast::Receiver<Event>> {
        self.events.upgrade().map(|sender| sender.subscribe())
    }

    /// Carries out a command and waits for its answer for at most `limit`.
    ///
    /// A command whose caller has gone before its turn is never sent.
    pub async fn execute(&self, name: &str, arguments: Value, limit: Duration) -> Answer {
        let (reply, answer) = oneshot::channel();
        let request = Request {
            name: name.to_owned(),
            arguments,
            reply,
        };
        let lost = |reason: &str| HypervisorError::Lost {
            command: name.to_owned(),
            reason: reason.to_owned(),
        };
        let exchange = async {
            if self.requests.send(request).await.is_err() {
                return Err(lost("it was closed before the command was sent"));
            }
            answer.await.unwrap_or_else(|_| Err(lost("it was closed")))
        };
        timeout(limit, exchange).await.unwrap_or_else(|_| {
            Err(HypervisorError::TimedOut {
                command: name.to_owned(),
                seconds: limit.as_secs(),
            })
        })
    }
}

struct Wire<S> {
    stream: S,
    lines: Lines,
    events: broadcast::Sender<Event>,
    next_id: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    async fn greet(&mut self) -> io::Result<()> {
        let greeting = self.message().await?;
        if greeting.get("QMP").is_none() {
            return Err(invalid("it does not greet as QMP does"));
        }
        match self.exchange("qmp_capabilities", json!({})).await? {
            Ok(_) => Ok(()),
            Err(e) => Err(invalid(&e.to_string())),
        }
    }

    async fn serve(mut self, mut queue: mpsc::Receiver<Request>) {
        loop {
            tokio::select! {
                request = queue.recv() => {
                    let Some(request) = request else { return };
                    if request.reply.is_closed() {
                        continue;
                    }
                    let outcome = self.exchange(&request.name, request.arguments).await;
                    let ended = outcome.is_err();
                    let answer = outcome.unwrap_or_else(|e| Err(HypervisorError::Lost {
                        command: request.name,
                        reason: e.to_string(),
                    }));
                    // The caller may have stopped waiting meanwhile: its answer is nobody's.
                    drop(request.reply.send(answer));
                    if ended {
                        return;
                    }
                }
                message = Self::read(&mut self.stream, &mut self.lines) => match message {
                    Ok(message) => self.unasked(message),
                    Err(e) => {
                        tracing::debug!(error = %e, "QMP connection ended");
                        return;
                    }
                }
            }
        }
    }

    /// Sends one command and reads until its answer has come.
    async fn exchange(&mut self, name: &str, arguments: Value) -> io::Result<Answer> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({"execute": name, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes()).await?;
        self.stream.flush().await?;
        loop {
            let mut message = self.message().await?;
            let is_answer = message.get("return").is_some() || message.get("error").is_some();
            // QEMU echoes no id when it could not parse the command.
            let is_ours = message.get("id").is_none_or(|got| *got == json!(id));
            if !(is_answer && is_ours) {
                self.unasked(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(Ok(value.take()));
            } else {
                return Ok(Err(refusal(name, &message)));
            }
        }
    }

    fn unasked(&self, mut message: Value) {
        match message.get("event").and_then(Value::as_str) {
            Some(name) => {
                let event = Event {
                    name: name.to_owned(),
                    data: message.get_mut("data").map_or(Value::Null, Value::take),
                };
                // An error means that nobody listens now.
                drop(self.events.send(event));
            }
            None => tracing::warn!("QEMU sent something that is neither an answer nor an event"),
        }
    }

    async fn message(&mut self) -> io::Result<Value> {
        Self::read(&mut self.stream, &mut self.lines).await
    }

    async fn read(stream: &mut S, lines: &mut Lines) -> io::Result<Value> {
        let line = lines.next(stream).await?;
        serde_json::from_slice(&line).map_err(|e| invalid(&format!("it sent no JSON: {e}")))
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_owned())
}

fn refusal(command: &str, message: &Value) -> HypervisorError {
    let text = |field: &str| {
        message
            .pointer(&format!("/error/{field}"))
            .and_then(Value::as_str)
            .unwrap_or("(nothing)")
            .to_owned()
    };
    HypervisorError::Refused {
        command: command.to_owned(),
        class: text("class"),
        description: text("desc"),
    }
}

/// Cuts a stream into lines. What was read stays here when a read is cancelled.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
    searched: usize,
}

impl Lines {
    async fn next(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
        loop {
            let fresh = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(at) = fresh.iter().position(|b| *b == b'\n') {
                let rest = self.buffer.split_off(self.searched + at + 1);
                self.searched = 0;
                return Ok(std::mem::replace(&mut self.buffer, rest));
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > LONGEST_LINE {
                return Err(invalid("it sent a line of more than 16 MiB"));
            }
            if stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader, DuplexStream, duplex, split};

    const LONG: Duration = Duration::from_secs(20);

    struct Peer {
        read: BufReader<tokio::io::ReadHalf<DuplexStream>>,
        write: tokio::io::WriteHalf<DuplexStream>,
    }

    impl Peer {
        async fn say(&mut self, message: Value) {
            let line = format!("{message}\r\n");
            self.write.write_all(line.as_bytes()).await.unwrap();
        }

        async fn hear(&mut self) -> Value {
            let mut line = String::new();
            self.read.read_line(&mut line).await.unwrap();
            serde_json::from_str(&line).unwrap()
        }
    }

    async fn connected() -> (Connection, Peer) {
        let (ours, theirs) = duplex(1 << 16);
        let (read, write) = split(theirs);
        let mut peer = Peer {
            read: BufReader::new(read),
            write,
        };
        let greeted = tokio::spawn(Connection::start(ours));
        peer.say(json!({"QMP": {"version": {}, "capabilities": ["oob"]}}))
            .await;
        let asked = peer.hear().await;
        assert_eq!(asked["execute"], "qmp_capabilities");
        peer.say(json!({"return": {}, "id": asked["id"]})).await;
        (greeted.await.unwrap().unwrap(), peer)
    }

    #[tokio::test]
    async fn unknown_events_reach_their_listeners_and_do_no_harm() {
        let (connection, mut peer) = connected().await;
        let mut events = connection.events().unwrap();
        let call = connection.execute("query-status", json!({}), LONG);
        let serve = async {
            let asked = peer.hear().await;
            peer.say(json!({"event": "NEVER_HEARD_OF", "data": {"x": [1]}, "timestamp": 7}))
                .await;
            peer.say(json!({"strange": true})).await;
            peer.say(json!({"return": {"status": "running"}, "id": asked["id"]}))
                .await;
        };
        let (answer, ()) = tokio::join!(call, serve);
        assert_eq!(answer.unwrap()["status"], "running");
        let event = events.recv().await.unwrap();
        assert_eq!(
            (event.name.as_str(), &event.data["x"][0]),
            ("NEVER_HEARD_OF", &json!(1))
        );
    }

    #[tokio::test]
    async fn a_dropped_call_does_not_give_its_answer_to_the_next() {
        let (connection, mut peer) = connected().await;
        let short = Duration::from_millis(20);
        let gone = connection.execute("slow", json!({}), short).await;
        assert!(matches!(gone, Err(HypervisorError::TimedOut { .. })));
        // One that gives up while it waits for its turn is never sent.
        let unsent = connection.execute("unsent", json!({}), short).await;
        assert!(unsent.unwrap_err().outcome_unknown());
        let call = connection.execute("next", json!({"a": 1}), LONG);
        let serve = async {
            let slow = peer.hear().await;
            assert_eq!(slow["execute"], "slow");
            peer.say(json!({"return": "late", "id": slow["id"]})).await;
            let next = peer.hear().await;
            assert_eq!(next["execute"], "next");
            assert_eq!(next["arguments"]["a"], 1);
            peer.say(json!({"return": "mine", "id": next["id"]})).await;
        };
        let (answer, ()) = tokio::join!(call, serve);
        assert_eq!(answer.unwrap(), json!("mine"));
    }

    #[tokio::test]
    async fn a_lost_socket_ends_what_was_pending_and_says_so() {
        let (connection, mut peer) = connected().await;
        let mut events = connection.events().unwrap();
        let call = connection.execute("device_add", json!({}), LONG);
        let serve = async {
            peer.hear().await;
            drop(peer);
        };
        let (answer, ()) = tokio::join!(call, serve);
        assert!(matches!(answer, Err(HypervisorError::Lost { .. })));
        assert!(matches!(
            events.recv().await,
            Err(broadcast::error::RecvError::Closed)
        ));
        let after = connection.execute("x", json!({}), LONG).await;
        assert!(matches!(after, Err(HypervisorError::Lost { .. })));
        assert!(!connection.is_open());
    }

    #[tokio::test]
    async fn a_refusal_keeps_qemus_words() {
        let (connection, mut peer) = connected().await;
        let call = connection.execute("device_del", json!({}), LONG);
        let serve = async {
            let asked = peer.hear().await;
            peer.say(
                json!({"error": {"class": "DeviceNotFound", "desc": "no x"}, "id": asked["id"]}),
            )
            .await;
        };
        let (answer, ()) = tokio::join!(call, serve);
        let e = answer.unwrap_err();
        assert!(e.is_device_not_found() && e.to_string().contains("no x"));
    }

    #[tokio::test]
    async fn an_endless_line_and_no_json_end_the_connection() {
        let (ours, mut theirs) = duplex(1 << 16);
        let flood = tokio::spawn(async move {
            let chunk = vec![b'x'; 1 << 16];
            while theirs.write_all(&chunk).await.is_ok() {}
        });
        assert!(Connection::start(ours).await.is_err());
        flood.await.unwrap();

        let (connection, mut peer) = connected().await;
        peer.write.write_all(b"}{\n").await.unwrap();
        let answer = connection.execute("x", json!({}), LONG).await;
        assert!(matches!(answer, Err(HypervisorError::Lost { .. })));
    }
}

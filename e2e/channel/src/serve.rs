//! Does the work of one request. Starts shells, talks to unix sockets of this machine.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::protocol::{Answer, OUT_OF_TIME, Request, Work};

/// How long a command that ran out of time may take to end by itself.
const LAST: Duration = Duration::from_secs(5);
/// How often the relay looks for a socket that is free again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Does what the request asks; what goes wrong is an answer too.
#[must_use]
pub fn serve(request: &Request, locks: &Path) -> Answer {
    let limit = Duration::from_secs(request.seconds.max(1));
    let done = match &request.work {
        Work::Run { command, stdin } => run(command, stdin, limit),
        Work::Talk { socket, say, until } => talk(Path::new(socket), say, until, limit),
        Work::Relay { sockets, request } => relay(Path::new(sockets), request, limit, locks),
    };
    done.unwrap_or_else(|e| match e.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Answer {
            status: OUT_OF_TIME,
            ..Answer::unable(&e.to_string())
        },
        _ => Answer::unable(&e.to_string()),
    })
}

/// Files in memory, not pipes: a process that the command leaves behind may keep them open.
fn run(command: &str, stdin: &[u8], limit: Duration) -> io::Result<Answer> {
    let mut input = memory("stdin")?;
    input.write_all(stdin)?;
    input.rewind()?;
    let (mut stdout, mut stderr) = (memory("stdout")?, memory("stderr")?);
    let child = Command::new("bash")
        .args(["-c", command])
        .stdin(input)
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .process_group(0)
        .spawn()?;
    let (status, in_time) = wait(child, limit)?;
    let read = |file: &mut File| -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut text)?;
        Ok(text)
    };
    Ok(Answer {
        status: if in_time {
            of_shell(status)
        } else {
            OUT_OF_TIME
        },
        stdout: read(&mut stdout)?,
        stderr: read(&mut stderr)?,
    })
}

fn memory(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?))
}

fn of_shell(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Waits for the child; one that takes too long is told to end, then killed, with its group.
fn wait(mut child: Child, limit: Duration) -> io::Result<(ExitStatus, bool)> {
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let (ended, end) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        for (patience, signal) in [(limit, Signal::SIGTERM), (LAST, Signal::SIGKILL)] {
            if end.recv_timeout(patience) != Err(mpsc::RecvTimeoutError::Timeout) {
                return signal == Signal::SIGTERM;
            }
            // Gone already is what is wanted.
            let _ = killpg(group, signal);
        }
        false
    });
    let status = child.wait();
    drop(ended);
    let in_time = watchdog.join().unwrap_or(false);
    Ok((status?, in_time))
}

fn talk(socket: &Path, say: &str, until: &str, limit: Duration) -> io::Result<Answer> {
    let stream = connect(socket)?;
    let stdout = converse(stream, say, Instant::now() + limit, |line| {
        line.contains(until)
    })?;
    Ok(Answer {
        stdout,
        ..Answer::default()
    })
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(socket)
        .map_err(|e| io::Error::new(e.kind(), format!("connecting to {}: {e}", socket.display())))
}

/// Says `say` and collects what comes until a line is the last.
fn converse(
    stream: UnixStream,
    say: &str,
    deadline: Instant,
    last: impl Fn(&str) -> bool,
) -> io::Result<Vec<u8>> {
    (&stream).write_all(say.as_bytes())?;
    let mut reader = BufReader::new(&stream);
    let mut all = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let from = all.len();
        if reader.read_until(b'\n', &mut all)? == 0 {
            let heard = String::from_utf8_lossy(&all).into_owned();
            let why = format!("the peer hung up; it said {heard:?}");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
        }
        if last(&String::from_utf8_lossy(
            all.get(from..).unwrap_or_default(),
        )) {
            return Ok(all);
        }
    }
}

/// QEMU serves one peer of a socket and lets others wait unheard: a lock says which are in
/// use, to other agents of this machine too.
fn relay(sockets: &Path, request: &str, limit: Duration, locks: &Path) -> io::Result<Answer> {
    let deadline = Instant::now() + limit;
    let id = request.split(' ').next().unwrap_or_default();
    let (stream, _lock) = loop {
        if let Some(free) = free_socket(sockets, locks)? {
            break free;
        }
        if Instant::now() >= deadline {
            let why = format!("no socket of {} was free", sockets.display());
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        std::thread::sleep(LOOK_AGAIN);
    };
    // The first line end closes what a caller that was killed left half-written.
    let said = converse(stream, &format!("\n{request}\n"), deadline, |line| {
        line.split(' ').next() == Some(id)
    })?;
    Ok(Answer {
        stdout: said
            .split_inclusive(|b| *b == b'\n')
            .next_back()
            .unwrap_or_default()
            .to_vec(),
        ..Answer::default()
    })
}

fn free_socket(sockets: &Path, locks: &Path) -> io::Result<Option<(UnixStream, File)>> {
    let list = std::fs::read_dir(sockets)
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", sockets.display())))?;
    let mut paths: Vec<PathBuf> = list
        .map(|e| e.map(|e| e.path()))
        .collect::<io::Result<_>>()?;
    paths.retain(|p| p.extension().is_some_and(|e| e == "sock"));
    paths.sort();
    std::fs::create_dir_all(locks)?;
    for path in paths {
        // Named by device and inode: the folder may be a container's, reached by many paths.
        let meta = path.metadata()?;
        let lock = File::create(locks.join(format!("relay.{}.{}", meta.dev(), meta.ino())))?;
        match lock.try_lock() {
            Ok(()) => return Ok(Some((connect(&path)?, lock))),
            Err(std::fs::TryLockError::WouldBlock) => {}
            Err(std::fs::TryLockError::Error(e)) => return Err(e),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn ask(work: Work, seconds: u64) -> Answer {
        let locks = tempfile::tempdir().unwrap();
        let request = Request {
            id: "a1".into(),
            seconds,
            work,
        };
        serve(&request, locks.path())
    }

    fn sh(command: &str, stdin: &[u8], seconds: u64) -> Answer {
        let work = Work::Run {
            command: command.into(),
            stdin: stdin.into(),
        };
        ask(work, seconds)
    }

    #[test]
    fn a_command_reads_says_and_ends() {
        let a = sh("cat; echo err >&2; exit 3", b"in\0", 10);
        assert_eq!(
            (a.status, a.stdout.as_slice(), a.stderr.as_slice()),
            (3, &b"in\0"[..], &b"err\n"[..])
        );
        assert_eq!(sh("kill -9 $$", b"", 10).status, 137);
    }

    #[test]
    fn what_a_command_leaves_behind_is_not_waited_for() {
        let begun = Instant::now();
        let a = sh("sleep 30 & echo $!", b"", 20);
        assert_eq!(a.status, 0);
        assert!(begun.elapsed() < Duration::from_secs(15));
        let pid: i32 = String::from_utf8(a.stdout).unwrap().trim().parse().unwrap();
        nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }

    #[test]
    fn a_command_that_takes_too_long_is_ended_with_what_it_started() {
        let a = sh("sleep 60 & echo $!; wait", b"", 1);
        assert_eq!(a.status, OUT_OF_TIME);
        let pid: i32 = String::from_utf8(a.stdout).unwrap().trim().parse().unwrap();
        let gone = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Err(_) => true,
            // Nobody may reap orphans where the tests run.
            Ok(stat) => stat.contains(") Z "),
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !gone() {
            assert!(Instant::now() < deadline, "{pid} still runs");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_talk_ends_with_the_line_that_was_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut heard = String::new();
            BufReader::new(stream.try_clone().unwrap())
                .read_line(&mut heard)
                .unwrap();
            stream.write_all(b"hello\nthe answer\nmore\n").unwrap();
            // Stays open: nothing but the line may end the talk.
            (heard, stream)
        });
        let a = ask(
            Work::Talk {
                socket: socket.display().to_string(),
                say: "hi\n".into(),
                until: "answer".into(),
            },
            10,
        );
        assert_eq!(a.status, 0, "{}", String::from_utf8_lossy(&a.stderr));
        assert!(a.stdout.starts_with(b"hello\nthe answer\n"));
        assert_eq!(server.join().unwrap().0, "hi\n");
    }

    #[test]
    fn nobody_there_and_nobody_answering_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s.sock");
        let talk = || Work::Talk {
            socket: socket.display().to_string(),
            say: String::new(),
            until: "x".into(),
        };
        assert_eq!(ask(talk(), 1).status, crate::protocol::UNABLE);
        let _listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(ask(talk(), 1).status, OUT_OF_TIME);
    }

    #[test]
    fn a_relay_takes_a_free_socket_and_brings_the_answer() {
        let dir = tempfile::tempdir().unwrap();
        let locks = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("0.sock")).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for line in lines.map_while(Result::ok).filter(|l| !l.is_empty()) {
                let request = Request::parse(&line).unwrap();
                let answer = Answer::default().line(&request.id);
                stream
                    .write_all(format!("0 1  \n{answer}\n").as_bytes())
                    .unwrap();
            }
        });
        let inner = Request {
            id: "b2".into(),
            seconds: 1,
            work: Work::Run {
                command: "true".into(),
                stdin: Vec::new(),
            },
        };
        let outer = Request {
            id: "a1".into(),
            seconds: 10,
            work: Work::Relay {
                sockets: dir.path().display().to_string(),
                request: inner.line(),
            },
        };
        let a = serve(&outer, locks.path());
        assert_eq!(a.status, 0, "{}", String::from_utf8_lossy(&a.stderr));
        let line = String::from_utf8(a.stdout).unwrap();
        assert_eq!(Answer::parse(&line, "b2"), Ok(Some(Answer::default())));
        server.join().unwrap();
    }
}

//! `channel-agent PORT`: serves the harness's requests on /dev/PORT. Requests of one port
//! are served side by side, so answers may overtake each other.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use channel::port::Lines;
use channel::protocol::Request;
use channel::serve::serve;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

/// Locks lie in this machine's own /run: the sockets' folder may belong to a container.
const LOCKS: &str = "/run/lock/harness-channel";

fn main() -> ExitCode {
    let Some(port) = std::env::args().nth(1) else {
        eprintln!("usage: channel-agent PORT, the name of a virtio-serial port's device");
        return ExitCode::from(2);
    };
    match listen(&Path::new("/dev").join(port)) {
        Ok(never) => match never {},
        Err(e) => {
            eprintln!("channel-agent: {e}");
            ExitCode::FAILURE
        }
    }
}

fn listen(port: &Path) -> io::Result<std::convert::Infallible> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(open(port, flags, Mode::empty())?);
    let out = Arc::new(Mutex::new(file.try_clone()?));
    let mut lines = Lines::new(file)?;
    loop {
        // Half a line of a caller that was killed is passed over.
        let Ok(request) = Request::parse(&lines.read()?) else {
            continue;
        };
        let out = Arc::clone(&out);
        std::thread::Builder::new().spawn(move || {
            let answer = serve(&request, Path::new(LOCKS));
            let line = format!("{}\n", answer.line(&request.id));
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(e) = write(&mut out, line.as_bytes()) {
                eprintln!("channel-agent: answering {}: {e}", request.id);
            }
        })?;
    }
}

/// Writes all of it; the port takes some at a time.
fn write(out: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(
                    std::os::fd::AsFd::as_fd(out),
                    PollFlags::POLLOUT,
                )];
                poll(&mut fds, PollTimeout::NONE)?;
                if fds
                    .first()
                    .and_then(PollFd::revents)
                    .is_some_and(|r| r.contains(PollFlags::POLLHUP))
                {
                    return Err(io::Error::new(io::ErrorKind::BrokenPipe, "nobody listens"));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

//! A virtio-serial port of this machine, read line by line.
//!
//! While no peer holds the other end, the port reads as ended and polls as hung up, both at
//! once and for ever (port_fops_read and port_fops_poll in the kernel's
//! drivers/char/virtio_console.c). The kernel wakes the port's waiters when a peer comes, so
//! an edge-triggered wait sleeps until then.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Lines longer than this are no requests.
const LONGEST: usize = 64 * 1024 * 1024;

/// The reading half.
pub struct Lines {
    file: File,
    wake: Epoll,
    buffer: Vec<u8>,
}

impl Lines {
    /// # Errors
    /// If the port cannot be waited for.
    pub fn new(file: File) -> io::Result<Self> {
        let wake = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLET;
        wake.add(file.as_fd(), EpollEvent::new(edges, 0))?;
        Ok(Self {
            file,
            wake,
            buffer: Vec::new(),
        })
    }

    /// The next line, without its end; waits for as long as it takes.
    ///
    /// # Errors
    /// If reading fails for another reason than that nothing is there.
    pub fn read(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            let mut chunk = [0; 16 * 1024];
            match self.file.read(&mut chunk) {
                // No peer, or nothing of it yet.
                Ok(0) => self.wait()?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait()?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
                Ok(n) => {
                    self.buffer.extend(chunk.iter().take(n));
                    if self.buffer.len() > LONGEST {
                        self.buffer.clear();
                    }
                }
            }
        }
    }

    fn wait(&self) -> io::Result<()> {
        let mut events = [EpollEvent::empty()];
        match self.wake.wait(&mut events, EpollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut lines = Lines::new(File::from(OwnedFd::from(ours))).unwrap();
        let writer = std::thread::spawn(move || {
            for part in ["\na", "b\nc", "d", "\n"] {
                theirs.write_all(part.as_bytes()).unwrap();
            }
            theirs
        });
        let read: Vec<String> = (0..3).map(|_| lines.read().unwrap()).collect();
        assert_eq!(read, ["", "ab", "cd"]);
        drop(writer.join().unwrap());
    }
}

//! Lines of the channel. Pure.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use thiserror::Error;

/// What is to be done in the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Run a shell command as root.
    Run { command: String, stdin: Vec<u8> },
    /// Write `say` to the unix socket and collect lines until one contains `until`.
    Talk {
        socket: String,
        say: String,
        until: String,
    },
    /// Pass `request`, a request's line, on to a machine in this one, over the first socket
    /// of the folder `sockets` that nobody else uses; its answer is the output.
    Relay { sockets: String, request: String },
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Hexadecimal; answers are matched by it.
    pub id: String,
    /// Longest it may take.
    pub seconds: u64,
    pub work: Work,
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Exit status as a shell has it; [`OUT_OF_TIME`] when it took too long, [`UNABLE`] when
    /// it could not be begun.
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// As of timeout(1).
pub const OUT_OF_TIME: i32 = 124;
/// As of a shell that cannot run a command.
pub const UNABLE: i32 = 126;

/// A line that is none of ours: a peer that was killed may leave half of one.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("not a line of the channel: {0:?}")]
pub struct Malformed(String);

impl Request {
    /// Without a line end.
    #[must_use]
    pub fn line(&self) -> String {
        let none: &[u8] = &[];
        let (verb, fields) = match &self.work {
            Work::Run { command, stdin } => ("run", [command.as_bytes(), stdin, none]),
            Work::Talk { socket, say, until } => {
                ("talk", [socket, say, until].map(|w| w.as_bytes()))
            }
            Work::Relay { sockets, request } => {
                ("relay", [sockets.as_bytes(), request.as_bytes(), none])
            }
        };
        let [a, b, c] = fields.map(|w| STANDARD.encode(w));
        format!("{} {} {verb} {a} {b} {c}", self.id, self.seconds)
    }

    /// # Errors
    /// [`Malformed`] for any other line.
    pub fn parse(line: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed(line.chars().take(100).collect());
        let words: Vec<&str> = line.trim_end_matches(['\r', '\n']).split(' ').collect();
        let [id, seconds, verb, a, b, c] = words.as_slice() else {
            return Err(malformed());
        };
        let bytes = |w: &str| STANDARD.decode(w).map_err(|_| malformed());
        let text = |w: &str| String::from_utf8(bytes(w)?).map_err(|_| malformed());
        if id.is_empty() || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(malformed());
        }
        let work = match *verb {
            "run" => Work::Run {
                command: text(a)?,
                stdin: bytes(b)?,
            },
            "talk" => Work::Talk {
                socket: text(a)?,
                say: text(b)?,
                until: text(c)?,
            },
            "relay" => Work::Relay {
                sockets: text(a)?,
                request: text(b)?,
            },
            _ => return Err(malformed()),
        };
        Ok(Self {
            id: (*id).to_owned(),
            seconds: seconds.parse().map_err(|_| malformed())?,
            work,
        })
    }
}

impl Answer {
    /// One that says why nothing was done.
    #[must_use]
    pub fn unable(why: &str) -> Self {
        Self {
            status: UNABLE,
            stdout: Vec::new(),
            stderr: why.as_bytes().to_vec(),
        }
    }

    /// Without a line end.
    #[must_use]
    pub fn line(&self, id: &str) -> String {
        let [out, err] = [&self.stdout, &self.stderr].map(|w| STANDARD.encode(w));
        format!("{id} {} {out} {err}", self.status)
    }

    /// The answer to request `id`; none if the line is about another request, as a caller
    /// that gave up leaves behind.
    ///
    /// # Errors
    /// [`Malformed`] for a line of that id that is no answer.
    pub fn parse(line: &str, id: &str) -> Result<Option<Self>, Malformed> {
        let malformed = || Malformed(line.chars().take(100).collect());
        let mut words = line.trim_end().split(' ');
        if words.next() != Some(id) {
            return Ok(None);
        }
        let mut word = || words.next().unwrap_or_default();
        let status = word().parse().map_err(|_| malformed())?;
        let mut bytes = || STANDARD.decode(word()).map_err(|_| malformed());
        Ok(Some(Self {
            status,
            stdout: bytes()?,
            stderr: bytes()?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(work: Work) -> Request {
        Request {
            id: "a1".into(),
            seconds: 5,
            work,
        }
    }

    #[test]
    fn requests_read_as_they_were_written() {
        for work in [
            Work::Run {
                command: "echo \"ü\"\necho".into(),
                stdin: vec![0, 255, b'\n'],
            },
            Work::Run {
                command: String::new(),
                stdin: Vec::new(),
            },
            Work::Talk {
                socket: "/a b".into(),
                say: "{}\n".into(),
                until: "\"id\": 1".into(),
            },
            Work::Relay {
                sockets: "/run/x".into(),
                request: "b2 1 run  ".into(),
            },
        ] {
            let r = request(work);
            assert!(!r.line().contains('\n'), "{}", r.line());
            assert_eq!(Request::parse(&r.line()), Ok(r));
        }
    }

    #[test]
    fn half_a_line_is_no_request() {
        let whole = request(Work::Run {
            command: "true".into(),
            stdin: Vec::new(),
        })
        .line();
        for n in 0..whole.len() - 1 {
            let half = whole.get(n + 1..).unwrap();
            assert!(
                Request::parse(half).is_err() || half.starts_with("1 5 run"),
                "{half}"
            );
        }
        for line in [
            "",
            "a1 x run   ",
            "a1 5 other   ",
            "zz 5 run   ",
            "a1 5 run ! ",
        ] {
            assert!(Request::parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn answers_are_matched_by_id() {
        let a = Answer {
            status: 3,
            stdout: b"o\n".to_vec(),
            stderr: Vec::new(),
        };
        assert_eq!(Answer::parse(&a.line("a1"), "a1"), Ok(Some(a.clone())));
        assert_eq!(Answer::parse(&a.line("a1"), "a2"), Ok(None));
        assert!(Answer::parse("a1 x", "a1").is_err());
        assert!(Answer::parse("a1 0 ! ", "a1").is_err());
    }
}

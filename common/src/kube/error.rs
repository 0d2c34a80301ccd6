//! What an API error asks of a reconcile. No I/O.

use kube::Error;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// It may pass: try again, with back-off.
    Retry,
    /// Somebody else was quicker, or the object is gone: read again and plan
    /// again; no failure.
    WaitForChange,
    /// Trying again will not help; a person has to change something.
    TellUser,
}

impl ErrorClass {
    /// The word in logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::WaitForChange => "wait_for_change",
            Self::TellUser => "tell_user",
        }
    }
}

fn code(error: &Error) -> Option<u16> {
    match error {
        Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// The class of an error of the API server or of the way to it.
#[must_use]
pub fn class_of(error: &Error) -> ErrorClass {
    match code(error) {
        Some(404 | 409) => ErrorClass::WaitForChange,
        // 403 is told but retried by the resync: an administrator may grant it.
        Some(400 | 403 | 405 | 413 | 415 | 422) => ErrorClass::TellUser,
        _ => ErrorClass::Retry,
    }
}

/// 409: the object changed, was recreated, or exists.
#[must_use]
pub fn is_conflict(error: &Error) -> bool {
    code(error) == Some(409)
}

/// 404: there is no such object (any more).
#[must_use]
pub fn is_gone(error: &Error) -> bool {
    code(error) == Some(404)
}

/// 422: the API server's rules refuse the object.
#[must_use]
pub fn is_invalid(error: &Error) -> bool {
    code(error) == Some(422)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    #[test]
    fn every_answer_has_its_class() {
        let api = |code| {
            let mut status = Status::failure("x", "y");
            status.code = code;
            Error::Api(Box::new(status))
        };
        for (code, class) in [
            (409, ErrorClass::WaitForChange),
            (404, ErrorClass::WaitForChange),
            (422, ErrorClass::TellUser),
            (403, ErrorClass::TellUser),
            (429, ErrorClass::Retry),
            (500, ErrorClass::Retry),
            (401, ErrorClass::Retry),
        ] {
            assert_eq!(class_of(&api(code)), class, "{code}");
        }
        assert_eq!(class_of(&Error::TlsRequired), ErrorClass::Retry);
    }
}

//! What an API error asks of a reconcile. No I/O.

use kube::{Error, Resource};

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

/// 404 in the API server's own words about the very object `name` of kind `K`.
/// Any other 404 (the CRD missing for a moment, something in between that has no
/// such path) proves nothing about the object.
#[must_use]
pub fn says_not_found<K: Resource<DynamicType = ()>>(error: &Error, name: &str) -> bool {
    let Error::Api(status) = error else {
        return false;
    };
    let about_it = status
        .details
        .as_ref()
        .is_some_and(|d| d.name == name && d.kind == K::plural(&()) && d.group == K::group(&()));
    status.code == 404 && status.reason == "NotFound" && about_it
}

/// 422: the API server's rules refuse the object.
#[must_use]
pub fn is_invalid(error: &Error) -> bool {
    code(error) == Some(422)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::VFClaim;
    use kube::core::Status;
    use kube::core::response::StatusDetails;

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

    #[test]
    fn only_a_404_about_the_object_says_that_it_is_not_there() {
        let answer = |change: fn(&mut Status, &mut StatusDetails)| {
            let mut details = StatusDetails {
                name: "fast".into(),
                group: crate::api::GROUP.into(),
                kind: "vfclaims".into(),
                uid: String::new(),
                causes: Vec::new(),
                retry_after_seconds: 0,
            };
            let mut status = Status::failure("x", "NotFound").with_code(404);
            change(&mut status, &mut details);
            let details = (!details.name.is_empty()).then_some(details);
            status.details = details;
            says_not_found::<VFClaim>(&Error::Api(Box::new(status)), "fast")
        };
        assert!(answer(|_, _| {}));
        let others: [fn(&mut Status, &mut StatusDetails); 6] = [
            |_, d| d.name = "slow".into(),
            |_, d| d.name = String::new(),
            |_, d| d.kind = "namespaces".into(),
            |_, d| d.group = String::new(),
            |s, _| s.code = 410,
            |s, _| s.reason = "404 page not found".into(),
        ];
        for (i, change) in others.into_iter().enumerate() {
            assert!(!answer(change), "{i}");
        }
        assert!(!says_not_found::<VFClaim>(&Error::TlsRequired, "fast"));
    }
}

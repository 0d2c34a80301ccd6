//! Events for people: what happened to an object, beside its conditions.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};

/// The longest note that events.k8s.io/v1 takes, in bytes (k8s.io/kubernetes,
/// pkg/apis/core/validation/events.go).
const NOTE_MAX: usize = 1024;

/// Publishes events in the name of one program. An event that cannot be
/// written is logged and otherwise let go: conditions carry the truth.
#[derive(Clone)]
pub struct Events {
    recorder: Recorder,
}

impl Events {
    /// `controller` is the program's name; `instance` tells replicas apart.
    #[must_use]
    pub fn new(client: Client, controller: &str, instance: Option<String>) -> Self {
        let reporter = Reporter {
            controller: controller.to_owned(),
            instance,
        };
        Self {
            recorder: Recorder::new(client, reporter),
        }
    }

    /// Something went as it should.
    pub async fn normal(&self, on: &ObjectReference, action: &str, reason: &str, note: &str) {
        self.publish(EventType::Normal, on, action, reason, note)
            .await;
    }

    /// Something needs a look; `note` says what to do.
    pub async fn warning(&self, on: &ObjectReference, action: &str, reason: &str, note: &str) {
        self.publish(EventType::Warning, on, action, reason, note)
            .await;
    }

    async fn publish(
        &self,
        type_: EventType,
        on: &ObjectReference,
        action: &str,
        reason: &str,
        note: &str,
    ) {
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(cut(note, NOTE_MAX).to_owned()),
            action: action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, on).await {
            tracing::warn!(%error, reason, object = on.name, "cannot write an event");
        }
    }
}

/// At most `max` bytes of `text`, cut between characters.
fn cut(text: &str, max: usize) -> &str {
    if text.len() <= max {
        return text;
    }
    let end = (0..=max)
        .rev()
        .find(|i| text.is_char_boundary(*i))
        .unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #[test]
    fn long_notes_are_cut_between_characters() {
        assert_eq!(super::cut("abc", 3), "abc");
        assert_eq!(super::cut("aéb", 2), "a");
        assert_eq!(super::cut("aéb", 3), "aé");
    }
}

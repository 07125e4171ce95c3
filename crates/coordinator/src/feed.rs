//! What happens to one job, for whoever watches it: a bounded broadcast, and the last events.
//!
//! A watcher that is too slow loses events and is told how many; the job never waits for one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::Note;
use tokio::sync::broadcast;
use wire::proto;
use wire::proto::job_event::Event as Kind;

/// Events that a slow watcher may be behind.
const BEHIND_MAX: usize = 512;

/// Notes that are kept for status.
const NOTES_KEPT: usize = 20;

/// One job's feed. Clones are the same feed.
#[derive(Clone, Debug)]
pub struct Feed {
    sender: broadcast::Sender<proto::JobEvent>,
    notes: Arc<Mutex<VecDeque<proto::Event>>>,
}

impl Feed {
    /// A feed that nobody watches yet.
    pub fn new() -> Self {
        Self {
            sender: broadcast::Sender::new(BEHIND_MAX),
            notes: Arc::default(),
        }
    }

    /// Tells watchers.
    pub fn tell(&self, event: Kind) {
        // Without watchers nobody needs to know.
        drop(self.sender.send(proto::JobEvent { event: Some(event) }));
    }

    /// Keeps a note, and tells watchers.
    pub fn note(&self, event: proto::Event) {
        {
            let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
            if notes.len() == NOTES_KEPT {
                notes.pop_front();
            }
            notes.push_back(event.clone());
        }
        self.tell(Kind::Note(event));
    }

    /// The last notes, the oldest first.
    pub fn notes(&self) -> Vec<proto::Event> {
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.iter().cloned().collect()
    }

    /// What happens from now on.
    pub fn watch(&self) -> broadcast::Receiver<proto::JobEvent> {
        self.sender.subscribe()
    }
}

/// A note as an event of this moment.
pub fn event(now: SystemTime, note: &Note) -> proto::Event {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    proto::Event {
        unix_ms: since.as_millis() as u64,
        kind: note.kind.into(),
        text: note.text.clone(),
    }
}

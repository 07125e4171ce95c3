//! Names of things: a number that means one thing has a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// One membership of a job. Fences messages: what carries an older one is refused (invariant M1).
    Generation(u64)
}
number! {
    /// One life of a worker process. A restarted worker has another one.
    Incarnation(u64)
}
number! {
    /// An optimizer step, from 1; 0 is the state before the first.
    Step(u64)
}
number! {
    /// A member's place in its generation, from 0.
    Rank(u32)
}

impl Step {
    /// The step after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A job's name, unique within its coordinator.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub String);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a name of a job or a worker is made of, for errors.
pub const NAME_RULE: &str = "letters, digits, `-`, `_` and `.`, the first of them not a `.`";

/// Whether `text` can name a job or a worker: it stands in command lines, labels and file names.
pub fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && !text.starts_with('.') && text.chars().all(plain)
}

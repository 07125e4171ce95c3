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
    /// One coordinator's hold on a job, a fencing token: from 1, and higher with every opening of the job's journal. Fences what
    /// a coordinator writes and says that was replaced and does not know it, such as one that was suspended: the journal refuses
    /// its records, and workers its words.
    Fence(u64)
}
number! {
    /// An optimizer step, from 1; 0 is the state before the first.
    Step(u64)
}
number! {
    /// A member's place in its generation, from 0.
    Rank(u32)
}

impl Fence {
    /// Takes in the fence of what was heard. False for the word of a coordinator that has been replaced, which is to be ignored.
    ///
    /// 0 is no job's: a coordinator without one says nothing but Heard and Stop, which change nothing of what a worker holds.
    pub fn admits(&mut self, heard: Self) -> bool {
        let admitted = heard == Self(0) || heard >= *self;
        *self = heard.max(*self);
        admitted
    }
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

/// How many of a list a person is told.
const LISTED_MAX: usize = 16;

/// The first of `items`, and how many more there are: a world of thousands would fill pages, and every status with them.
pub(crate) fn listed(items: impl ExactSizeIterator<Item: fmt::Display>, between: &str) -> String {
    let more = items.len().saturating_sub(LISTED_MAX);
    let first: Vec<String> = items.take(LISTED_MAX).map(|it| it.to_string()).collect();
    let first = first.join(between);
    match more {
        0 => first,
        _ => format!("{first} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::listed;

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        assert_eq!(listed(0..0, ", "), "");
        assert_eq!(listed(0..3, ", "), "0, 1, 2");
        let all = "0; 1; 2; 3; 4; 5; 6; 7; 8; 9; 10; 11; 12; 13; 14; 15";
        assert_eq!(listed(0..16, "; "), all);
        assert_eq!(listed(0..2000, "; "), format!("{all} and 1984 more"));
    }
}

//! Why a configuration is not accepted: the key, where its value came from, the reason, and the cure.

use std::path::PathBuf;

/// A name that is this similar (Jaro-Winkler) is offered as what was meant.
const SIMILARITY_MIN: f64 = 0.75;

/// A configuration that is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that cannot be read.
    #[error("read configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: std::io::Error,
    },
    /// A file that is not UTF-8, as TOML must be.
    #[error(
        "{path} is not UTF-8: byte {offset} is 0x{byte:02x}; save the file as UTF-8, for example with \
         `iconv -f WINDOWS-1252 -t UTF-8`"
    )]
    Encoding {
        /// The file.
        path: PathBuf,
        /// The first byte that cannot be, counted from 0.
        offset: usize,
        /// Its value.
        byte: u8,
    },
    /// A file that is not TOML.
    #[error("{path} is not valid TOML: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column and expectation.
        reason: String,
    },
    /// A `--set` that is not `section.key=value`.
    #[error("--set {argument}: {reason}")]
    Set {
        /// The argument.
        argument: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The layers could not be merged.
    #[error("merge configuration: {0}")]
    Merge(String),
    /// A key or its value.
    #[error("{}", refusal(.key, .origin.as_deref(), .reason))]
    Refused {
        /// Dotted path.
        key: String,
        /// Where the value came from: `FILE:LINE`, an environment variable or `--set`.
        origin: Option<String>,
        /// What is wrong and what would be right.
        reason: String,
    },
}

fn refusal(key: &str, origin: Option<&str>, reason: &str) -> String {
    match origin {
        Some(origin) => format!("{key} (from {origin}): {reason}"),
        None => format!("{key}: {reason}"),
    }
}

/// The reason for refusing a name that nobody knows.
pub(crate) fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    let listed = known.join(", ");
    match nearest(name, known) {
        Some(meant) => {
            format!("there is no such {what}; did you mean `{meant}`? (known: {listed})")
        }
        None => format!("there is no such {what}; known are {listed}"),
    }
}

fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let similarity = |candidate: &str| strsim::jaro_winkler(name, candidate);
    known
        .iter()
        .copied()
        .filter(|candidate| similarity(candidate) >= SIMILARITY_MIN)
        .max_by(|a, b| similarity(a).total_cmp(&similarity(b)))
}

//! Warnings among the lines of `events.jsonl`. Other lines are for people and are not read back.

use std::{fs, path::Path};

use serde::Deserialize;
use serde_json::json;

use super::RunDirectoryError;
use crate::monitor::Warning;

/// `kind` of a warning's line.
const KIND: &str = "warning";

/// What of a warning's line is read back.
#[derive(Deserialize)]
struct Line {
    kind: String,
    warning: String,
    step: u64,
    text: String,
}

/// A warning as a line.
pub(super) fn line(time: &str, warning: &Warning) -> String {
    let Warning { kind, step, text } = warning;
    json!({"time": time, "kind": KIND, "warning": kind, "step": step, "text": text}).to_string()
}

/// The warnings of the file at `path`. What cannot be understood is somebody's edit, and no warning.
pub(super) fn warnings(path: &Path) -> Result<Vec<Warning>, RunDirectoryError> {
    let text = fs::read_to_string(path).map_err(|source| RunDirectoryError::Read {
        path: path.to_owned(),
        source,
    })?;
    let lines = text.lines().filter_map(|line| {
        let line: Line = serde_json::from_str(line).ok()?;
        (line.kind == KIND).then_some(Warning {
            kind: line.warning,
            step: line.step,
            text: line.text,
        })
    });
    Ok(lines.collect())
}

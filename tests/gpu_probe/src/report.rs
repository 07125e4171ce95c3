//! What a measurement says: a line for people and a row of JSON.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// The longest error that a line shows; the row has more.
const LINE: usize = 150;
/// The longest error that a row keeps: a kernel that does not compile comes with its source.
const ROW: usize = 6000;

/// Prints lines, and appends each row to a file at once, so that a process that dies loses nothing.
pub struct Report {
    rows: File,
}

impl Report {
    /// A report that appends its rows to `path`, one JSON object a line.
    pub fn append(path: &Path) -> Result<Self> {
        let rows = OpenOptions::new().create(true).append(true).open(path);
        let rows = rows.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { rows })
    }

    /// Prints `line` and keeps `row`.
    pub fn push(&mut self, line: &str, row: &Value) -> Result<()> {
        println!("{line}");
        writeln!(self.rows, "{row}")?;
        Ok(())
    }

    /// Prints `line` followed by what went wrong, in short, and keeps `row` with the whole of it.
    pub fn error(&mut self, line: &str, mut row: Value, error: &anyhow::Error) -> Result<()> {
        let text = format!("{error:#}");
        let short = text.split_whitespace().collect::<Vec<_>>().join(" ");
        row["error"] = text.chars().take(ROW).collect::<String>().into();
        let short: String = short.chars().take(LINE).collect();
        self.push(&format!("{line}  {short}"), &row)
    }
}

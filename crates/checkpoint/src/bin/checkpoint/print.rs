//! Standard output.

use std::io::{self, Write};

use anyhow::{Context, Result};

use crate::DONE;

/// Prints a line; a reader that has seen enough is no error.
pub fn print(text: &str) -> Result<u8> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("write to standard output")
        }
        _ => Ok(DONE),
    }
}

/// Bytes as people read them.
pub fn bytes(count: u64) -> String {
    indicatif::DecimalBytes(count).to_string()
}

/// Such as `1 rank`, `2 ranks`.
pub fn counted(count: usize, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

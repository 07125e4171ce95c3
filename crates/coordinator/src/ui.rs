//! What a person at the terminal sees: before (a banner), while it runs (a bar, or plain lines), and after (a table).
//!
//! Everything is text made from values; only [`Console`] writes, and [`print`] to standard output.

use std::io::{ErrorKind, Write};

use anyhow::Context;

mod banner;
mod console;
mod report;

pub use banner::{Banner, status_line};
pub use console::Console;
pub use report::Report;

/// What the system answers whoever writes to a terminal that was closed: EIO.
const TERMINAL_GONE: i32 = 5;

/// Writes `text` and the end of a line to standard output. A reader that has gone is no error, nor is a closed terminal.
///
/// # Errors
/// What else keeps it from being written.
pub fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout().lock(), "{}", text.trim_end()) {
        Err(error)
            if error.kind() == ErrorKind::BrokenPipe
                || error.raw_os_error() == Some(TERMINAL_GONE) =>
        {
            Ok(())
        }
        written => written.context("write to standard output"),
    }
}

/// Columns that text is wrapped to.
const WIDTH: usize = 100;

/// `text` on lines of at most `width` characters, broken at spaces; line ends and runs of spaces become one space.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().expect("it starts with one line");
        let fits = last.chars().count() + 1 + word.chars().count() <= width;
        if last.is_empty() {
            last.push_str(word);
        } else if fits {
            last.push(' ');
            last.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

//! A bar on standard error while bytes are read, on a terminal alone.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const KNOWN: &str = "{prefix} [{bar:32.cyan/dim}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} left";
const UNKNOWN: &str = "{prefix} {spinner} {decimal_bytes} {decimal_bytes_per_sec}";

/// A bar that is gone when dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// Of so many bytes; 0 where nobody knows. Hidden where standard error is no terminal.
    pub fn new(what: &'static str, bytes: u64) -> Self {
        let (total, template) = match bytes {
            0 => (None, UNKNOWN),
            bytes => (Some(bytes), KNOWN),
        };
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template(template).expect("the template is well-formed");
        Self(bar.with_style(style).with_prefix(what))
    }

    /// Takes in that so many more bytes were read.
    pub fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

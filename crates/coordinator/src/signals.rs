//! Ctrl-C, SIGTERM and SIGHUP: the first asks for the state to be saved, and once more leaves at once.
//!
//! A SIGHUP is never the "once more". A terminal that is closed sends it (the kernel and then the shell, so that it comes twice),
//! and supervisors send it right after SIGTERM: nobody has lost patience there. Where it is ignored when the process starts, as
//! under `nohup`, it stays ignored.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

/// Tells `first` the name of the first signal. Returns where its number appears, for the exit code.
///
/// # Errors
/// Signals cannot be listened for.
pub(crate) fn on_signals<F>(
    first: impl Fn(&'static str) -> F + Clone + Send + 'static,
) -> anyhow::Result<Arc<AtomicU8>>
where
    F: Future<Output = ()> + Send,
{
    let received = Arc::new(AtomicU8::new(0));
    let hangup = (!hangup_is_ignored()).then_some((SignalKind::hangup(), "SIGHUP"));
    let kinds = [
        (SignalKind::interrupt(), "Ctrl-C"),
        (SignalKind::terminate(), "SIGTERM"),
    ];
    for (kind, name) in kinds.into_iter().chain(hangup) {
        let mut signals = signal(kind).context("listen for signals")?;
        let (first, received) = (first.clone(), Arc::clone(&received));
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let number = kind.as_raw_value() as u8;
                let before = received.load(Ordering::Relaxed);
                match meaning(before, number) {
                    Meaning::First => {
                        received.store(number, Ordering::Relaxed);
                        first(name).await;
                    }
                    // The exit code is that of who can be answered.
                    Meaning::Same if number != HANGUP => received.store(number, Ordering::Relaxed),
                    Meaning::Same => {}
                    // Workers of this machine follow: their standard inputs close with this process.
                    Meaning::OnceMore => std::process::exit(128 + i32::from(number)),
                }
            }
        });
    }
    Ok(received)
}

/// SIGHUP's number on every Unix.
const HANGUP: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    First,
    /// It says what was said already.
    Same,
    OnceMore,
}

/// What a signal means after `before`, which is 0 before the first.
fn meaning(before: u8, number: u8) -> Meaning {
    match (before, number) {
        (0, _) => Meaning::First,
        (HANGUP, _) | (_, HANGUP) => Meaning::Same,
        _ => Meaning::OnceMore,
    }
}

/// Whether whoever started this process has it ignore SIGHUP. Only Linux tells; elsewhere it counts as not ignored.
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignores_hangup(&status)
}

/// Of the text of `/proc/self/status`: in its mask of ignored signals the lowest bit is signal 1.
fn ignores_hangup(status: &str) -> bool {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INT: u8 = 2;
    const TERM: u8 = 15;

    #[test]
    fn only_a_person_or_a_supervisor_says_once_more_and_no_hangup_does() {
        for (before, number, expected) in [
            (0, HANGUP, Meaning::First),
            (0, TERM, Meaning::First),
            (HANGUP, HANGUP, Meaning::Same),
            (HANGUP, TERM, Meaning::Same),
            (TERM, HANGUP, Meaning::Same),
            (TERM, TERM, Meaning::OnceMore),
            (INT, TERM, Meaning::OnceMore),
        ] {
            assert_eq!(meaning(before, number), expected, "{number} after {before}");
        }
    }

    #[test]
    fn a_hangup_is_ignored_where_the_lowest_bit_of_the_mask_says_so() {
        let status = |mask: &str| {
            format!("Name:\tcoordinator\nSigBlk:\t0000000000000001\nSigIgn:\t{mask}\n")
        };
        assert!(ignores_hangup(&status("0000000000001001")));
        assert!(!ignores_hangup(&status("0000000000001000")));
        assert!(!ignores_hangup(""));
    }
}

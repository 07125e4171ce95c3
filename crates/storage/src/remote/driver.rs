//! The one place where asynchronous requests meet blocking callers, with the deadline of each and the reason when it fails.

use std::{
    error::Error as _,
    io,
    sync::{OnceLock, mpsc},
    time::Duration,
};

use object_store::Error;
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};

/// How long one operation may take with all its retries: longer than [`super::client`] lets them last, so that the reason
/// which is told is theirs. It ends what hangs in another way.
const DEADLINE: Duration = Duration::from_mins(5);

/// An operation under way.
#[derive(Debug)]
pub(super) struct Pending<T>(mpsc::Receiver<io::Result<T>>);

impl<T> Pending<T> {
    /// Waits for its end, at most until its deadline.
    pub fn wait(self) -> io::Result<T> {
        let ended = self.0.recv();
        ended.unwrap_or_else(|_| Err(io::Error::other("the request was dropped unfinished")))
    }
}

/// Begins an operation.
///
/// # Errors
/// The runtime could not be started.
pub(super) fn start<T: Send + 'static>(
    operation: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> io::Result<Pending<T>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    runtime()?.spawn(async move {
        let ended = if let Ok(ended) = timeout(DEADLINE, operation).await {
            ended.map_err(|error| explain(&error))
        } else {
            let reason = format!("no answer within {} s", DEADLINE.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, reason))
        };
        // Whoever began it may have given up.
        drop(sender.send(ended));
    });
    Ok(Pending(receiver))
}

/// Carries an operation out.
pub(super) fn run<T: Send + 'static>(
    operation: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> io::Result<T> {
    start(operation)?.wait()
}

/// Never dropped: dropping a runtime inside another one's task panics, and a caller may be in one.
fn runtime() -> io::Result<&'static Runtime> {
    static RUNTIME: OnceLock<io::Result<Runtime>> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| {
        Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("object-store")
            .enable_all()
            .build()
    });
    runtime
        .as_ref()
        .map_err(|error| io::Error::new(error.kind(), error.to_string()))
}

/// The error as the system's own errors are told: a kind, and the whole story without what may be secret.
pub(super) fn explain(error: &Error) -> io::Error {
    let kind = match error {
        Error::NotFound { .. } => io::ErrorKind::NotFound,
        Error::AlreadyExists { .. } => io::ErrorKind::AlreadyExists,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            io::ErrorKind::PermissionDenied
        }
        Error::NotSupported { .. } | Error::NotImplemented { .. } => io::ErrorKind::Unsupported,
        // Of reads: the object that was opened is no longer the one under its key.
        Error::Precondition { .. } => io::ErrorKind::StaleNetworkFileHandle,
        Error::InvalidPath { .. } => io::ErrorKind::InvalidInput,
        _ => io::ErrorKind::Other,
    };
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let told = cause.to_string();
        if !text.contains(&told) {
            text = format!("{text}: {told}");
        }
        source = cause.source();
    }
    io::Error::new(kind, without_queries(&text))
}

/// `text` with the queries of its URLs cut out: a shared access signature is one.
fn without_queries(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('?') {
        clean.push_str(before);
        clean.push('?');
        // A service may answer in XML, whose `<?xml version="1.0"?>` is no query.
        if before.ends_with('<') || after.starts_with('>') {
            rest = after;
            continue;
        }
        let end = after.find(|it: char| it.is_whitespace() || "()\"'`,;".contains(it));
        let (query, later) = after.split_at(end.unwrap_or(after.len()));
        if !query.is_empty() {
            clean.push('…');
        }
        rest = later;
    }
    clean.push_str(rest);
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_in_a_url_is_not_told() {
        let told = "GET https://a.blob.core.windows.net/c/key?sv=1&sig=SECRET%2B (403): why? no (see /x?sig=OTHER)";
        let clean = "GET https://a.blob.core.windows.net/c/key?… (403): why? no (see /x?…)";
        assert_eq!(without_queries(told), clean);
        let answer = "404: <?xml version=\"1.0\"?>\n<Error>no such key</Error>";
        assert_eq!(without_queries(answer), answer);
    }
}

//! Whether this worker has a session, for whoever else in the process needs to know: the health service, and the signal that
//! tells it to leave.

use std::process::exit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::TcpListenerStream;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::session::Voice;

/// What a supervisor ends a process with.
pub(crate) const SIGTERM: (SignalKind, &str) = (SignalKind::terminate(), "SIGTERM");
/// What a terminal sends to all that was started in it.
pub(crate) const CTRL_C: (SignalKind, &str) = (SignalKind::interrupt(), "Ctrl-C");

/// What a terminal that is closed sends to all that was started in it.
pub(crate) const SIGHUP: (SignalKind, &str) = (SignalKind::hangup(), "SIGHUP");

/// Exit code of a worker that was told to leave.
pub(crate) const EXIT_DRAINED: u8 = 143;

/// The process's presence at a coordinator. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Presence(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Of the present session.
    voice: Option<Voice>,
    /// Why the process is to leave, once it was told to.
    leaving: Option<&'static str>,
    health: Option<(HealthReporter, tokio::runtime::Handle)>,
}

/// A session's time; over when dropped.
pub(crate) struct Present<'a>(&'a Presence);

impl Presence {
    /// A session began.
    pub(crate) fn enter(&self, voice: &Voice) -> Present<'_> {
        let leaving = {
            let mut state = self.state();
            state.voice = Some(voice.clone());
            state.leaving
        };
        if let Some(reason) = leaving {
            voice.leave(reason);
        }
        self.report(ServingStatus::Serving);
        Present(self)
    }

    /// Whether the process was told to leave.
    pub(crate) fn is_leaving(&self) -> bool {
        self.state().leaving.is_some()
    }

    /// The first of these signals asks the coordinator to let this worker go, so that its job forms a generation without it, or saves
    /// first; without a session, or the second time, the process leaves at once. A SIGHUP is no second time: a terminal that is
    /// closed sends it twice, and supervisors send it after SIGTERM.
    pub(crate) fn follow_signals(
        &self,
        runtime: &Runtime,
        kinds: &[(SignalKind, &'static str)],
    ) -> anyhow::Result<()> {
        let entered = runtime.enter();
        for &(kind, name) in kinds {
            let mut signals = signal(kind).context("listen for signals")?;
            let presence = self.clone();
            runtime.spawn(async move {
                while signals.recv().await.is_some() {
                    let hangup = Some(SIGHUP.1);
                    let (before, voice) = {
                        let mut state = presence.state();
                        let before = state.leaving;
                        if before.is_none() || Some(name) != hangup {
                            state.leaving = Some(name);
                        }
                        (before, state.voice.clone())
                    };
                    match (before, voice) {
                        (Some(_), Some(_)) if [before, Some(name)].contains(&hangup) => {}
                        (None, Some(voice)) => {
                            tracing::info!("{name}: leaving as soon as the job lets this worker go; once more leaves at once");
                            // Speaking may wait for the network.
                            tokio::task::spawn_blocking(move || voice.leave(name));
                        }
                        _ => exit(i32::from(EXIT_DRAINED)),
                    }
                }
            });
        }
        drop(entered);
        Ok(())
    }

    /// Tells the coordinator that this worker cannot go on, if there is a session and within `patience`. The process is to end
    /// then.
    #[cfg(feature = "cuda")]
    pub(crate) fn fail(&self, reason: String, patience: std::time::Duration) {
        let Some(voice) = self.state().voice.clone() else {
            return;
        };
        let (told, is_told) = std::sync::mpsc::channel();
        let telling = std::thread::spawn(move || {
            let cause = protocol::Cause::Temporary;
            // A session that is over has nobody to tell.
            drop(voice.say(protocol::WorkerMessage::Failed { cause, reason }));
            let _ = told.send(());
        });
        if is_told.recv_timeout(patience).is_ok() {
            drop(telling.join());
            // It has left the queue; the connection's thread needs a moment to send it.
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    }

    /// Serves gRPC health on `address`: SERVING while there is a session. It is open to everybody (invariant S1).
    pub(crate) fn serve_health(&self, address: &str, runtime: &Runtime) -> anyhow::Result<()> {
        let listener = runtime
            .block_on(TcpListener::bind(address))
            .with_context(|| format!("listen on {address} (--health); choose another port"))?;
        let (reporter, service) = tonic_health::server::health_reporter();
        self.state().health = Some((reporter, runtime.handle().clone()));
        self.report(ServingStatus::NotServing);
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Ok(())
    }

    fn report(&self, status: ServingStatus) {
        let health = self.state().health.clone();
        if let Some((reporter, runtime)) = health {
            // The empty name stands for the whole process.
            runtime.block_on(reporter.set_service_status("", status));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain values: a thread that panicked while it held them leaves them usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.0.state().voice = None;
        self.0.report(ServingStatus::NotServing);
    }
}

/// Whether whoever started this process has it ignore SIGHUP, as `nohup` does. Only Linux tells; elsewhere it counts as not
/// ignored.
pub(crate) fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // The lowest bit is signal 1.
    mask.is_some_and(|mask| mask & 1 == 1)
}

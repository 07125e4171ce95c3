//! `coordinator --cluster`: serves job after job to workers that join from anywhere.
//!
//! ```text
//! sessions ─► hub: protocol::Scheduler ─ Start(job, workers) ─► attempt thread: driver, finish ─► hub: Ended
//! clients  ─►  │                                                    ▲
//!              └── journal of the queue (state folder)              └── the sessions of its workers, handed on by the hub
//! ```
//! The hub owns the queue and the waiting workers' sessions; a running job owns those of its workers. Each attempt has a thread
//! of its own, because it writes its journal synchronously. A coordinator that is killed finds its jobs again: those that ran
//! go on from their last checkpoint.

mod hub;
mod jobs;

use std::sync::atomic::Ordering;

use anyhow::Context;
use tokio::sync::{mpsc, oneshot};
use wire::Guard;

use crate::address::reachable;
use crate::attempt::INPUTS_MAX;
use crate::config::ServiceConfig;
use crate::metrics;
use crate::run::{ASKS_MAX, bind, token};
use crate::server::{self, Doors, Route};
use crate::signals::on_signals;
use hub::Hub;

/// Serves until a signal asks it to leave, and returns the exit code.
///
/// # Errors
/// A state folder, token or address that cannot be used; a journal that cannot be written.
pub fn serve(config: &ServiceConfig) -> anyhow::Result<u8> {
    let token = token(&config.security)?;
    raise_open_files();
    let jobs = jobs::open(&config.state)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the network threads")?;
    let signal = runtime.block_on(async {
        let (stop, stopping) = mpsc::channel(2);
        let signalled = on_signals(move |name| {
            let stop = stop.clone();
            async move {
                // A hub that is gone has nothing left to save.
                let _gone = stop.send(name).await;
            }
        })?;
        let listener = bind(config.listen).await?;
        let bound = listener.local_addr()?;
        let (sessions, arriving) = mpsc::channel(INPUTS_MAX);
        let (asks, asked) = mpsc::channel(ASKS_MAX);
        let doors = Doors {
            sessions: Route {
                job: String::new(),
                inputs: sessions,
            },
            asks,
        };
        let (stop_server, stopped) = oneshot::channel::<()>();
        let guard = Guard::new(token.as_ref());
        let server = tokio::spawn(server::serve(listener, doors, guard, async {
            // Also resolves when the sender is dropped.
            drop(stopped.await);
        }));
        let address = reachable(bound);
        tracing::info!(
            "serving on {bound}, state in {}; workers join with `worker --coordinator http://{address}`, jobs come \
             with `coordinator submit CONFIG.toml --coordinator http://{address}`",
            config.state.display()
        );
        let listening = metrics::listen(config.metrics_listen, Guard::new(token.as_ref())).await?;
        if let Some(listening) = &listening {
            tracing::info!("metrics on {}", listening.url);
        }
        let served = listening.as_ref().map(|it| it.metrics.clone());
        let served = Hub::new(jobs, served).run(arriving, asked, stopping).await;
        drop(stop_server);
        server.abort();
        served?;
        anyhow::Ok(signalled.load(Ordering::Relaxed))
    })?;
    Ok(128 + signal)
}

/// Raises the limit of open files as far as this user may: each worker's connection is one, and a shell's limit is often 1024.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    match setrlimit(Resource::Nofile, limit) {
        Ok(()) => tracing::debug!(files = ?limit.current, "open files"),
        Err(error) => tracing::warn!("the limit of open files stays: {error}"),
    }
}

//! `GET /metrics` over HTTP for Prometheus, with a bearer token where one is asked for.

use std::{future::Future, net::SocketAddr, time::Instant};

use anyhow::Context;
use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, task::JoinHandle};
use wire::Guard;

use super::{CONTENT_TYPE, Metrics};
use crate::address::reachable;

/// Metrics that are being served. Dropped, they are not.
pub struct Listening {
    /// What is served.
    pub metrics: Metrics,
    /// Where.
    pub url: String,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Served {
    metrics: Metrics,
    guard: Guard,
}

/// Serves new metrics on `address` from now on; nothing where it is `None`.
///
/// # Errors
/// The address cannot be listened on.
pub async fn listen(
    address: Option<SocketAddr>,
    guard: Guard,
) -> anyhow::Result<Option<Listening>> {
    let Some(address) = address else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "listen on {address} (telemetry.metrics_listen) for Prometheus; choose another port, or leave the key out"
        )
    })?;
    let url = format!("http://{}/metrics", reachable(listener.local_addr()?));
    let metrics = Metrics::new();
    let server = serve(listener, metrics.clone(), guard, std::future::pending());
    let task = tokio::spawn(async {
        if let Err(error) = server.await {
            tracing::warn!("metrics are no longer served: {error}");
        }
    });
    Ok(Some(Listening { metrics, url, task }))
}

/// Serves `metrics` on `listener` until `shutdown` resolves. Only to whom `guard` lets in
/// (`authorization: Bearer TOKEN`).
///
/// # Errors
/// What the listener says.
pub async fn serve(
    listener: TcpListener,
    metrics: Metrics,
    guard: Guard,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let served = Served { metrics, guard };
    let router = Router::new()
        .route("/metrics", get(scrape))
        .with_state(served);
    axum::serve(listener, router)
        .with_graceful_shutdown(shutdown)
        .await
}

async fn scrape(State(served): State<Served>, headers: HeaderMap) -> Response {
    let shown = headers.get(header::AUTHORIZATION);
    if !served.guard.opens(shown.and_then(|it| it.to_str().ok())) {
        let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
        let reason = "send `authorization: Bearer TOKEN` with the content of security.token_file\n";
        return (StatusCode::UNAUTHORIZED, challenge, reason).into_response();
    }
    let kind = [(header::CONTENT_TYPE, CONTENT_TYPE)];
    (kind, served.metrics.text(Instant::now())).into_response()
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

//! What belongs to a coordinator as a service and not to a job: where it listens, who may speak to it, where it keeps its
//! queue. `coordinator --cluster` takes these keys and no others; `coordinator submit` takes all but these; a coordinator
//! that runs one job on one machine takes both.

use std::net::SocketAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layers::{self, Merged, Sources};
use super::refusal::ConfigError;
use super::sections::{Section, refuse};

/// Keys and whole sections of the service.
const SERVICE: [&str; 4] = [
    "cluster.listen",
    "cluster.state",
    "security",
    "telemetry.metrics_listen",
];

/// Where a service listens unless it is told otherwise.
const LISTEN: &str = "127.0.0.1:7070";

/// Where a service keeps its queue unless it is told otherwise.
const STATE: &str = "cluster";

/// `[security]`: who may come in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecuritySection {
    /// File whose first line every client and worker must show as a bearer token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Whether anybody may come in through a listener that is not loopback. Default false.
    #[serde(default)]
    pub insecure: bool,
}

/// The configuration of `coordinator --cluster`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceConfig {
    /// Where workers and clients connect.
    pub listen: SocketAddr,
    /// Folder of the queue's journal, held by one coordinator at a time.
    pub state: PathBuf,
    /// Who may come in.
    pub security: SecuritySection,
    /// Where `/metrics` is served to Prometheus; absent: nowhere.
    pub metrics_listen: Option<SocketAddr>,
}

impl ServiceConfig {
    /// Merges and checks all sources.
    ///
    /// # Errors
    /// A key of a job; a value that cannot work.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let merged = layers::merge(sources)?;
        if let Some(key) = merged.given().iter().find(|key| !is_service(key)) {
            let reason = "belongs to a job: give it to `coordinator submit`; a coordinator that serves job after job is \
                          started with cluster.listen, cluster.state, [security] and telemetry.metrics_listen only";
            return Err(refuse(&merged, key, reason));
        }
        let mut all = merged.table();
        let mut cluster = Section::take(&mut all, "cluster", &merged)?;
        let given = |key: &str| merged.origin(key).is_some();
        let listen: SocketAddr = cluster.required("listen")?;
        let listen = if given("cluster.listen") {
            listen
        } else {
            LISTEN.parse().expect("an address")
        };
        let state = cluster.optional("state")?;
        let security = SecuritySection::parse(Section::take(&mut all, "security", &merged)?)?;
        check_listener(&merged, "cluster.listen", listen, &security)?;
        let mut telemetry = Section::take(&mut all, "telemetry", &merged)?;
        let metrics_listen = telemetry.optional("metrics_listen")?;
        check_metrics(&merged, metrics_listen, &security)?;
        Ok(Self {
            metrics_listen,
            listen,
            state: state.unwrap_or_else(|| STATE.into()),
            security,
        })
    }
}

impl SecuritySection {
    pub(super) fn parse(mut section: Section) -> Result<Self, ConfigError> {
        let parsed = Self {
            token_file: section.optional("token_file")?,
            insecure: section.optional("insecure")?.unwrap_or(false),
        };
        section.finish()?;
        Ok(parsed)
    }
}

/// Refuses a door that anybody on the network could open (invariant S1).
pub(super) fn check_listener(
    merged: &Merged,
    key: &str,
    listen: SocketAddr,
    security: &SecuritySection,
) -> Result<(), ConfigError> {
    if listen.ip().is_loopback() || security.token_file.is_some() || security.insecure {
        return Ok(());
    }
    let reason = format!(
        "{listen} is not loopback, and whoever reaches it would be let in; set security.token_file to a file with a secret that \
         workers and clients show (--token-file), or security.insecure = true on a network where nobody else is"
    );
    Err(refuse(merged, key, reason))
}

/// The same for the door of metrics, where there is one.
pub(super) fn check_metrics(
    merged: &Merged,
    listen: Option<SocketAddr>,
    security: &SecuritySection,
) -> Result<(), ConfigError> {
    listen.map_or(Ok(()), |listen| {
        check_listener(merged, "telemetry.metrics_listen", listen, security)
    })
}

/// Refuses keys of the service in a job that is submitted to one.
pub(super) fn check_job(merged: &Merged) -> Result<(), ConfigError> {
    let given = merged.given();
    let Some(key) = given.into_iter().find(|key| is_service(key)) else {
        return Ok(());
    };
    let reason = "belongs to the service, not to a job: set it where `coordinator --cluster` is started, and leave it out here";
    Err(refuse(merged, &key, reason))
}

/// Whether a dotted path, or a whole section, is the service's.
pub(super) fn is_service(key: &str) -> bool {
    SERVICE.iter().any(|service| {
        key == *service
            || key
                .strip_prefix(service)
                .is_some_and(|rest| rest.starts_with('.'))
    })
}

/// Whether an environment variable is a key of the service.
pub(super) fn is_service_variable(name: &str) -> bool {
    let key = name.strip_prefix(layers::ENVIRONMENT_PREFIX);
    key.is_some_and(|key| is_service(&key.to_lowercase().replace("__", ".")))
}

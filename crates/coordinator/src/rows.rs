//! A job's rows for clients, read from its run directory, whether it runs or has ended.

use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use protocol::{EvaluationRow, MetricsRow};
use serde::de::DeserializeOwned;
use tonic::Status;
use wire::proto;

/// Rows of each kind in one answer; more are asked for with a later `from_step`.
const ROWS_MAX: usize = 1000;

/// Answers `request` for the run in `output`, beside the caller's loop.
pub(crate) async fn read(
    output: PathBuf,
    request: proto::GetMetricsRequest,
) -> Result<proto::GetMetricsResponse, Status> {
    let limit = match request.limit as usize {
        0 => ROWS_MAX,
        limit => limit.min(ROWS_MAX),
    };
    let from = request.from_step;
    let read = move || -> std::io::Result<_> {
        let rows = rows(&output.join("metrics.jsonl"), limit, |row: &MetricsRow| {
            row.report.step >= from
        })?;
        let evaluations = rows_of_evaluations(&output, limit, from)?;
        Ok(proto::GetMetricsResponse {
            rows: rows.into_iter().map(Into::into).collect(),
            evaluations: evaluations.into_iter().map(Into::into).collect(),
        })
    };
    let read = tokio::task::spawn_blocking(read).await;
    let read = read.map_err(|error| Status::internal(error.to_string()))?;
    read.map_err(|error| Status::internal(format!("read the run directory: {error}")))
}

fn rows_of_evaluations(
    output: &Path,
    limit: usize,
    from: u64,
) -> std::io::Result<Vec<EvaluationRow>> {
    let path = output.join("eval.jsonl");
    rows(&path, limit, |row: &EvaluationRow| row.step >= from)
}

/// The first `limit` wanted rows of a file; none of one that is not there. A last line that is being written is left out.
fn rows<T: DeserializeOwned>(
    path: &Path,
    limit: usize,
    wanted: impl Fn(&T) -> bool,
) -> std::io::Result<Vec<T>> {
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let mut rows = Vec::new();
    for line in BufReader::new(file).lines() {
        let Ok(row) = serde_json::from_str(&line?) else {
            break;
        };
        if wanted(&row) {
            rows.push(row);
        }
        if rows.len() == limit {
            break;
        }
    }
    Ok(rows)
}

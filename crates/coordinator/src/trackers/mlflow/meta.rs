//! `meta.yaml` of experiments and runs. Written with quoted texts, which YAML reads as JSON does; of what MLflow wrote, only
//! single scalars are read.

use std::path::{Path, PathBuf};

use storage::{atomic_write, create_directory};

use crate::trackers::{TrackerError, files};

/// An experiment of a store.
pub(super) struct Experiment;

impl Experiment {
    /// The folder of the experiment `name` below `folder`, made where there is none.
    pub(super) fn enter(folder: &Path, name: &str, now_ms: u64) -> Result<PathBuf, TrackerError> {
        for experiment in experiments(folder)? {
            let meta = files::text(&experiment.join("meta.yaml"))?.unwrap_or_default();
            if scalar(&meta, "name").as_deref() == Some(name) {
                return Ok(experiment);
            }
        }
        // The same number for the same name: two runs that make it at once make one.
        let digest = blake3::hash(name.as_bytes());
        let (head, _) = digest
            .as_bytes()
            .split_first_chunk()
            .expect("a digest has 32 bytes");
        let id = u64::from_le_bytes(*head) % 900_000_000_000_000_000 + 100_000_000_000_000_000;
        let experiment = folder.join(id.to_string());
        create_directory(&experiment)?;
        let meta = format!(
            "artifact_location: {}\ncreation_time: {now_ms}\nexperiment_id: '{id}'\nlast_update_time: {now_ms}\n\
             lifecycle_stage: active\nname: {}\n",
            quoted(&experiment.display().to_string()),
            quoted(name),
        );
        atomic_write(&experiment.join("meta.yaml"), meta.as_bytes())?;
        Ok(experiment)
    }
}

/// How a run stands, with MLflow's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Running = 1,
    Finished = 3,
    Failed = 4,
    Killed = 5,
}

/// A run's `meta.yaml`.
pub(super) struct Run<'a> {
    pub id: &'a str,
    pub name: &'a str,
    pub experiment: &'a str,
    pub artifacts: &'a Path,
    /// Milliseconds since 1970.
    pub start: u64,
    pub status: Status,
    /// Milliseconds since 1970.
    pub end: Option<u64>,
}

impl Run<'_> {
    pub(super) fn to_yaml(&self) -> String {
        let end = self.end.map_or("null".into(), |end| end.to_string());
        format!(
            "artifact_uri: {}\nend_time: {end}\nentry_point_name: ''\nexperiment_id: '{}'\nlifecycle_stage: active\n\
             run_id: {}\nrun_name: {}\nsource_name: ''\nsource_type: 4\nsource_version: ''\nstart_time: {}\nstatus: {}\n\
             tags: []\nuser_id: {}\n",
            quoted(&self.artifacts.display().to_string()),
            self.experiment,
            quoted(self.id),
            quoted(self.name),
            self.start,
            self.status as u8,
            quoted(&std::env::var("USER").unwrap_or_else(|_| "unknown".into())),
        )
    }

    /// Start of the run in `folder`, in milliseconds since 1970, where it has one.
    pub(super) fn start(folder: &Path) -> Result<Option<u64>, TrackerError> {
        let meta = files::text(&folder.join("meta.yaml"))?.unwrap_or_default();
        Ok(scalar(&meta, "start_time").and_then(|start| start.parse().ok()))
    }

    /// Status of the run in `folder`, where it is one of [`Status`].
    pub(super) fn status(folder: &Path) -> Result<Option<Status>, TrackerError> {
        let meta = files::text(&folder.join("meta.yaml"))?.unwrap_or_default();
        let number = scalar(&meta, "status").and_then(|status| status.parse::<u8>().ok());
        let all = [
            Status::Running,
            Status::Finished,
            Status::Failed,
            Status::Killed,
        ];
        Ok(all.into_iter().find(|status| Some(*status as u8) == number))
    }
}

/// Folders of the experiments in a store; none where it is absent.
pub(super) fn experiments(folder: &Path) -> Result<Vec<PathBuf>, TrackerError> {
    let mut experiments = files::entries(folder)?;
    // Experiments that were deleted lie below `.trash`.
    experiments.retain(|path| path.join("meta.yaml").exists());
    Ok(experiments)
}

/// A text as YAML reads it: JSON's texts are.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The scalar behind `key:` at the start of a line.
fn scalar(yaml: &str, key: &str) -> Option<String> {
    let mut values = yaml
        .lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let value = values.next()?.trim();
    let inside = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
    Some(match (inside('\''), inside('"')) {
        (Some(text), _) => text.replace("''", "'"),
        (None, Some(_)) => serde_json::from_str(value).ok()?,
        (None, None) => value.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_are_read_as_mlflow_writes_them() {
        let yaml = "name: caldpo exp\nexperiment_id: '786107646672630157'\nnames: no\nstatus: 3\nquote: 'it''s'\nd: \"a\\\"b\"\n";
        let check = |key, expected: Option<&str>| {
            assert_eq!(scalar(yaml, key).as_deref(), expected, "{key}");
        };
        check("name", Some("caldpo exp"));
        check("experiment_id", Some("786107646672630157"));
        check("status", Some("3"));
        check("quote", Some("it's"));
        check("d", Some("a\"b"));
        check("absent", None);
    }

    #[test]
    fn an_experiment_is_made_once_and_found_by_its_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let other = folder.path().join("7");
        create_directory(&other).expect("a folder");
        atomic_write(&other.join("meta.yaml"), b"name: 'other: one'\n").expect("write");
        let enter = |name| Experiment::enter(folder.path(), name, 1).expect("an experiment");
        assert_eq!(enter("other: one"), other);
        let made = enter("mine");
        assert_ne!(made, other);
        assert_eq!(enter("mine"), made);
        assert_eq!(experiments(folder.path()).expect("a store").len(), 2);
    }
}

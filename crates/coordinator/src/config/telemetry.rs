//! `[telemetry]`: which trackers a run's rows go to, and where metrics are served. What the keys lead to is `trackers` and
//! `metrics`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::Serialize;

use super::{
    refusal::{ConfigError, unknown},
    sections::Section,
};

/// Characters that W&B does not allow in a project's name.
const WANDB_PROJECT_REFUSED: &str = "/\\#?%:";
/// W&B's and MLflow's limits are above and below it; nobody types more.
const NAME_CHARACTERS_MAX: usize = 128;

/// A program that shows runs, and whose files a run can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TrackerKind {
    /// Event files of TensorBoard.
    TensorBoard,
    /// An offline run of Weights & Biases.
    Wandb,
    /// A file store of MLflow.
    Mlflow,
}

impl TrackerKind {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::TensorBoard, Self::Wandb, Self::Mlflow];

    /// As in the configuration, which is as in TRL's `report_to`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TensorBoard => "tensorboard",
            Self::Wandb => "wandb",
            Self::Mlflow => "mlflow",
        }
    }
}

/// `[telemetry]`. `metrics_listen` is the service's, the other keys are the job's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct TelemetrySection {
    /// Where `/metrics` is served to Prometheus; loopback, port 0 for any free one. Absent: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub metrics_listen: Option<SocketAddr>,
    /// What writes the run's rows beside its own files. Default: nothing.
    pub trackers: Vec<TrackerKind>,
    /// Folder of the event files, of one run. Default `<output>/tensorboard`.
    pub tensorboard_folder: PathBuf,
    /// Folder of the offline runs; several may share it. Default `<output>/wandb`.
    pub wandb_folder: PathBuf,
    /// Project that `wandb sync` puts the run into.
    pub wandb_project: String,
    /// The project's owner. Default: whoever syncs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wandb_entity: Option<String>,
    /// Folder of the file store; several runs may share it. Default `<output>/mlruns`.
    pub mlflow_folder: PathBuf,
    /// The run's experiment.
    pub mlflow_experiment: String,
}

impl TelemetrySection {
    pub(super) fn parse(mut section: Section, output: &Path) -> Result<Self, ConfigError> {
        let mut folder = |key, name| {
            let given = section.optional::<PathBuf>(key)?;
            if given.as_ref().is_some_and(|it| it.as_os_str().is_empty()) {
                return Err(section.refuse(key, "is empty; name a folder, or leave the key out"));
            }
            Ok(given.unwrap_or_else(|| output.join(name)))
        };
        let tensorboard_folder = folder("tensorboard_folder", "tensorboard")?;
        let wandb_folder = folder("wandb_folder", "wandb")?;
        let mlflow_folder = folder("mlflow_folder", "mlruns")?;
        let parsed = Self {
            metrics_listen: section.optional("metrics_listen")?,
            trackers: trackers(&mut section)?,
            tensorboard_folder,
            wandb_folder,
            wandb_project: section.required("wandb_project")?,
            wandb_entity: section.optional("wandb_entity")?,
            mlflow_folder,
            mlflow_experiment: section.required("mlflow_experiment")?,
        };
        parsed
            .check_names()
            .map_err(|(key, reason)| section.refuse(key, reason))?;
        section.finish()?;
        Ok(parsed)
    }

    fn check_names(&self) -> Result<(), (&'static str, String)> {
        for (key, name, refused) in [
            (
                "wandb_project",
                Some(&self.wandb_project),
                WANDB_PROJECT_REFUSED,
            ),
            ("wandb_entity", self.wandb_entity.as_ref(), "/"),
            ("mlflow_experiment", Some(&self.mlflow_experiment), ""),
        ] {
            let Some(name) = name else { continue };
            let characters = name.chars().count();
            let plain = |c: char| !c.is_control() && !refused.contains(c);
            if name.trim().is_empty()
                || characters > NAME_CHARACTERS_MAX
                || !name.chars().all(plain)
            {
                let mut reason = format!("must have 1 to {NAME_CHARACTERS_MAX} characters");
                if !refused.is_empty() {
                    reason = format!("{reason}, none of them one of `{refused}`");
                }
                return Err((key, format!("{reason}, got {name:?}")));
            }
        }
        Ok(())
    }
}

/// A list of names, or one name, as in TRL's `report_to`.
fn trackers(section: &mut Section) -> Result<Vec<TrackerKind>, ConfigError> {
    const KEY: &str = "trackers";
    let names = match section.required::<toml::Value>(KEY)? {
        toml::Value::String(name) => vec![name],
        toml::Value::Array(values) => {
            let names = values.iter().map(|value| value.as_str().map(str::to_owned));
            names.collect::<Option<_>>().ok_or_else(|| {
                section.refuse(KEY, "expected a list of names, such as [\"tensorboard\"]")
            })?
        }
        other => {
            let reason = format!(
                "expected a list of names, such as [\"tensorboard\"], got {}",
                other.type_str()
            );
            return Err(section.refuse(KEY, reason));
        }
    };
    let mut kinds = Vec::new();
    for name in &names {
        let known = TrackerKind::ALL.map(TrackerKind::as_str);
        let Some(index) = known.iter().position(|known| known == name) else {
            let reason = format!("{name:?}: {}", unknown("tracker", name, &known));
            return Err(section.refuse(KEY, reason));
        };
        let kind = TrackerKind::ALL[index];
        if kinds.contains(&kind) {
            return Err(section.refuse(KEY, format!("{name:?} is named twice")));
        }
        kinds.push(kind);
    }
    Ok(kinds)
}

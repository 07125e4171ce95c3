//! What `data.train` and `data.eval` name: files, folders and patterns in, files with their containers out. No file is parsed here.
//!
//! | entry | files |
//! |---|---|
//! | a file | itself |
//! | a folder of `save_to_disk` | the Arrow files that its `state.json` lists, in that order |
//! | any other folder | the files directly in it that a container's extension marks, sorted; all of one container |
//! | a pattern with `*`, `?` or `[` | the files that match, sorted; `**` goes into folders |
//! | `hf://…` | refused with how to download it: training never goes to the network |

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::error::DataError;
use crate::hub_entry::HubEntry;

/// A file and how to read it.
pub(crate) struct Input {
    pub file: Arc<Path>,
    pub container: Container,
}

/// How rows are kept in a file, which its extension says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Container {
    /// JSON lines, or one JSON array.
    Json(Compression),
    Parquet,
    /// An Arrow file or an Arrow stream; its first bytes tell which.
    Arrow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// What a user can be told to give.
const SUPPORTED: &str = ".jsonl, .ndjson or .json (also with .gz or .zst), .parquet, .arrow";

impl Input {
    /// The file's size, 0 if that cannot be told.
    pub fn bytes(&self) -> u64 {
        fs::metadata(&self.file).map_or(0, |metadata| metadata.len())
    }

    /// One file, its container by its name.
    pub fn new(file: &Path) -> Result<Self, DataError> {
        if let Some(container) = Container::of(file) {
            return Ok(Self {
                file: file.into(),
                container,
            });
        }
        // The name of a folder that is not there says nothing either.
        fs::metadata(file).map_err(|source| read(file, source))?;
        refuse(
            file,
            "the name does not say what the file holds",
            &format!("give a file that ends in {SUPPORTED}"),
        )
    }
}

impl Container {
    /// What the name's end says.
    pub fn of(file: &Path) -> Option<Self> {
        let name = file.file_name()?.to_string_lossy().to_lowercase();
        let (stem, compression) = match name.rsplit_once('.')? {
            (stem, "gz") => (stem, Compression::Gzip),
            (stem, "zst") => (stem, Compression::Zstd),
            _ => (name.as_str(), Compression::None),
        };
        match (stem.rsplit_once('.')?.1, compression) {
            ("jsonl" | "ndjson" | "json", compression) => Some(Self::Json(compression)),
            ("parquet", Compression::None) => Some(Self::Parquet),
            ("arrow", Compression::None) => Some(Self::Arrow),
            _ => None,
        }
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Json(_) => "JSON",
            Self::Parquet => "Parquet",
            Self::Arrow => "Arrow",
        }
    }
}

/// The files that `entries` name, in order.
///
/// # Errors
/// An entry that names nothing, or a file that is in no container that can be read.
pub(crate) fn expand(entries: &[PathBuf]) -> Result<Vec<Input>, DataError> {
    let mut inputs = Vec::new();
    for entry in entries {
        let text = entry.to_string_lossy();
        if let Some(hub) = HubEntry::parse(&text) {
            return refuse(
                entry,
                "names a data set of a hub, and training never goes to the network",
                &hub.cure(),
            );
        }
        if entry.is_dir() {
            inputs.extend(folder(entry)?);
        } else if text.contains(['*', '?', '[']) && !entry.exists() {
            inputs.extend(pattern(entry, &text)?);
        } else {
            inputs.push(Input::new(entry)?);
        }
    }
    Ok(inputs)
}

fn folder(folder: &Path) -> Result<Vec<Input>, DataError> {
    let state = folder.join("state.json");
    if state.is_file() {
        return saved(folder, &state);
    }
    if folder.join("dataset_dict.json").is_file() {
        return refuse(
            folder,
            "is a dictionary of splits",
            &format!(
                "name one of its folders, such as {}/train",
                folder.display()
            ),
        );
    }
    let mut inputs: Vec<Input> = Vec::new();
    for entry in fs::read_dir(folder).map_err(|source| read(folder, source))? {
        let file = entry.map_err(|source| read(folder, source))?.path();
        let hidden = file
            .file_name()
            .is_none_or(|name| name.to_string_lossy().starts_with('.'));
        if let (false, true, Some(container)) = (hidden, file.is_file(), Container::of(&file)) {
            inputs.push(Input {
                file: file.into(),
                container,
            });
        }
    }
    inputs.sort_by(|a, b| a.file.cmp(&b.file));
    let Some(first) = inputs.first() else {
        return refuse(
            folder,
            "no file in that folder can be read",
            &format!(
                "name a folder with files that end in {SUPPORTED}, or a pattern that goes deeper, such as {}/**/*.parquet",
                folder.display()
            ),
        );
    };
    // Folders that keep the same rows twice, or a description of them as JSON, are common.
    let name = first.container.name();
    if let Some(other) = inputs.iter().find(|it| it.container.name() != name) {
        return refuse(
            folder,
            &format!(
                "holds {} as well as {}",
                file_name(&first.file),
                file_name(&other.file)
            ),
            "name the ones that are meant with a pattern, such as *.parquet",
        );
    }
    Ok(inputs)
}

/// The files of a Hugging Face `Dataset.save_to_disk` folder.
fn saved(folder: &Path, state: &Path) -> Result<Vec<Input>, DataError> {
    let cure = "save the data set again with save_to_disk";
    let text = fs::read_to_string(state).map_err(|source| read(state, source))?;
    let Ok(value) = serde_json::from_str::<Value>(&text) else {
        return refuse(state, "is not JSON", cure);
    };
    // Rows selected by indices live elsewhere than the rows, in an order that only the indices tell.
    let list = |key: &str| value.get(key).and_then(Value::as_array);
    if list("_indices_data_files").is_some_and(|files| !files.is_empty()) {
        return refuse(
            state,
            "selects rows by indices, as old versions of datasets saved them",
            cure,
        );
    }
    let mut inputs = Vec::new();
    for entry in list("_data_files").into_iter().flatten() {
        let name = entry.get("filename").and_then(Value::as_str).map(Path::new);
        // Only a name: a path would lead out of the folder.
        let Some(name) = name.filter(|name| name.file_name() == Some(name.as_os_str())) else {
            return refuse(
                state,
                &format!("lists {entry} instead of a file's name"),
                cure,
            );
        };
        inputs.push(Input {
            file: folder.join(name).into(),
            container: Container::Arrow,
        });
    }
    if inputs.is_empty() {
        return refuse(state, "lists no file in `_data_files`", cure);
    }
    Ok(inputs)
}

fn pattern(entry: &Path, text: &str) -> Result<Vec<Input>, DataError> {
    let matches = match glob::glob(text) {
        Ok(matches) => matches,
        Err(error) => {
            return refuse(
                entry,
                &format!("is no pattern: {}, character {}", error.msg, error.pos + 1),
                "`*` and `?` match within a name, `**` matches folders, `[a-c]` one character, `[*]` a star",
            );
        }
    };
    let mut files = Vec::new();
    for file in matches {
        let file = file.map_err(|error| DataError::Read {
            file: error.path().into(),
            source: error.into(),
        })?;
        if file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return refuse(
            entry,
            "no file matches this pattern",
            "check it, from the folder that the program runs in",
        );
    }
    files.iter().map(|file| Input::new(file)).collect()
}

fn file_name(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn read(file: &Path, source: std::io::Error) -> DataError {
    DataError::Read {
        file: file.into(),
        source,
    }
}

fn refuse<T>(path: &Path, reason: &str, cure: &str) -> Result<T, DataError> {
    Err(DataError::Input {
        path: path.into(),
        reason: reason.into(),
        cure: cure.into(),
    })
}

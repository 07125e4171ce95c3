//! Downloads data sets of the Hugging Face hub, into the cache that Python's `huggingface_hub` uses. Only who calls [`Hub::fetch`] goes to
//! the network; reading pairs never does.
//!
//! | entry | files |
//! |---|---|
//! | `hf://datasets/OWNER/NAME` | those of the split `train`: `train.jsonl`, `data/train-00000-of-00002.parquet`, `train/0000.parquet`; or the only one |
//! | `…/FILE` | that file |
//! | `…/FOLDER` | the files directly in it that can be read |
//! | `…/PATTERN` | the files that match, as in `data.train` |
//! | `NAME@REVISION` | those of a branch, tag or commit instead of `main`; a `/` in it is `%2F` |

use std::env;
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use crate::error::DataError;
use crate::hub_entry::HubEntry;
use crate::inputs::Container;

/// Tries of a file whose transfer breaks off.
const RETRIES: usize = 3;
/// Files that a refusal lists.
const LISTED_MAX: usize = 8;

/// Where data sets come from and where they are kept.
#[derive(Clone, PartialEq, Eq)]
pub struct Hub {
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// Who asks, for private and gated data sets.
    pub token: Option<String>,
    /// Whether the network is out of bounds.
    pub offline: bool,
    /// The folder for what is downloaded.
    pub cache: PathBuf,
}

/// Without the token.
impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("offline", &self.offline)
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}

impl Hub {
    /// What the variables of Python's `huggingface_hub` say: `HF_ENDPOINT`, `HF_TOKEN` (or the token that `hf auth login` left),
    /// `HF_HUB_OFFLINE`, `HF_HUB_CACHE` or `HF_HOME`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let variable = |name| variable(name).filter(|value| !value.is_empty());
        let home = variable("HF_HOME").map_or_else(
            || {
                env::home_dir()
                    .unwrap_or_default()
                    .join(".cache/huggingface")
            },
            PathBuf::from,
        );
        let endpoint = variable("HF_ENDPOINT").unwrap_or("https://huggingface.co".into());
        let offline = variable("HF_HUB_OFFLINE")
            .unwrap_or_default()
            .to_uppercase();
        Self {
            endpoint: endpoint.trim_end_matches('/').into(),
            token: variable("HF_TOKEN").or_else(|| Cache::new(home.join("hub")).token()),
            offline: ["1", "ON", "YES", "TRUE"].contains(&offline.as_str()),
            cache: variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
        }
    }

    /// The files of an `hf://` entry on this machine, sorted by their names in the data set, downloaded unless they are there
    /// already. Which commit a branch is at is asked every time.
    ///
    /// # Errors
    /// What was asked, what came back, and how to get the files otherwise.
    pub fn fetch(&self, entry: &str) -> Result<Vec<PathBuf>, DataError> {
        let Some(named) = HubEntry::parse(entry) else {
            return refuse(
                entry,
                "names no data set of a hub",
                "write hf://datasets/OWNER/NAME",
            );
        };
        let by_hand = named.cure();
        let (Some([owner, name]), revision) = (&named.owner_and_name, named.revision.as_deref())
        else {
            return refuse(
                entry,
                "names no owner with a data set",
                "write hf://datasets/OWNER/NAME",
            );
        };
        let revision = revision.unwrap_or("main");
        if !is_name(owner) || !is_name(name) || !revision.split('/').all(is_name) {
            return refuse(
                entry,
                "has an owner, a name or a revision that a hub does not have",
                "letters, digits, `-`, `_` and `.` are what they may be made of",
            );
        }
        let id = format!("{owner}/{name}");
        if self.offline {
            let cure = format!("unset it, or {by_hand}");
            let reason = format!("HF_HUB_OFFLINE is set, so {} was not asked", self.endpoint);
            return refuse(entry, &reason, &cure);
        }
        let asked = |url: &str, error: &ApiError| self.failure(entry, &id, url, error, &by_hand);
        let api = self.api().map_err(|error| asked(&self.endpoint, &error))?;
        let at =
            |revision: &str| Repo::with_revision(id.clone(), RepoType::Dataset, revision.into());

        let url = format!("{}/api/{}", self.endpoint, at(revision).api_url());
        let info = api
            .repo(at(revision))
            .info()
            .map_err(|error| asked(&url, &error))?;
        let mut names: Vec<String> = info.siblings.into_iter().map(|it| it.rfilename).collect();
        names.sort();
        // Names become paths of the cache.
        if !is_name(&info.sha) || !names.iter().all(|name| stays_inside(name)) {
            let reason = format!("{url} lists names that lead out of the data set");
            return refuse(entry, &reason, &by_hand);
        }
        let chosen = match named.inside.as_deref() {
            Some(inside) => inside_of(&names, inside),
            None => train(&names),
        };
        let chosen = chosen.or_else(|reason| {
            let cure = format!(
                "name files as hf://datasets/{id}/FILE; there are {}",
                listed(&names)
            );
            refuse(entry, &reason, &cure)
        })?;
        // One commit for all files, whatever happens to the branch meanwhile.
        let repo = api.repo(at(&info.sha));
        let get = |name: &&String| {
            repo.get(name)
                .map_err(|error| asked(&repo.url(name), &error))
        };
        chosen.iter().map(get).collect()
    }

    fn api(&self) -> Result<Api, ApiError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(RETRIES)
            .with_progress(false)
            .build()
    }

    /// What an answer, or none, means.
    fn failure(
        &self,
        entry: &str,
        id: &str,
        url: &str,
        error: &ApiError,
        by_hand: &str,
    ) -> DataError {
        let reason = match status(error) {
            Some(status) => format!("{url} answered {status}"),
            None => format!("asked for {url}: {error}"),
        };
        let (meaning, cure) = match (status(error), &self.token) {
            (Some(401 | 403), None) => (
                ": there is no such data set, or it is private or gated and no token was sent",
                format!(
                    "check the name, accept its terms at {}/datasets/{id} and set HF_TOKEN",
                    self.endpoint
                ),
            ),
            (Some(401 | 403), Some(_)) => (
                ": it is private or gated, and the token that was sent has no access",
                format!(
                    "accept its terms at {}/datasets/{id}, or set HF_TOKEN to a token of somebody who has access",
                    self.endpoint
                ),
            ),
            (Some(404), _) => (
                ": there is no such data set, revision or file",
                "check the name; a private one needs HF_TOKEN".into(),
            ),
            _ => ("", "try again, or set HF_ENDPOINT to a mirror".into()),
        };
        DataError::Input {
            path: entry.into(),
            reason: format!("{reason}{meaning}"),
            cure: format!("{cure}, or {by_hand}"),
        }
    }
}

/// The status of an answer that is no success.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match error.as_ref() {
            ureq::Error::StatusCode(status) => Some(*status),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

/// The files of the split `train`, or why there are none.
fn train(names: &[String]) -> Result<Vec<&String>, String> {
    let readable: Vec<&String> = names
        .iter()
        .filter(|name| container(name).is_some())
        .collect();
    if readable.len() == 1 {
        return Ok(readable);
    }
    let is_train = |part: &str| matches!(part.split(['-', '.']).next(), Some("train" | "training"));
    let chosen: Vec<&String> = readable
        .into_iter()
        .filter(|name| name.split('/').any(is_train))
        .collect();
    let Some(first) = chosen.first() else {
        return Err("none of its files is called train".into());
    };
    // Several configurations, or the same rows twice.
    let kind = |name: &str| {
        (
            parent(name).to_owned(),
            container(name).map(Container::name),
        )
    };
    if chosen.iter().any(|name| kind(name) != kind(first)) {
        return Err("it has train files in several folders or containers".into());
    }
    Ok(chosen)
}

/// The files that a file's name, a folder's name or a pattern names, or why there are none.
fn inside_of<'a>(names: &'a [String], inside: &str) -> Result<Vec<&'a String>, String> {
    let folder = inside.trim_end_matches('/');
    let pattern =
        glob::Pattern::new(inside).map_err(|error| format!("is no pattern: {}", error.msg))?;
    let options = glob::MatchOptions {
        require_literal_separator: true,
        ..glob::MatchOptions::new()
    };
    let meant = |name: &&String| {
        *name == inside
            || container(name).is_some() && parent(name) == folder
            || pattern.matches_with(name, options)
    };
    let chosen: Vec<&String> = names.iter().filter(meant).collect();
    if chosen.is_empty() {
        return Err(format!("it has no {inside}"));
    }
    Ok(chosen)
}

fn container(name: &str) -> Option<Container> {
    Container::of(Path::new(name))
}

fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

fn is_name(text: &str) -> bool {
    let known = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
    !text.is_empty() && text != "." && text != ".." && text.chars().all(known)
}

fn stays_inside(name: &str) -> bool {
    let parts = Path::new(name).components();
    !name.is_empty()
        && parts
            .into_iter()
            .all(|part| matches!(part, Component::Normal(_)))
}

fn listed(names: &[String]) -> String {
    let readable = names.iter().filter(|name| container(name).is_some());
    let first: Vec<&str> = readable
        .clone()
        .take(LISTED_MAX)
        .map(String::as_str)
        .collect();
    match readable.count().saturating_sub(LISTED_MAX) {
        _ if first.is_empty() => "none that can be read".into(),
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

fn refuse<T>(entry: &str, reason: &str, cure: &str) -> Result<T, DataError> {
    Err(DataError::Input {
        path: entry.into(),
        reason: reason.into(),
        cure: cure.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_of_huggingface_hub_are_honoured() {
        let hub = |set: &[(&str, &str)]| {
            Hub::from_variables(|name| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let home = tempfile::tempdir().expect("a folder");
        let home_name = home.path().to_str().expect("a name");
        let bare = hub(&[
            ("HF_HOME", home_name),
            ("HF_TOKEN", ""),
            ("HF_HUB_OFFLINE", "0"),
        ]);
        let expected = Hub {
            endpoint: "https://huggingface.co".into(),
            token: None,
            offline: false,
            cache: home.path().join("hub"),
        };
        assert_eq!(bare, expected);
        std::fs::write(home.path().join("token"), "hf_file\n").expect("a file");
        let set = hub(&[
            ("HF_HOME", home_name),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "true"),
            ("HF_HUB_CACHE", "/elsewhere"),
        ]);
        let expected = Hub {
            endpoint: "http://mirror".into(),
            token: Some("hf_file".into()),
            offline: true,
            cache: "/elsewhere".into(),
        };
        assert_eq!(set, expected);
        let named = hub(&[("HF_HOME", home_name), ("HF_TOKEN", "hf_named")]);
        assert_eq!(named.token.as_deref(), Some("hf_named"));
        assert!(!format!("{named:?}").contains("hf_named"));
    }
}

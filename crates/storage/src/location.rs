//! What a path or URL stands for. Parsed once, where it enters; nobody is asked whether it exists.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{FileError, files::at};

/// Where a folder is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// On a disk of this machine, or one that it has mounted.
    Local(PathBuf),
    /// In an object store.
    Remote(RemoteUrl),
}

/// The parts of `scheme://bucket/prefix`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(feature = "object-store"),
    allow(dead_code, reason = "what opens it is not built")
)]
pub(crate) struct RemoteUrl {
    pub scheme: Scheme,
    pub bucket: String,
    /// Without slashes at its ends; may be empty.
    pub prefix: String,
}

/// Which service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scheme {
    S3,
    Gcs,
    Azure,
    Memory,
}

impl Scheme {
    pub fn name(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gcs => "gs",
            Self::Azure => "az",
            Self::Memory => "memory",
        }
    }
}

/// Whether `location` names an object store, and not a folder of a disk: no directory can be made there, no lock held and no
/// file opened.
pub fn is_remote(location: &Path) -> bool {
    split(location).is_some_and(|(scheme, _)| scheme != "file")
}

/// Whether `location` is a path or a URL that could be opened by a program that has object stores built in.
///
/// # Errors
/// Why it could not.
pub fn check_location(location: &Path) -> Result<(), FileError> {
    parse(location).map(drop)
}

/// The scheme and the rest of a URL; none for a path.
fn split(location: &Path) -> Option<(&str, &str)> {
    let (scheme, rest) = location.to_str()?.split_once("://")?;
    let word = !scheme.is_empty()
        && scheme
            .chars()
            .all(|it| it.is_ascii_alphanumeric() || "+-.".contains(it));
    word.then_some((scheme, rest))
}

pub(crate) fn parse(location: &Path) -> Result<Location, FileError> {
    let Some((scheme, rest)) = split(location) else {
        return Ok(Location::Local(location.to_owned()));
    };
    let scheme = match scheme {
        "file" => return file(location, rest),
        "s3" => Scheme::S3,
        "gs" => Scheme::Gcs,
        "az" => Scheme::Azure,
        "memory" => Scheme::Memory,
        _ => {
            let reason = format!("`{scheme}` is none of file, s3, gs, az and memory");
            return Err(refuse(location, &reason));
        }
    };
    Ok(Location::Remote(remote(location, scheme, rest)?))
}

fn file(location: &Path, rest: &str) -> Result<Location, FileError> {
    if !rest.starts_with('/') {
        return Err(refuse(
            location,
            "a file URL has three slashes, as in file:///srv/checkpoints",
        ));
    }
    if rest.contains('%') {
        return Err(refuse(
            location,
            "percent-encoding is not undone; write it as a plain path",
        ));
    }
    Ok(Location::Local(rest.into()))
}

fn remote(location: &Path, scheme: Scheme, rest: &str) -> Result<RemoteUrl, FileError> {
    if rest.contains(['@', '?', '#']) {
        // What follows may be a secret: it is not repeated.
        let shown = format!("{}://…", scheme.name());
        let reason = "a URL has a bucket and a prefix and nothing else; credentials and options come from the environment";
        return Err(refuse(Path::new(&shown), reason));
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_end_matches('/');
    if bucket.is_empty() {
        let reason = format!(
            "it names no bucket, as in {}://bucket/prefix",
            scheme.name()
        );
        return Err(refuse(location, &reason));
    }
    if !prefix.is_empty()
        && prefix
            .split('/')
            .any(|part| matches!(part, "" | "." | ".."))
    {
        return Err(refuse(
            location,
            "a part of its prefix is empty, `.` or `..`",
        ));
    }
    Ok(RemoteUrl {
        scheme,
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
    })
}

fn refuse(location: &Path, reason: &str) -> FileError {
    at("use", location)(io::Error::new(io::ErrorKind::InvalidInput, reason))
}

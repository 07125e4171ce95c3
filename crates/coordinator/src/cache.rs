//! `coordinator cache`: the reference store from outside of runs. What is done there is `refcache`'s; this is its words.

use std::{
    env,
    fmt::Write as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use refcache::{
    Action, Cleaned, CleanedScope, Cleaning, CompactedScope, Compaction, ScopeReport, StoreError,
    clean, compact, inspect, shared_folder, size,
};
use serde_json::{Value, json};

use crate::{
    numbers::{counted, grouped},
    run::{EXIT_DONE, EXIT_FAILED, EXIT_TEMPORARY, EXIT_USAGE},
    timestamp::rfc3339,
    ui,
};

const BAR: &str = "{spinner:.green} {bytes}/{total_bytes} [{bar:32.cyan/dim}] {bytes_per_sec}";

/// What to do with a store of reference log-probs.
#[derive(Subcommand)]
pub enum Cache {
    /// List the scopes: what their values are valid for, how many there are, when a run last used them.
    Inspect {
        /// The store, `reference.store` of a job.
        store: PathBuf,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Read every byte and check that duplicate entries agree; name file and offset of what is wrong.
    ///
    /// Exit codes: 0 all is well, 1 something is damaged, 2 no store there.
    Verify {
        /// The store, `reference.store` of a job.
        store: PathBuf,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Remove scopes that nobody has used for long, and merge the segments of each other scope into one.
    ///
    /// Scopes that a run has open are left alone. Of a shared folder the segments of each scope become one while runs read
    /// and write it; that takes room for the largest scope twice in the folder for temporary files (TMPDIR). Exit codes: 0
    /// done, 1 something is damaged and was left alone, 2 no store there, 75 something is in use.
    Gc {
        /// The store, `reference.store` of a job; with --shared, or where it is the URL of an object store, what machines
        /// share, `reference.shared`.
        store: PathBuf,
        /// STORE is a folder that machines share.
        #[arg(long)]
        shared: bool,
        /// Remove scopes that no run has opened for so many days; without it none is removed. Not of what machines share.
        #[arg(long, value_name = "DAYS")]
        older_than: Option<u32>,
        /// Tell what would be done.
        #[arg(long)]
        dry_run: bool,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// What a command has to say.
struct Answer {
    text: String,
    /// For standard error.
    complaints: Vec<String>,
    code: u8,
}

/// Does it and prints what there is to tell; gives the exit code.
///
/// # Errors
/// The store could not be read or changed.
pub fn run(cache: &Cache) -> anyhow::Result<u8> {
    let (Cache::Inspect { store, .. } | Cache::Verify { store, .. } | Cache::Gc { store, .. }) =
        cache;
    let is_remote = storage::is_remote(store);
    if let Some(reason) = refusal(cache, is_remote) {
        eprintln!("error: {reason}");
        return Ok(EXIT_USAGE);
    }
    let answer = match *cache {
        Cache::Gc {
            ref store,
            shared,
            dry_run,
            json,
            ..
        } if shared || is_remote => {
            let folder = shared_folder(store)?;
            let scopes = compact(&folder, &env::temp_dir(), SystemTime::now(), dry_run)?;
            compacted(store, &scopes, dry_run, json)
        }
        Cache::Inspect { ref store, json } => inspected(store, &look(store)?, json),
        Cache::Verify { ref store, json } => verified(store, &look(store)?, json),
        Cache::Gc {
            ref store,
            older_than,
            dry_run,
            json,
            ..
        } => {
            let cleaning = Cleaning {
                unused_for: older_than.map(|days| days * Duration::from_hours(24)),
                now: SystemTime::now(),
                dry_run,
            };
            cleaned(store, &clean(store, &cleaning)?, dry_run, json)
        }
    };
    for complaint in &answer.complaints {
        eprintln!("error: {complaint}");
    }
    ui::print(&answer.text)?;
    Ok(answer.code)
}

/// Why a command is not one to carry out, if it is not.
fn refusal(cache: &Cache, is_remote: bool) -> Option<String> {
    match cache {
        Cache::Gc {
            shared,
            older_than: Some(_),
            ..
        } if *shared || is_remote => {
            Some("--older-than is not of what machines share: nobody knows who uses it".to_owned())
        }
        Cache::Gc { .. } if is_remote => None,
        Cache::Inspect { store, .. } | Cache::Verify { store, .. } if is_remote => Some(format!(
            "{} is what machines share: name the folder of a store, or clean it with `cache gc`",
            store.display()
        )),
        Cache::Inspect { store, .. } | Cache::Verify { store, .. } | Cache::Gc { store, .. } => {
            let missing = !store.is_dir();
            missing.then(|| format!("there is no store at {}", store.display()))
        }
    }
}

/// Reads every byte, with a bar when standard error is a terminal.
fn look(store: &Path) -> Result<Vec<ScopeReport>, StoreError> {
    let bar = ProgressBar::new(size(store)?)
        .with_style(ProgressStyle::with_template(BAR).expect("the template is well formed"));
    let reports = inspect(store, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    reports
}

fn inspected(store: &Path, scopes: &[ScopeReport], json: bool) -> Answer {
    let text = if json {
        let scopes: Vec<_> = scopes.iter().map(scope_json).collect();
        json!({"store": store, "scopes": scopes}).to_string()
    } else {
        let blocks: Vec<_> = scopes.iter().map(scope_text).collect();
        format!("{}\n{}", blocks.join("\n"), totals(store, scopes))
    };
    Answer {
        text,
        complaints: Vec::new(),
        code: EXIT_DONE,
    }
}

fn verified(store: &Path, scopes: &[ScopeReport], json: bool) -> Answer {
    let damages: Vec<_> = scopes.iter().flat_map(|scope| &scope.damages).collect();
    let ok = damages.is_empty();
    let text = if json {
        let scopes: Vec<_> = scopes.iter().map(scope_json).collect();
        json!({"store": store, "ok": ok, "scopes": scopes}).to_string()
    } else {
        let mut text = String::new();
        for tail in scopes.iter().flat_map(|scope| &scope.torn) {
            let _ = writeln!(text, "note: {tail}");
        }
        text += &totals(store, scopes);
        text += if ok { "; every byte verified" } else { "" };
        text
    };
    Answer {
        text,
        complaints: damages.iter().map(ToString::to_string).collect(),
        code: if ok { EXIT_DONE } else { EXIT_FAILED },
    }
}

fn cleaned(store: &Path, cleaned: &Cleaned, dry_run: bool, json: bool) -> Answer {
    let damages = cleaned.scopes.iter().filter_map(|scope| {
        let damaged = scope.action == Action::Damaged;
        damaged.then_some(&scope.before.damages)
    });
    let complaints = damages.flatten().chain(&cleaned.in_use);
    let freed: u64 = cleaned
        .scopes
        .iter()
        .map(|scope| scope.before.bytes.saturating_sub(scope.bytes))
        .sum();
    let text = if json {
        let scopes: Vec<_> = cleaned.scopes.iter().map(cleaned_json).collect();
        let in_use: Vec<_> = cleaned.in_use.iter().map(ToString::to_string).collect();
        json!({
            "store": store,
            "dry_run": dry_run,
            "scopes": scopes,
            "in_use": in_use,
            "leftovers": cleaned.leftovers,
            "bytes_freed": freed,
        })
        .to_string()
    } else {
        let scopes = cleaned.scopes.iter();
        let mut text: String = scopes.map(|scope| cleaned_text(scope, dry_run)).collect();
        for path in &cleaned.leftovers {
            let verb = if dry_run { "would remove" } else { "removed" };
            let _ = writeln!(text, "{verb} {}, left by a crash", path.display());
        }
        let verb = if dry_run { "would free" } else { "freed" };
        let _ = write!(text, "{verb} {} bytes", grouped(freed));
        text
    };
    let damaged = |scope: &CleanedScope| scope.action == Action::Damaged;
    Answer {
        text,
        complaints: complaints.map(ToString::to_string).collect(),
        code: if cleaned.scopes.iter().any(damaged) {
            EXIT_FAILED
        } else if cleaned.in_use.is_empty() {
            EXIT_DONE
        } else {
            EXIT_TEMPORARY
        },
    }
}

fn compacted(store: &Path, scopes: &[CompactedScope], dry_run: bool, json: bool) -> Answer {
    let damages: Vec<_> = scopes.iter().flat_map(|scope| &scope.damages).collect();
    let claimed = scopes
        .iter()
        .filter(|scope| scope.compaction == Compaction::Claimed)
        .count();
    // Of a dry run nobody knows how much would be left.
    let freed = scopes.iter().map(|scope| match scope.compaction {
        Compaction::Merged {
            bytes_before,
            bytes: Some(bytes),
            ..
        } => bytes_before.saturating_sub(bytes),
        _ => 0,
    });
    let freed: u64 = freed.sum();
    let text = if json {
        json!({
            "store": store,
            "dry_run": dry_run,
            "scopes": scopes.iter().map(compacted_json).collect::<Vec<_>>(),
            "bytes_freed": if dry_run { Value::Null } else { freed.into() },
        })
        .to_string()
    } else {
        let mut text: String = scopes.iter().map(compacted_text).collect();
        if dry_run {
            text += "nothing was changed";
        } else {
            let _ = write!(text, "freed {} bytes", grouped(freed));
        }
        text
    };
    Answer {
        text,
        complaints: damages.iter().map(ToString::to_string).collect(),
        code: if !damages.is_empty() {
            EXIT_FAILED
        } else if claimed > 0 {
            EXIT_TEMPORARY
        } else {
            EXIT_DONE
        },
    }
}

fn compacted_text(scope: &CompactedScope) -> String {
    let (verb, what) = match scope.compaction {
        Compaction::Unneeded if scope.damages.is_empty() => ("kept", "nothing to do".to_owned()),
        Compaction::Unneeded => (
            "left alone",
            "damaged, delete the files that are named first".to_owned(),
        ),
        Compaction::Claimed => (
            "left alone",
            "another process merges its segments, or died at it within the hour".to_owned(),
        ),
        Compaction::Merged {
            segments,
            bytes_before,
            bytes,
        } => {
            let merged = counted(segments as u64, "segment");
            let before = grouped(bytes_before);
            match bytes {
                Some(bytes) => (
                    "merged",
                    format!("{merged} into one, {before} bytes to {}", grouped(bytes)),
                ),
                None => (
                    "would merge",
                    format!("{merged} of {before} bytes into one"),
                ),
            }
        }
    };
    format!("{verb} {}: {what}\n", scope.digest)
}

fn compacted_json(scope: &CompactedScope) -> Value {
    let (action, merged, bytes_before, bytes) = match scope.compaction {
        Compaction::Unneeded if scope.damages.is_empty() => ("kept", 0, None, None),
        Compaction::Unneeded => ("damaged", 0, None, None),
        Compaction::Claimed => ("claimed", 0, None, None),
        Compaction::Merged {
            segments,
            bytes_before,
            bytes,
        } => ("merged", segments, Some(bytes_before), bytes),
    };
    json!({
        "digest": scope.digest,
        "segments": scope.segments,
        "action": action,
        "merged": merged,
        "bytes_before": bytes_before,
        "bytes": bytes,
        "damages": damages_json(&scope.damages),
    })
}

fn scope_text(report: &ScopeReport) -> String {
    let mut text = format!("scope         {}\n", report.digest);
    if let Some(scope) = &report.scope {
        let fields = json!(scope);
        for (name, value) in fields.as_object().into_iter().flatten() {
            let value = value.as_str().map_or(value.to_string(), ToOwned::to_owned);
            let _ = writeln!(text, "{:<13} {value}", name.replace('_', " "));
        }
    }
    let _ = writeln!(
        text,
        "entries       {} in {}, {} bytes\n\
         last used     {}",
        grouped(report.entries as u64),
        counted(report.segments as u64, "segment"),
        grouped(report.bytes),
        rfc3339(report.used)
    );
    for tail in &report.torn {
        let _ = writeln!(text, "note          {tail}");
    }
    for damage in &report.damages {
        let _ = writeln!(text, "damaged       {damage}");
    }
    text
}

fn scope_json(report: &ScopeReport) -> Value {
    let torn = report
        .torn
        .iter()
        .map(|tail| json!({"path": tail.path, "offset": tail.offset, "bytes": tail.bytes}));
    json!({
        "digest": report.digest,
        "folder": report.folder,
        "scope": report.scope,
        "entries": report.entries,
        "segments": report.segments,
        "bytes": report.bytes,
        "last_used": rfc3339(report.used),
        "unfinished": torn.collect::<Vec<_>>(),
        "damages": damages_json(&report.damages),
    })
}

fn damages_json(damages: &[StoreError]) -> Vec<Value> {
    let told = damages.iter().map(|damage| {
        let (path, offset) = damage.place().unzip();
        json!({"path": path, "offset": offset, "reason": damage.to_string()})
    });
    told.collect()
}

fn cleaned_text(scope: &CleanedScope, dry_run: bool) -> String {
    let before = &scope.before;
    let did = |done, would| if dry_run { would } else { done };
    let (verb, what) = match scope.action {
        Action::Kept => ("kept", "nothing to do".to_owned()),
        Action::Damaged => (
            "left alone",
            "damaged, delete the files that are named first".to_owned(),
        ),
        Action::Merged => (
            did("merged", "would merge"),
            format!(
                "{} into {} of {}, {} bytes to {}",
                counted(before.segments as u64, "segment"),
                match scope.segments {
                    1 => "one".to_owned(),
                    more => grouped(more as u64),
                },
                counted(before.entries as u64, "entry"),
                grouped(before.bytes),
                grouped(scope.bytes)
            ),
        ),
        Action::Removed => (
            did("removed", "would remove"),
            format!(
                "{} in {} bytes, last used {}",
                counted(before.entries as u64, "entry"),
                grouped(before.bytes),
                rfc3339(before.used)
            ),
        ),
    };
    format!("{verb} {}: {what}\n", before.digest)
}

fn cleaned_json(scope: &CleanedScope) -> Value {
    let action = match scope.action {
        Action::Kept => "kept",
        Action::Merged => "merged",
        Action::Removed => "removed",
        Action::Damaged => "damaged",
    };
    json!({
        "action": action,
        "segments": scope.segments,
        "bytes": scope.bytes,
        "before": scope_json(&scope.before),
    })
}

fn totals(store: &Path, scopes: &[ScopeReport]) -> String {
    let sum = |of: fn(&ScopeReport) -> u64| scopes.iter().map(of).sum();
    format!(
        "{}: {}, {}, {} bytes",
        store.display(),
        counted(scopes.len() as u64, "scope"),
        counted(sum(|scope| scope.entries as u64), "entry"),
        grouped(sum(|scope| scope.bytes))
    )
}

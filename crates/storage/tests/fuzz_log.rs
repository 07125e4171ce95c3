//! Logs of any bytes, the coordinator's journal among them: refused, or read as what they are. Never a panic, never a record
//! that is not there, never more memory than the file has bytes.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "fuzz/mod.rs"]
mod fuzz;

use std::{
    fs::{self, File},
    path::Path,
};

use fuzz::{Counting, edited, edits, fuzz, peak, sealed_log};
use proptest::{collection::vec, prelude::*, test_runner::TestCaseError};
use storage::log::{FRAME_BYTES, HEADER_BYTES, Log, LogError, RECORD_BYTES_MAX, parse};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A log of these records, made without the code that is tested and without syncs, which would take most of the time.
fn log(records: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = b"CALDPLOG\x01\0\0\0....".to_vec();
    for record in records {
        bytes.extend_from_slice(&(record.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&[0; FRAME_BYTES - 4]);
        bytes.extend_from_slice(record);
    }
    sealed_log(bytes)
}

/// Parses `bytes` and checks all that can be said of them without parsing.
fn check(whole: &[u8], bytes: &[u8], resealed: bool) -> Result<(), TestCaseError> {
    let path = Path::new("log");
    let (taken, parsed) = peak(|| parse(path, bytes));
    // Each record's payload, and what a list of empty ones takes while it grows.
    let most = 4 * bytes.len() + (4 << 10);
    prop_assert!(taken <= most, "{taken} bytes for {} of log", bytes.len());
    let found = match parsed {
        Ok(found) => found,
        Err(LogError::Damaged { offset, .. }) => {
            prop_assert!(offset <= bytes.len() as u64);
            return Ok(());
        }
        Err(other) => return Err(TestCaseError::fail(other.to_string())),
    };
    let end = found.end as usize;
    prop_assert_eq!(end as u64 + found.torn_bytes, bytes.len() as u64);
    // Nothing is read that is not there: the records, written anew, are the file's bytes.
    let records: Vec<Vec<u8>> = found.records.into_iter().map(|it| it.payload).collect();
    prop_assert_eq!(log(&records), &bytes[..end]);
    // Without a program that makes checksums, only whole records from the beginning are left.
    prop_assert!(resealed || whole.starts_with(&bytes[..end]));
    Ok(())
}

/// What [`Log::open`] makes of a file is what [`parse`] says of its bytes. It syncs what it cuts off: a few cases are enough.
fn opens(path: &Path, bytes: &[u8]) -> Result<(), TestCaseError> {
    fs::write(path, bytes).unwrap();
    match (parse(path, bytes), Log::open(path)) {
        (Ok(found), Ok(opened)) => {
            prop_assert!(
                found
                    .records
                    .iter()
                    .map(|it| &it.payload)
                    .eq(&opened.records)
            );
            prop_assert_eq!(found.torn_bytes, opened.torn_bytes);
            prop_assert_eq!(fs::read(path).unwrap(), &bytes[..found.end as usize]);
        }
        (Err(found), Err(opened)) => {
            prop_assert_eq!(found.to_string(), opened.to_string());
            prop_assert_eq!(fs::read(path).unwrap(), bytes, "a refused log was changed");
        }
        (parsed, opened) => {
            return Err(TestCaseError::fail(format!("{parsed:?} but {opened:?}")));
        }
    }
    Ok(())
}

#[test]
fn a_log_of_any_bytes_is_refused_or_read_as_what_it_is_in_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let records = [b"one".to_vec(), vec![7; 100]];
    let whole = log(&records);
    let mut opened = Log::open(&path).unwrap().log;
    for record in &records {
        opened.append(record).unwrap();
    }
    assert_eq!(fs::read(&path).unwrap(), whole);
    // Lengths that lie under a checksum that holds: the most that a record may have, and more.
    for length in [RECORD_BYTES_MAX, RECORD_BYTES_MAX + 1, u32::MAX as usize] {
        let mut bytes = whole.clone();
        let length = (length as u32).to_le_bytes();
        bytes[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&length);
        check(&whole, &sealed_log(bytes), true).unwrap();
    }
    // A quarter of a GiB of zeros behind the last record, a hole in the file.
    fs::write(&path, &whole).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 28)
        .unwrap();
    let (taken, start) = peak(|| Log::open(&path).map(|it| it.records.len()));
    assert_eq!(
        (start.unwrap(), taken < 64 << 10),
        (2, true),
        "{taken} bytes"
    );
    let records = || vec(vec(any::<u8>(), 0..60), 0..12);
    let reseal = prop_oneof![1 => Just(false), 3 => Just(true)];
    fuzz(
        "log",
        20_000,
        &(records(), edits(), reseal),
        |(records, edits, reseal)| {
            let whole = log(&records);
            let mut bytes = edited(&whole, &edits);
            if reseal {
                bytes = sealed_log(bytes);
            }
            check(&whole, &bytes, reseal)
        },
    );
    fuzz(
        "log on a disk",
        60,
        &(records(), edits()),
        |(records, edits)| opens(&path, &sealed_log(edited(&log(&records), &edits))),
    );
}

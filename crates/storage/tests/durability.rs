//! What the storage primitives promise, broken on purpose at every byte.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{fs, path::Path};

use storage::{
    Lock, LockError, atomic_write,
    log::{Log, LogError},
};

fn records() -> Vec<Vec<u8>> {
    vec![b"one".to_vec(), Vec::new(), vec![7; 100], b"four".to_vec()]
}

fn written(path: &Path) -> Vec<u8> {
    let mut log = Log::open(path).unwrap().log;
    for record in records() {
        log.append(&record).unwrap();
    }
    fs::read(path).unwrap()
}

#[test]
fn a_log_gives_back_its_records_and_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.log");
    written(&path);
    let mut opened = Log::open(&path).unwrap();
    assert_eq!((opened.records, opened.torn_bytes), (records(), 0));
    opened.log.append(b"five").unwrap();
    drop(opened.log);
    assert_eq!(Log::open(&path).unwrap().records.len(), 5);
}

#[test]
fn a_crash_at_every_byte_of_the_last_record_loses_only_that_record() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.log");
    let whole = written(&path);
    let last = 40 + 4;
    for cut in 1..=last {
        fs::write(&path, &whole[..whole.len() - cut]).unwrap();
        let mut opened = Log::open(&path).unwrap();
        assert_eq!(opened.records, records()[..3], "cut {cut}");
        assert_eq!(opened.torn_bytes, (last - cut) as u64, "cut {cut}");
        opened.log.append(b"again").unwrap();
        drop(opened.log);
        assert_eq!(Log::open(&path).unwrap().records[3], b"again");
    }
}

#[test]
fn every_flipped_bit_is_detected_and_the_log_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.log");
    let whole = written(&path);
    for bit in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &damaged).unwrap();
        match Log::open(&path) {
            Err(LogError::Damaged { offset, .. }) => assert!(offset <= (bit / 8) as u64),
            other => panic!("bit {bit}: {other:?}"),
        }
        assert_eq!(fs::read(&path).unwrap(), damaged, "bit {bit}");
    }
}

#[test]
fn a_removed_record_is_detected() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.log");
    let mut whole = written(&path);
    whole.drain(16..16 + 40 + 3);
    fs::write(&path, &whole).unwrap();
    let error = Log::open(&path).unwrap_err().to_string();
    assert!(error.contains("byte 16"), "{error}");
}

#[test]
fn an_atomic_write_replaces_and_leaves_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("summary.json");
    atomic_write(&path, b"old").unwrap();
    atomic_write(&path, b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_failed_atomic_write_names_the_path_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let taken = directory.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("inside"), b"x").unwrap();
    let error = atomic_write(&taken, b"new").unwrap_err().to_string();
    assert!(error.contains("taken"), "{error}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_second_holder_is_refused_and_told_who_has_the_lock() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lock");
    let lock = Lock::acquire(&path).unwrap();
    match Lock::acquire(&path) {
        Err(LockError::Held { holder, .. }) => {
            assert_eq!(holder, std::process::id().to_string());
        }
        other => panic!("{other:?}"),
    }
    drop(lock);
    Lock::acquire(&path).unwrap();
}

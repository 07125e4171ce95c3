//! What the storage primitives promise, broken on purpose at every byte.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{fs, path::Path, thread, time::Duration};

use storage::{
    AppendFile, DurableFile, LineFile, Lock, LockError, atomic_write, create_directory,
    log::{self, Log, LogError},
    remove_directory, remove_file, rename, space,
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
fn zeros_that_a_power_cut_left_of_the_last_record_are_a_torn_tail_and_zeros_before_a_record_are_not()
 {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.log");
    let whole = written(&path);
    let last = whole.len() - 44;
    for count in [1, 8, 39, 40, 44, 5000] {
        fs::write(&path, [&whole[..last], &vec![0; count]].concat()).unwrap();
        let opened = Log::open(&path).unwrap();
        assert_eq!(opened.records, records()[..3], "{count} zeros");
        assert_eq!(opened.torn_bytes, count as u64);
        assert_eq!(fs::read(&path).unwrap(), whole[..last]);
    }
    let buried = [&whole[..last], &[0; 40], &whole[last..]].concat();
    fs::write(&path, buried).unwrap();
    let error = Log::open(&path).unwrap_err();
    assert!(
        matches!(error, LogError::Damaged { offset, .. } if offset == last as u64),
        "{error}"
    );
}

#[test]
fn a_log_that_is_only_read_gives_the_same_records_and_stays_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.log");
    let whole = written(&path);
    let ends = [16, 59, 99, 239, 283];
    assert_eq!(whole.len(), ends[4]);
    for size in 16..=whole.len() {
        fs::write(&path, &whole[..size]).unwrap();
        let read = log::read(&path).unwrap();
        let count = ends.iter().filter(|end| **end <= size).count() - 1;
        for (index, record) in read.records.iter().enumerate() {
            assert_eq!(record.payload, records()[index], "cut at {size}");
            assert_eq!(record.offset, ends[index] as u64, "cut at {size}");
        }
        assert_eq!(read.records.len(), count, "cut at {size}");
        assert_eq!(read.end, ends[count] as u64, "cut at {size}");
        assert_eq!(read.torn_bytes, (size - ends[count]) as u64);
        assert_eq!(fs::read(&path).unwrap(), whole[..size], "cut at {size}");
    }
}

#[test]
fn reading_a_log_creates_nothing_and_refuses_damage() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.log");
    assert!(matches!(log::read(&path), Err(LogError::File(_))));
    assert!(!path.exists());
    let mut bytes = written(&path);
    bytes[60] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let error = log::read(&path).unwrap_err();
    assert!(
        matches!(error, LogError::Damaged { offset: 59, .. }),
        "{error}"
    );
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

#[test]
fn a_shared_lock_keeps_out_who_wants_it_alone_and_nobody_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lock");
    let shared = [(); 2].map(|()| Lock::share(&path, Duration::ZERO).unwrap());
    assert!(matches!(
        Lock::acquire(&path),
        Err(LockError::Shared { .. })
    ));
    drop(shared);
    let alone = Lock::acquire(&path).unwrap();
    match Lock::share(&path, Duration::ZERO) {
        Err(LockError::Held { holder, .. }) => {
            assert_eq!(holder, std::process::id().to_string());
        }
        other => panic!("{other:?}"),
    }
    thread::scope(|threads| {
        let waiting = threads.spawn(|| Lock::share(&path, Duration::from_mins(1)));
        drop(alone);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn a_lock_whose_folder_was_moved_away_is_not_taken_in_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let [folder, moved] = ["folder", "moved"].map(|name| directory.path().join(name));
    fs::create_dir(&folder).unwrap();
    let path = folder.join("lock");
    let alone = Lock::acquire(&path).unwrap();
    thread::scope(|threads| {
        let waiting = threads.spawn(|| {
            loop {
                // Between the two folders there is no place for a lock.
                match Lock::share(&path, Duration::from_mins(1)) {
                    Err(LockError::File(_)) => {}
                    other => return other,
                }
            }
        });
        fs::rename(&folder, &moved).unwrap();
        fs::create_dir(&folder).unwrap();
        drop(alone);
        let _shared = waiting.join().unwrap().unwrap();
        assert!(matches!(
            Lock::acquire(&path),
            Err(LockError::Shared { .. })
        ));
        Lock::acquire(&moved.join("lock")).unwrap();
    });
}

#[test]
fn a_durable_file_appears_whole_at_commit_and_not_before() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shard");
    fs::write(&path, b"old").unwrap();
    let mut file = DurableFile::create(&path).unwrap();
    file.append(b"new ").unwrap();
    file.append(b"content").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    file.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new content");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_durable_file_that_is_dropped_was_never_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shard");
    let mut file = DurableFile::create(&path).unwrap();
    file.append(b"half").unwrap();
    drop(file);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn temporary_files_of_a_dead_process_with_the_same_id_are_no_obstacle() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shard");
    for unique in 0..100 {
        let name = format!("shard.{}-{unique}.tmp", std::process::id());
        fs::write(directory.path().join(name), b"dead").unwrap();
    }
    atomic_write(&path, b"alive").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"alive");
}

#[test]
fn directories_are_made_with_parents_renamed_and_removed_twice_without_complaint() {
    let directory = tempfile::tempdir().unwrap();
    let made = directory.path().join("a/b/c");
    create_directory(&made).unwrap();
    create_directory(&made).unwrap();
    fs::write(made.join("file"), b"x").unwrap();
    let moved = directory.path().join("a/d");
    rename(&made, &moved).unwrap();
    assert!(!made.exists());
    remove_file(&moved.join("file")).unwrap();
    remove_file(&moved.join("file")).unwrap();
    fs::write(moved.join("other"), b"x").unwrap();
    remove_directory(&moved).unwrap();
    remove_directory(&moved).unwrap();
    assert!(!moved.exists());
}

#[test]
fn a_directory_below_a_file_is_refused_with_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, b"x").unwrap();
    let error = create_directory(&file.join("inside")).unwrap_err();
    assert!(error.to_string().contains("file/inside"), "{error}");
}

#[test]
fn a_line_cut_at_every_byte_is_gone_at_the_next_open_and_the_others_stay() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics.jsonl");
    let whole = "{\"step\":1}\n{\"step\":2}\n";
    for cut in 1..=11 {
        fs::write(&path, &whole[..whole.len() - cut]).unwrap();
        let mut lines = LineFile::open(&path).unwrap();
        assert_eq!(lines.bytes(), 11, "cut {cut}");
        lines.append("{\"step\":2}").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole, "cut {cut}");
    }
}

#[test]
fn lines_are_cut_back_to_a_remembered_end_and_go_on_from_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics.jsonl");
    let mut lines = LineFile::open(&path).unwrap();
    lines.append("one").unwrap();
    let end = lines.bytes();
    lines.append("two").unwrap();
    lines.append("three").unwrap();
    lines.truncate_to(end).unwrap();
    lines.append("four").unwrap();
    lines.sync().unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "one\nfour\n");
}

#[test]
fn bytes_are_appended_behind_what_is_there_and_cut_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    AppendFile::open(&path).unwrap().append(b"abc").unwrap();
    let mut file = AppendFile::open(&path).unwrap();
    assert_eq!(file.bytes(), 3);
    file.append(b"defg").unwrap();
    assert_eq!(file.read(4).unwrap(), b"abcd");
    file.cut(5).unwrap();
    file.append(b"-").unwrap();
    file.sync().unwrap();
    assert_eq!(file.read(99).unwrap(), b"abcde-");
    assert_eq!(std::fs::read(&path).unwrap(), b"abcde-");
}

#[test]
fn the_room_for_a_path_that_is_not_there_is_that_of_the_nearest_folder_above_it() {
    let directory = tempfile::tempdir().unwrap();
    let found = space(&directory.path().join("runs/a/checkpoints")).unwrap();
    assert_eq!(found.folder, directory.path());
    assert!(found.free_bytes > 0);
    let same = space(directory.path()).unwrap();
    assert_eq!(same.device, found.device);
    assert_eq!(
        space(Path::new("not/there")).unwrap().folder,
        Path::new(".")
    );
    let file = directory.path().join("file");
    fs::write(&file, "x").unwrap();
    assert_eq!(space(&file).unwrap().folder, directory.path());
}

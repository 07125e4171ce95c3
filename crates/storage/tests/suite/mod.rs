//! What every store promises, asked of a folder in which nothing is yet.

use std::{io::ErrorKind, thread};

use storage::{Condition, Folder, Put};

/// More than two parts of an upload, and no whole number of anything.
const LARGE: usize = (40 << 20) + 12_345;

pub fn check(folder: &Folder) {
    an_absent_object_is_no_error(folder);
    a_put_replaces(&folder.below("puts"));
    conditions_hold(&folder.below("conditions"));
    an_upload_appears_whole_or_not_at_all(&folder.below("uploads"));
    large_objects_are_read_by_ranges(&folder.below("large"));
    an_open_object_is_never_mixed_with_its_successor(&folder.below("open"));
    lists_are_of_one_level(&folder.below("lists"));
    of_many_creations_one_is_done(&folder.below("races"));
    no_update_is_lost(&folder.below("races"));
    assert_eq!(
        folder.list().unwrap(),
        [
            "conditions",
            "large",
            "lists",
            "open",
            "puts",
            "races",
            "uploads"
        ]
    );
    for name in folder.list().unwrap() {
        folder.below(&name).remove_all().unwrap();
        folder.below(&name).remove_all().unwrap();
    }
    assert_eq!(folder.list().unwrap(), [""; 0]);
}

fn put(folder: &Folder, name: &str, bytes: &[u8]) {
    assert_eq!(
        folder.put(name, bytes, Condition::Always).unwrap(),
        Put::Done
    );
}

fn read(folder: &Folder, name: &str) -> Vec<u8> {
    folder.read(name).unwrap().expect("it is there")
}

fn an_absent_object_is_no_error(folder: &Folder) {
    assert!(folder.object("absent").unwrap().is_none());
    assert_eq!(folder.read("deep/absent").unwrap(), None);
    assert_eq!(folder.below("absent").list().unwrap(), [""; 0]);
    folder.remove("absent").unwrap();
    folder.below("absent").remove_all().unwrap();
}

fn a_put_replaces(folder: &Folder) {
    for bytes in [&b"one"[..], b"", b"three bytes and more"] {
        put(folder, "deep/er/object", bytes);
        assert_eq!(read(folder, "deep/er/object"), bytes);
    }
    folder.remove("deep/er/object").unwrap();
    assert_eq!(folder.read("deep/er/object").unwrap(), None);
    put(folder, "stays", b"for the list");
}

fn conditions_hold(folder: &Folder) {
    let put = |bytes: &[u8], condition| folder.put("object", bytes, condition).unwrap();
    assert_eq!(put(b"first", Condition::Absent), Put::Done);
    assert_eq!(put(b"other", Condition::Absent), Put::Refused);
    assert_eq!(read(folder, "object"), b"first");

    let first = folder.object("object").unwrap().unwrap();
    assert_eq!(
        put(b"second", Condition::Unchanged(first.version())),
        Put::Done
    );
    assert_eq!(
        put(b"third", Condition::Unchanged(first.version())),
        Put::Refused
    );
    assert_eq!(read(folder, "object"), b"second");

    let second = folder.object("object").unwrap().unwrap();
    assert_ne!(first.version(), second.version());
    folder.remove("object").unwrap();
    assert_eq!(
        put(b"fourth", Condition::Unchanged(second.version())),
        Put::Refused
    );
    assert_eq!(folder.read("object").unwrap(), None);
    assert_eq!(put(b"fifth", Condition::Absent), Put::Done);
}

fn an_upload_appears_whole_or_not_at_all(folder: &Folder) {
    let mut upload = folder.create("object", 100).unwrap();
    upload.append(b"dropped").unwrap();
    assert_eq!(folder.read("object").unwrap(), None);
    drop(upload);
    assert_eq!(folder.list().unwrap(), [""; 0]);

    let mut upload = folder.create("object", 0).unwrap();
    upload.append(b"in ").unwrap();
    upload.append(b"pieces").unwrap();
    assert_eq!(folder.read("object").unwrap(), None);
    upload.commit().unwrap();
    assert_eq!(read(folder, "object"), b"in pieces");

    let mut upload = folder.create("object", 3).unwrap();
    upload.append(b"new").unwrap();
    assert_eq!(read(folder, "object"), b"in pieces");
    upload.commit().unwrap();
    assert_eq!(read(folder, "object"), b"new");
    folder.create("empty", 0).unwrap().commit().unwrap();
    assert_eq!(read(folder, "empty"), b"");
}

fn large_objects_are_read_by_ranges(folder: &Folder) {
    let bytes: Vec<u8> = (0..LARGE)
        .map(|index| (index * 7 + index / 4096) as u8)
        .collect();
    let mut upload = folder.create("object", LARGE as u64).unwrap();
    for piece in bytes.chunks(1_000_003) {
        upload.append(piece).unwrap();
    }
    upload.commit().unwrap();

    // One that is given up leaves what is there.
    let mut upload = folder.create("object", LARGE as u64).unwrap();
    upload.append(&vec![1; LARGE]).unwrap();
    drop(upload);

    let object = folder.object("object").unwrap().unwrap();
    assert_eq!(object.bytes(), LARGE as u64);
    let mut all = Vec::new();
    object
        .scan(0..LARGE as u64, &mut |piece| all.extend_from_slice(piece))
        .unwrap();
    assert!(all == bytes, "a scan gives the bytes back");
    for (start, len) in [
        (0, 1),
        (LARGE - 1, 1),
        (3, 20 << 20),
        (17 << 20, 9),
        (5, 0),
        (LARGE, 0),
    ] {
        let mut out = vec![0; len];
        object.read_at(start as u64, &mut out).unwrap();
        assert!(out == bytes[start..start + len], "{start} and {len} more");
    }
    let error = object.read_at(LARGE as u64 - 1, &mut [0; 2]).unwrap_err();
    assert_eq!(error.source.kind(), ErrorKind::UnexpectedEof, "{error}");
    let path = folder.below("object").path();
    assert!(
        error.to_string().contains(&path.display().to_string()),
        "{error}"
    );
}

fn an_open_object_is_never_mixed_with_its_successor(folder: &Folder) {
    put(folder, "object", &[1; 1000]);
    let object = folder.object("object").unwrap().unwrap();
    put(folder, "object", &[2; 1000]);
    let mut out = [0; 1000];
    // A disk still has it; an object store says that it has not.
    if object.read_at(0, &mut out).is_ok() {
        assert_eq!(out, [1; 1000]);
    }
    assert_eq!(read(folder, "object"), [2; 1000]);
}

fn lists_are_of_one_level(folder: &Folder) {
    for name in ["b", "a/1", "a/2", "ab/1", "a/deep/3", "c"] {
        put(folder, name, name.as_bytes());
    }
    assert_eq!(folder.list().unwrap(), ["a", "ab", "b", "c"]);
    assert_eq!(folder.below("a").list().unwrap(), ["1", "2", "deep"]);
    folder.below("a").remove_all().unwrap();
    assert_eq!(folder.list().unwrap(), ["ab", "b", "c"]);
    assert_eq!(read(folder, "ab/1"), b"ab/1");
}

fn of_many_creations_one_is_done(folder: &Folder) {
    let create = |number: u8| folder.put("one", &[number], Condition::Absent).unwrap();
    let done = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|number| scope.spawn(move || create(number)))
            .collect();
        let answers = threads.into_iter().map(|thread| thread.join().unwrap());
        answers.filter(|answer| *answer == Put::Done).count()
    });
    assert_eq!(done, 1);
}

fn no_update_is_lost(folder: &Folder) {
    let (writers, updates) = (4, 10);
    put(folder, "count", b"0");
    let add = |writer: usize| loop {
        let object = folder.object("count").unwrap().unwrap();
        let mut text = vec![0; object.bytes() as usize];
        // Replaced since it was opened.
        if object.read_at(0, &mut text).is_err() {
            continue;
        }
        let text = String::from_utf8(text).unwrap();
        let count: usize = text.split(' ').next().unwrap().parse().unwrap();
        // With its name, because the same bytes twice would count as one.
        let next = format!("{} {writer}", count + 1);
        let condition = Condition::Unchanged(object.version());
        if folder.put("count", next.as_bytes(), condition).unwrap() == Put::Done {
            break;
        }
    };
    thread::scope(|scope| {
        for writer in 0..writers {
            scope.spawn(move || (0..updates).for_each(|_| add(writer)));
        }
    });
    let text = String::from_utf8(read(folder, "count")).unwrap();
    assert_eq!(
        text.split(' ').next().unwrap(),
        (writers * updates).to_string()
    );
}

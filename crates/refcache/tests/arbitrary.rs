//! Whatever bytes a segment holds: it is refused or read, never a panic, and nothing is read that was not stored.
#![allow(clippy::unwrap_used)]

mod support;

use std::{collections::BTreeMap, fs, path::Path, sync::LazyLock, time::SystemTime};

use proptest::{collection::vec, option::of, prelude::*, sample::Index};
use refcache::{Cleaning, EntryKey, Store, clean};
use support::{append, append_sorted, entries, open, report, scope, segments};

const COUNT: u32 = 150;

/// A segment in both forms.
static WHOLE: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    [append, append_sorted].map(|store| {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path(), 0..COUNT);
        segments(&report(dir.path()).folder).pop_first().unwrap().1
    })
});

/// A change to some bytes: from a place on, so many are replaced by others, or as many as these.
type Splice = (Index, Option<usize>, Vec<u8>);

fn changed(mut bytes: Vec<u8>, splices: &[Splice]) -> Vec<u8> {
    for (place, removed, added) in splices {
        let start = place.index(bytes.len() + 1);
        let end = (start + removed.unwrap_or(added.len())).min(bytes.len());
        bytes.splice(start..end, added.iter().copied());
    }
    bytes
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let splices = vec(
        (any::<Index>(), of(0..80usize), vec(any::<u8>(), 0..80)),
        1..4,
    );
    prop_oneof![
        vec(any::<u8>(), 0..400),
        // Past the first look at what it is.
        (0..2usize, vec(any::<u8>(), 0..400))
            .prop_map(|(form, rest)| [&WHOLE[form][..8], &rest].concat()),
        (0..2usize, splices).prop_map(|(form, splices)| changed(WHOLE[form].clone(), &splices)),
    ]
}

/// Reads all that can be read of the store.
fn read(dir: &Path, known: &BTreeMap<EntryKey, f32>) {
    let Ok(store) = Store::open_existing(dir, &scope()) else {
        return;
    };
    let store = store.unwrap();
    for (key, value) in known {
        if let Ok(Some(found)) = store.get(key) {
            assert_eq!(found.to_bits(), value.to_bits());
        }
    }
    if let Ok(count) = store.count() {
        assert!(count <= known.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_bytes_are_refused_or_read_and_no_value_is_wrong(bytes in bytes()) {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()));
        let folder = report(dir.path()).folder;
        fs::write(folder.join("00112233445566778899aabbccddeeff.segment"), bytes).unwrap();
        let known: BTreeMap<_, _> = entries(0..COUNT).into_iter().collect();
        read(dir.path(), &known);
        let before = report(dir.path());
        let cleaning = Cleaning { unused_for: None, now: SystemTime::now(), dry_run: false };
        clean(dir.path(), &cleaning).unwrap();
        read(dir.path(), &known);
        prop_assert_eq!(report(dir.path()).entries, before.entries);
    }
}

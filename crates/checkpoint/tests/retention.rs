//! Which checkpoints stay: the newest, and the best that is there.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;

use checkpoint::{Retention, retain, visible};
use support::save;

/// Steps of the checkpoints that stay of 10, 20, …, 60.
fn stay(retention: Retention<'_>) -> Vec<u64> {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let steps = [10, 20, 30, 40, 50, 60];
    for step in steps {
        save(dir, step, 1);
    }
    // The second has lost a file: it cannot be the best.
    let rank = fs::read_dir(dir.join("step-00000020"))
        .unwrap()
        .find_map(|entry| {
            let path = entry.unwrap().path();
            path.extension()
                .is_some_and(|it| it == "safetensors")
                .then_some(path)
        });
    fs::remove_file(rank.unwrap()).unwrap();
    let removed = retain(dir, retention).unwrap();
    let left = steps
        .into_iter()
        .filter(|step| visible(dir, *step).is_some());
    let left: Vec<u64> = left.collect();
    assert_eq!(removed.len() + left.len(), steps.len());
    left
}

#[test]
fn the_best_stays_besides_the_newest() {
    let keep = |keep_last, best_first| Retention {
        keep_last,
        best_first,
        since: u64::MAX,
    };
    // 20 is damaged, which neither counts nor goes.
    assert_eq!(stay(keep(2, &[])), [20, 50, 60]);
    assert_eq!(stay(keep(2, &[10, 30])), [10, 20, 50, 60]);
    assert_eq!(
        stay(keep(2, &[60, 10])),
        [20, 50, 60],
        "it is among the newest"
    );
    assert_eq!(
        stay(keep(1, &[20, 35, 30, 10])),
        [20, 30, 60],
        "the best that is there"
    );
}

#[test]
fn what_may_yet_be_the_best_stays() {
    let retention = Retention {
        keep_last: 1,
        best_first: &[10],
        since: 40,
    };
    assert_eq!(stay(retention), [10, 20, 40, 50, 60]);
}

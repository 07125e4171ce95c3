//! Scores of completions: read where they are asked for, refused by place where they are not numbers.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray};
use data::{DataConfig, Dataset, Needs};
use parquet::basic::Compression;
use serde_json::{Value, json};

use crate::files::write_parquet;
use crate::support::{BOTH, Folder, config};

const SCORED: Needs = Needs {
    scores: true,
    ..BOTH
};

fn row(chosen: impl Into<Value>, rejected: impl Into<Value>) -> Value {
    let (chosen, rejected): (Value, Value) = (chosen.into(), rejected.into());
    json!({ "prompt": "q", "chosen": "y", "rejected": "n", "score_chosen": chosen, "score_rejected": rejected })
}

fn load(needs: Needs, rows: &[Value], config: &DataConfig) -> Result<Dataset, String> {
    let folder = Folder::with_tokenizer();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    let loaded = folder.load_for(needs, lines.join("\n"), config);
    loaded.map_err(|error| folder.message(&error))
}

fn scored(rows: &[Value]) -> Dataset {
    load(SCORED, rows, &config(64)).unwrap()
}

#[test]
fn scores_are_read_where_they_are_asked_for() {
    let rows = [row(8.5, 2), row(-1, 0.25)];
    let read: Vec<_> = scored(&rows).pairs.iter().map(|it| it.scores).collect();
    assert_eq!(read, [Some([8.5, 2.0]), Some([-1.0, 0.25])]);
    let unread = load(BOTH, &rows, &config(64)).unwrap();
    assert!(unread.pairs.iter().all(|pair| pair.scores.is_none()));
}

#[test]
fn columns_of_scores_may_have_other_names() {
    let mut config = config(64);
    config.columns.score_chosen = "scores.0".into();
    config.columns.score_rejected = "scores.1".into();
    let row = json!({ "prompt": "q", "chosen": "y", "rejected": "n", "scores": [3, 1] });
    let dataset = load(SCORED, &[row], &config).unwrap();
    assert_eq!(dataset.pairs[0].scores, Some([3.0, 1.0]));
}

#[test]
fn scores_that_are_not_above_are_counted() {
    let report = scored(&[row(2, 1), row(1, 1), row(1, 2)]).report;
    assert_eq!(report.scores_not_above, 2);
    let text = report.to_string();
    let words = "\n2 pairs whose chosen score is not above the rejected one\n";
    assert!(text.contains(words), "{text}");
}

#[test]
fn the_digest_has_the_scores_exactly_if_they_are_read() {
    let digest = |rows: &[Value]| scored(rows).digest;
    assert_eq!(digest(&[row(2, 1)]), digest(&[row(2.0, 1.0)]));
    assert_ne!(digest(&[row(2, 1)]), digest(&[row(3, 1)]));
    assert_ne!(digest(&[row(2, 1)]), digest(&[row(1, 2)]));
    let unscored = |rows: &[Value]| load(BOTH, rows, &config(64)).unwrap().digest;
    assert_ne!(digest(&[row(2, 1)]), unscored(&[row(2, 1)]));
    assert_eq!(unscored(&[row(2, 1)]), unscored(&[row(3, 1)]));
}

#[test]
fn the_digest_without_scores_is_what_it_always_was() {
    // Checkpoints and reference values of earlier runs are found by it.
    let plain = json!({ "prompt": "q", "chosen": "y", "rejected": "n" });
    let digest = load(BOTH, &[plain], &config(64)).unwrap().digest;
    assert_eq!(
        blake3::Hash::from(digest).to_hex().as_str(),
        "d33d8d3ea387d00ff73dfe5877d7d6fe4e6ef510baefeaed7e53c09de7cd3a5f"
    );
}

#[test]
fn rows_without_a_number_are_refused() {
    let cure = |key: &str| {
        format!(
            "give a number, name the column that holds it with data.columns.{key}, or leave out objective.score_scale"
        )
    };
    let plain = json!({ "prompt": "q", "chosen": "y", "rejected": "n" });
    for (row, reason, key) in [
        (
            plain,
            "the row has no finite number in `score_chosen`, it has prompt, chosen, rejected",
            "score_chosen",
        ),
        (
            row(1, Value::Null),
            "the row has no finite number in `score_rejected`, it has",
            "score_rejected",
        ),
        (row("2", 1), "`score_chosen` is a string", "score_chosen"),
        (
            row(true, 1),
            "`score_chosen` is true or false",
            "score_chosen",
        ),
    ] {
        let message = load(SCORED, &[self::row(2, 1), row], &config(64)).unwrap_err();
        assert!(
            message.starts_with(&format!("pairs.jsonl:2: {reason}")),
            "{message}"
        );
        assert!(message.ends_with(&cure(key)), "{message}");
    }
}

#[test]
fn scores_of_tables_that_are_not_finite_are_refused() {
    let folder = Folder::with_tokenizer();
    let path = folder.path().join("a.parquet");
    let text = |text: &str| -> ArrayRef { Arc::new(StringArray::from(vec![text; 2])) };
    for bad in [f64::NAN, f64::INFINITY] {
        let columns = [
            ("prompt", text("q")),
            ("chosen", text("y")),
            ("rejected", text("n")),
            (
                "score_chosen",
                Arc::new(Float64Array::from(vec![2.0, bad])) as ArrayRef,
            ),
            (
                "score_rejected",
                Arc::new(Float64Array::from(vec![1.0, 1.0])),
            ),
        ];
        write_parquet(
            &path,
            &RecordBatch::try_from_iter(columns).unwrap(),
            Compression::SNAPPY,
        );
        let files = std::slice::from_ref(&path);
        let error = data::load(files, &config(64), &folder.tokenizer(), SCORED).unwrap_err();
        let message = folder.message(&error);
        let expected = "a.parquet:2: the row has no finite number in `score_chosen`, it has ";
        assert!(message.starts_with(expected), "{message}");
    }
}

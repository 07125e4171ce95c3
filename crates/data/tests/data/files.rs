//! The same rows in every container, folder and pattern are the same data set; torn and strange files are refused by name.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{
    FixedSizeBinaryBuilder, ListBuilder, StringBuilder, StringDictionaryBuilder, StructBuilder,
};
use arrow_array::types::Int32Type;
use arrow_array::{Array, ArrayRef, Float64Array, Int64Array, RecordBatch};
use arrow_schema::{DataType, Field};
use data::{DataError, Dataset, load};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};

use crate::support::{BOTH, Folder, TEMPLATE, config};

/// More rows than a batch and than what waits for tokenization.
const ROWS: usize = 1500;

fn folder() -> Folder {
    let folder = Folder::with_tokenizer();
    folder.write("chat_template.jinja", TEMPLATE);
    folder
}

fn read(folder: &Folder, entries: &[&str]) -> Result<Dataset, DataError> {
    let files: Vec<PathBuf> = entries.iter().map(|it| folder.path().join(it)).collect();
    load(&files, &config(64), &folder.tokenizer(), BOTH)
}

fn refusal(folder: &Folder, entry: &str) -> String {
    folder.message(&read(folder, &[entry]).unwrap_err())
}

fn answer(index: usize) -> String {
    format!("yes {}", index % 7)
}

/// Rows of UltraFeedback's layout.
fn rows(count: usize) -> Vec<Value> {
    let conversation = |question: &str, answer: &str| json!([{ "content": question, "role": "user" }, { "content": answer, "role": "assistant" }]);
    (0..count)
        .map(|index| {
            let question = format!("q {index}");
            json!({ "prompt": question, "chosen": conversation(&question, &answer(index)),
                    "rejected": conversation(&question, "no"), "score_chosen": 7.5 })
        })
        .collect()
}

fn lines(rows: &[Value]) -> String {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    lines.join("\n") + "\n"
}

/// The same rows as a table. Messages have a key that no row uses, as tables of mixed conversations do; other columns have types
/// that JSON does not know.
pub fn table(rows: std::ops::Range<usize>) -> RecordBatch {
    let text = || Box::new(StringBuilder::new()) as Box<dyn arrow_array::builder::ArrayBuilder>;
    let fields: Vec<Field> = ["content", "role", "tool_calls"]
        .map(|name| Field::new(name, DataType::Utf8, true))
        .into();
    let conversation = |answers: Vec<String>| -> ArrayRef {
        let message = StructBuilder::new(fields.clone(), vec![text(), text(), text()]);
        let mut list = ListBuilder::new(message);
        for (index, answer) in rows.clone().zip(answers) {
            let question = format!("q {index}");
            for (role, content) in [("user", question.as_str()), ("assistant", &answer)] {
                let message = list.values();
                for (field, value) in [Some(content), Some(role), None].into_iter().enumerate() {
                    let column = message.field_builder::<StringBuilder>(field).unwrap();
                    column.append_option(value);
                }
                message.append(true);
            }
            list.append(true);
        }
        Arc::new(list.finish())
    };
    let count = rows.len();
    let mut prompts = StringDictionaryBuilder::<Int32Type>::new();
    for index in rows.clone() {
        prompts.append(format!("q {index}")).unwrap();
    }
    let mut binary = FixedSizeBinaryBuilder::new(2);
    (0..count).for_each(|_| binary.append_value([0xff, 0]).unwrap());
    RecordBatch::try_from_iter([
        ("prompt", Arc::new(prompts.finish()) as ArrayRef),
        ("chosen", conversation(rows.clone().map(answer).collect())),
        ("rejected", conversation(vec!["no".into(); count])),
        (
            "score_chosen",
            Arc::new(Float64Array::from(vec![f64::NAN; count])),
        ),
        (
            "id",
            Arc::new(Int64Array::from_iter_values(0..count as i64)),
        ),
        ("hash", Arc::new(binary.finish())),
    ])
    .unwrap()
}

pub fn write_parquet(path: &Path, batch: &RecordBatch, compression: Compression) {
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_max_row_group_row_count(Some(700))
        .build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

pub fn write_arrow_file(path: &Path, batches: &[RecordBatch]) {
    let file = File::create(path).unwrap();
    let mut writer = arrow_ipc::writer::FileWriter::try_new(file, &batches[0].schema()).unwrap();
    for batch in batches {
        writer.write(batch).unwrap();
    }
    writer.finish().unwrap();
}

pub fn write_arrow_stream(path: &Path, batches: &[RecordBatch]) {
    let file = File::create(path).unwrap();
    let mut writer = arrow_ipc::writer::StreamWriter::try_new(file, &batches[0].schema()).unwrap();
    for batch in batches {
        writer.write(batch).unwrap();
    }
    writer.finish().unwrap();
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A small table that is written by every writer.
pub fn small_table() -> RecordBatch {
    table(0..5)
}

#[test]
fn every_container_gives_the_same_data_set() {
    let folder = folder();
    let rows = rows(ROWS);
    let lines = lines(&rows);
    folder.write("a.jsonl", &lines);
    let expected = read(&folder, &["a.jsonl"]).unwrap();
    assert_eq!(expected.pairs.len(), ROWS);

    let array = Value::from(rows).to_string();
    folder.write("b.json", &array);
    folder.write("c.ndjson", &lines);
    folder.write("d.jsonl.gz", gzip(lines.as_bytes()));
    folder.write("e.jsonl.zst", zstd(lines.as_bytes()));
    folder.write("f.json.gz", gzip(array.as_bytes()));
    // Members and frames one behind the other, as `cat` joins them.
    let (head, tail) = lines.as_bytes().split_at(1000);
    folder.write("g.jsonl.gz", [gzip(head), gzip(tail)].concat());
    folder.write("h.jsonl.zst", [zstd(head), zstd(tail)].concat());
    let path = |name: &str| folder.path().join(name);
    let whole = table(0..ROWS);
    write_parquet(&path("i.parquet"), &whole, Compression::SNAPPY);
    let level = ZstdLevel::default();
    write_parquet(&path("j.parquet"), &whole, Compression::ZSTD(level));
    write_parquet(&path("k.PARQUET"), &whole, Compression::UNCOMPRESSED);
    // Each batch has a dictionary of its own, which a stream replaces and a file may not.
    write_arrow_stream(&path("l.arrow"), &[table(0..300), table(300..ROWS)]);
    write_arrow_file(&path("m.arrow"), std::slice::from_ref(&whole));
    for name in [
        "b.json",
        "c.ndjson",
        "d.jsonl.gz",
        "e.jsonl.zst",
        "f.json.gz",
        "g.jsonl.gz",
        "h.jsonl.zst",
        "i.parquet",
        "j.parquet",
        "k.PARQUET",
        "l.arrow",
        "m.arrow",
    ] {
        let found = read(&folder, &[name]).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(found.digest, expected.digest, "{name}");
        assert_eq!(found.pairs.len(), ROWS, "{name}");
        let place = &found.pairs[ROWS - 1].place;
        assert!(place.file.ends_with(name), "{place}");
        if name != "b.json" && name != "f.json.gz" {
            assert_eq!(place.line, ROWS, "{name}");
        }
    }
}

#[test]
fn folders_and_patterns_are_read_sorted() {
    let folder = folder();
    let rows = rows(4);
    folder.write("all.jsonl", lines(&rows));
    let expected = read(&folder, &["all.jsonl"]).unwrap().digest;
    std::fs::create_dir_all(folder.path().join("parts/deep")).unwrap();
    for (index, name) in ["d", "c", "b", "a"].into_iter().enumerate() {
        let row = &rows[3 - index..=3 - index];
        folder.write(&format!("parts/{name}.jsonl"), lines(row));
        folder.write(&format!("parts/deep/{name}.jsonl"), lines(row));
    }
    folder.write("parts/.hidden.jsonl", "?");
    folder.write("parts/README.md", "?");
    folder.write("parts/[odd].jsonl", lines(&rows));
    let digest = |entries: &[&str]| read(&folder, entries).unwrap().digest;
    for entries in [
        &["parts/deep"][..],
        &["parts/deep/*.jsonl"],
        &["parts/**/deep/?.jsonl"],
        &["parts/[a-d].jsonl"],
        &["parts/[odd].jsonl"],
        &["parts/[ab].jsonl", "parts/deep/c.jsonl", "parts/d.*"],
    ] {
        assert_eq!(digest(entries), expected, "{entries:?}");
    }
}

#[test]
fn a_saved_data_set_of_hugging_face_is_read_in_its_own_order() {
    let folder = folder();
    folder.write("all.jsonl", lines(&rows(6)));
    let expected = read(&folder, &["all.jsonl"]).unwrap().digest;
    std::fs::create_dir(folder.path().join("saved")).unwrap();
    let state = |files: Value| {
        let state = json!({ "_data_files": files, "_split": "train" });
        folder.write("saved/state.json", state.to_string());
    };
    folder.write("saved/dataset_info.json", "{}");
    write_arrow_stream(&folder.path().join("saved/z.arrow"), &[table(0..4)]);
    write_arrow_stream(&folder.path().join("saved/a.arrow"), &[table(4..6)]);
    state(json!([{ "filename": "z.arrow" }, { "filename": "a.arrow" }]));
    assert_eq!(read(&folder, &["saved"]).unwrap().digest, expected);

    state(json!([{ "filename": "z.arrow" }, { "filename": "b.arrow" }]));
    let message = refusal(&folder, "saved");
    assert!(
        message.starts_with("saved/b.arrow: No such file"),
        "{message}"
    );
    state(json!([{ "filename": "../all.arrow" }]));
    let message = refusal(&folder, "saved");
    assert!(
        message.starts_with("saved/state.json: lists {"),
        "{message}"
    );
    state(json!([]));
    assert_eq!(
        refusal(&folder, "saved"),
        "saved/state.json: lists no file in `_data_files`; save the data set again with save_to_disk"
    );
    std::fs::create_dir(folder.path().join("dict")).unwrap();
    folder.write("dict/dataset_dict.json", r#"{"splits": ["train"]}"#);
    assert_eq!(
        refusal(&folder, "dict"),
        "dict: is a dictionary of splits; name one of its folders, such as dict/train"
    );
}

#[test]
fn entries_that_name_nothing_to_read_say_so() {
    let folder = folder();
    folder.write("pairs.txt", "");
    folder.write("pairs.jsonl.bz2", "");
    std::fs::create_dir_all(folder.path().join("empty/deep")).unwrap();
    std::fs::create_dir(folder.path().join("mixed")).unwrap();
    folder.write("mixed/a.jsonl", "");
    folder.write("mixed/b.parquet", "");
    let supported = "give a file that ends in .jsonl, .ndjson or .json (also with .gz or .zst), .parquet, .arrow";
    for (entry, expected) in [
        ("pairs.txt", format!("pairs.txt: the name does not say what the file holds; {supported}")),
        ("pairs.jsonl.bz2", format!("pairs.jsonl.bz2: the name does not say what the file holds; {supported}")),
        ("pairs.t*", format!("pairs.txt: the name does not say what the file holds; {supported}")),
        ("no*.jsonl", "no*.jsonl: no file matches this pattern; check it, from the folder that the program runs in".into()),
        ("a***", "a***: is no pattern: wildcards are either regular `*` or recursive `**`".into()),
        ("absent", "absent: No such file or directory".into()),
        ("empty", "empty: no file in that folder can be read; name a folder".into()),
        ("mixed", "mixed: holds a.jsonl as well as b.parquet; name the ones that are meant with a pattern, such as *.parquet".into()),
    ] {
        let message = refusal(&folder, entry);
        assert!(message.starts_with(&expected), "{message}");
    }
    let name = ["owner/name".into()];
    let error = load(&name, &config(64), &folder.tokenizer(), BOTH).unwrap_err();
    let hint = "or write hf://datasets/owner/name for a data set of the Hugging Face hub";
    assert!(error.to_string().ends_with(hint), "{error}");
}

#[test]
fn a_data_set_of_a_hub_that_was_not_downloaded_is_refused_with_how_to_do_that() {
    let mut config = config(64);
    for (entry, words) in [
        (
            "hf://datasets/owner/name/data/train-*.parquet",
            [
                "hf download owner/name --repo-type dataset --local-dir data/name",
                "\"data/name/data/train-*.parquet\"",
            ],
        ),
        (
            "hf://datasets/owner/name@v2",
            [
                "hf download owner/name --repo-type dataset --revision v2 ",
                "\"data/name/**/*.parquet\"",
            ],
        ),
        (
            "hf://",
            ["hf download OWNER/NAME ", "never goes to the network"],
        ),
    ] {
        let error = load(&[entry.into()], &config, &folder().tokenizer(), BOTH).unwrap_err();
        let message = error.to_string();
        for words in [&[entry][..], &words].concat() {
            assert!(message.contains(words), "{message}");
        }
        // A configuration may name it: whoever reads the files downloads it first.
        config.train = vec!["x.jsonl".into()];
        config.eval = vec![entry.into()];
        match config.validate() {
            Ok(()) => assert_ne!(entry, "hf://"),
            Err(early) => {
                assert_eq!((early.key.as_str(), entry), ("data.eval", "hf://"));
                assert!(early.reason.contains("hf://datasets/OWNER/NAME"));
            }
        }
    }
}

#[test]
fn torn_files_are_refused_by_name_wherever_they_are_cut() {
    let folder = folder();
    let lines = lines(&rows(5));
    let path = |name: &str| folder.path().join(name);
    folder.write("a.jsonl.gz", gzip(lines.as_bytes()));
    folder.write("a.jsonl.zst", zstd(lines.as_bytes()));
    write_parquet(&path("a.parquet"), &small_table(), Compression::SNAPPY);
    write_arrow_file(&path("file.arrow"), &[small_table()]);
    write_arrow_stream(&path("stream.arrow"), &[small_table(), small_table()]);
    for (name, kind) in [
        ("a.jsonl.gz", "gzip"),
        ("a.jsonl.zst", "zstd"),
        ("a.parquet", "Parquet"),
        ("file.arrow", "Arrow"),
        ("stream.arrow", "Arrow"),
    ] {
        let bytes = std::fs::read(path(name)).unwrap();
        let whole = read(&folder, &[name]).unwrap();
        assert!(whole.pairs.len() >= 5, "{name}");
        for length in (1..bytes.len()).rev().step_by(7) {
            let cut = format!("cut-{name}");
            folder.write(&cut, &bytes[..length]);
            let message = refusal(&folder, &cut);
            // What is cut inside a text may end in a torn row before the container notices.
            let row = message.contains("malformed JSON");
            let damaged = format!("{cut}: this is no whole {kind} file: ");
            assert!(row || message.starts_with(&damaged), "{length}: {message}");
        }
    }
}

#[test]
fn files_that_are_not_what_their_name_says_are_refused() {
    let folder = folder();
    let text = lines(&rows(2));
    for (name, kind) in [
        ("a.parquet", "Parquet"),
        ("a.arrow", "Arrow"),
        ("a.jsonl.gz", "gzip"),
        ("a.jsonl.zst", "zstd"),
    ] {
        folder.write(name, &text);
        let message = refusal(&folder, name);
        let expected = format!("{name}: this is no whole {kind} file: ");
        assert!(message.starts_with(&expected), "{message}");
    }
}

#[test]
fn rows_of_tables_are_refused_with_their_number() {
    let folder = folder();
    let path = folder.path().join("a.parquet");
    let mut rejected = StringBuilder::new();
    (0..9).for_each(|_| rejected.append_value("n"));
    rejected.append_null();
    let texts =
        |text: &str| -> ArrayRef { Arc::new(arrow_array::StringArray::from(vec![text; 10])) };
    let hash = table(0..10).column(5).clone();
    let columns = |rejected: ArrayRef| {
        [
            ("prompt", texts("q")),
            ("chosen", texts("y")),
            ("rejected", rejected),
        ]
    };
    let batch = RecordBatch::try_from_iter(columns(Arc::new(rejected.finish()))).unwrap();
    write_parquet(&path, &batch, Compression::SNAPPY);
    let message = refusal(&folder, "a.parquet");
    let expected = "a.parquet:10: the row has no `rejected`, it has prompt, chosen; add it";
    assert!(message.starts_with(expected), "{message}");

    assert_eq!(hash.data_type(), &DataType::FixedSizeBinary(2));
    let batch = RecordBatch::try_from_iter(columns(hash)).unwrap();
    write_parquet(&path, &batch, Compression::SNAPPY);
    let message = refusal(&folder, "a.parquet");
    let expected = "a.parquet:1: `chosen` is a string and `rejected` is an object; ";
    assert!(message.starts_with(expected), "{message}");
}

#[test]
fn the_first_fault_is_told_whatever_reads_it() {
    let folder = folder();
    folder.write("a.jsonl", "{\"prompt\": \"q\"}\n{");
    let message = refusal(&folder, "a.jsonl");
    assert!(
        message.starts_with("a.jsonl:1: the row has no `chosen`"),
        "{message}"
    );
}

#[test]
fn prompts_are_read_from_tables_too() {
    let folder = folder();
    let path = folder.path().join("a.parquet");
    write_parquet(&path, &small_table(), Compression::SNAPPY);
    let absent = data::prompts(&folder.path().join("absent")).unwrap_err();
    let absent = folder.message(&absent);
    assert!(
        absent.ends_with("check the path of the prompts"),
        "{absent}"
    );
    let prompts = data::prompts(&path).unwrap();
    assert_eq!(prompts.len(), 5);
    assert_eq!(prompts[4].0.line, 5);
    assert_eq!(prompts[4].1.to_string(), "q 4");
}

//! Bytes that nobody vouches for: whatever a file holds, reading it gives pairs or an error, and never a panic.

use std::fs;
use std::path::PathBuf;

use data::{DataConfig, Needs, Tokenizer, load};
use parquet::basic::{Compression, ZstdLevel};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value};

use crate::files::{gzip, small_table, write_arrow_file, write_arrow_stream, write_parquet, zstd};
use crate::support::{BOTH, CHOSEN, EITHER, Folder, TEMPLATE, config};

/// A folder to read from again and again.
struct Reader {
    folder: Folder,
    tokenizer: Tokenizer,
    config: DataConfig,
}

impl Reader {
    fn new() -> Self {
        let folder = Folder::with_tokenizer();
        folder.write("chat_template.jinja", TEMPLATE);
        Self {
            tokenizer: folder.tokenizer(),
            config: config(64),
            folder,
        }
    }

    /// Reads as every objective does and as prompts; an error says which file.
    fn survives(&self, name: &str, bytes: &[u8]) {
        let file = self.folder.write(name, bytes);
        let scored = Needs {
            scores: true,
            ..EITHER
        };
        let loaded = [BOTH, EITHER, CHOSEN, scored].map(|needs| {
            let files = std::slice::from_ref(&file);
            load(files, &self.config, &self.tokenizer, needs).map(drop)
        });
        let prompts = data::prompts(&file).map(drop);
        for error in loaded.into_iter().chain([prompts]).filter_map(Result::err) {
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}

/// Runs `test` over values of `strategy`; proptest prints the smallest that fails.
fn check<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value)) {
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let run = TestRunner::new(config).run(strategy, |value| {
        test(value);
        Ok(())
    });
    run.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn any_bytes_under_any_name_are_survived() {
    let reader = Reader::new();
    let names = select(vec![
        "a.jsonl",
        "a.json",
        "a.jsonl.gz",
        "a.json.zst",
        "a.parquet",
        "a.arrow",
    ]);
    // What the readers look for, so that more than their first look is met.
    let pieces = select(vec![
        &b"PAR1"[..],
        b"ARROW1\0\0",
        b"\xff\xff\xff\xff",
        b"\x1f\x8b\x08\0",
        b"\x28\xb5\x2f\xfd",
        b"[{",
        b"}\n",
        b"{\"chosen\":",
        b"\"\\u",
        b"\xef\xbb\xbf",
        b"\0\0\0\0",
        b"\x10\0\0\0",
    ]);
    let piece = prop_oneof![pieces.prop_map(<[u8]>::to_vec), vec(any::<u8>(), 0..20)];
    let bytes = vec(piece, 0..12).prop_map(|pieces| pieces.concat());
    check(1000, &(names, bytes), |(name, bytes)| {
        reader.survives(name, &bytes);
    });
}

#[test]
fn any_json_rows_are_survived() {
    let reader = Reader::new();
    let word = || {
        select(vec![
            "prompt",
            "chosen",
            "rejected",
            "completion",
            "label",
            "score_chosen",
            "score_rejected",
            "conversations",
            "messages",
            "system",
            "role",
            "content",
            "from",
            "value",
            "user",
            "assistant",
            "human",
            "gpt",
            "tool_calls",
            "\n\nHuman: a\n\nAssistant: b",
            "é ",
            "",
        ])
        .prop_map(String::from)
    };
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(4, 40, 5, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(Value::from),
            vec((word(), inner), 0..5)
                .prop_map(|entries| Value::from(entries.into_iter().collect::<Map<_, _>>())),
        ]
    });
    check(1000, &vec(value, 1..4), |rows| {
        let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
        reader.survives("a.jsonl", lines.join("\n").as_bytes());
    });
}

#[test]
fn any_damage_to_a_whole_file_is_survived() {
    let reader = Reader::new();
    let path = |name: &str| -> PathBuf { reader.folder.path().join(name) };
    let table = small_table();
    let level = ZstdLevel::default();
    write_parquet(&path("snappy.parquet"), &table, Compression::SNAPPY);
    write_parquet(&path("zstd.parquet"), &table, Compression::ZSTD(level));
    write_parquet(&path("plain.parquet"), &table, Compression::UNCOMPRESSED);
    write_arrow_file(&path("file.arrow"), std::slice::from_ref(&table));
    write_arrow_stream(&path("stream.arrow"), &[table.clone(), table]);
    let line = br#"{"prompt": "q", "chosen": "y", "rejected": "n"}"#;
    fs::write(path("a.jsonl"), line).unwrap();
    fs::write(path("a.jsonl.gz"), gzip(line)).unwrap();
    fs::write(path("a.jsonl.zst"), zstd(line)).unwrap();
    let whole: Vec<(&str, Vec<u8>)> = [
        "snappy.parquet",
        "zstd.parquet",
        "plain.parquet",
        "file.arrow",
        "stream.arrow",
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.zst",
    ]
    .map(|name| (name, fs::read(path(name)).unwrap()))
    .into();

    // Bytes that lengths, counts and offsets are made of go wrong in the worst way at their extremes.
    let byte = prop_oneof![any::<u8>(), select(vec![0, 1, 0x7f, 0x80, 0xff])];
    let damage = vec((any::<Index>(), byte, 1..9_usize), 1..6);
    let cut = prop_oneof![3 => Just(None), 1 => any::<Index>().prop_map(Some)];
    check(
        2000,
        &(select(whole), damage, cut),
        |((name, mut bytes), damage, cut)| {
            for (at, byte, count) in damage {
                let at = at.index(bytes.len());
                let end = bytes.len().min(at + count);
                bytes[at..end].fill(byte);
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            reader.survives(&format!("damaged-{name}"), &bytes);
        },
    );
}

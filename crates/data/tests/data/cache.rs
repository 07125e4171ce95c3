//! A dataset is tokenized once, and never read wrong.

use std::fs;
use std::path::{Path, PathBuf};

use data::{DataConfig, DataError, Loaded, Needs, Tokenizer, Truncation, load, load_cached};
use serde_json::json;

use crate::support::{BOTH, EITHER, Folder, config};

/// A folder with pairs, a tokenizer and a cache.
struct Place {
    folder: Folder,
    files: Vec<PathBuf>,
    config: DataConfig,
    needs: Needs,
}

impl Place {
    /// Pairs with all that a report can tell: scores, cuts, dropped rows, repetitions.
    fn new() -> Self {
        let row = |prompt: &str, chosen: &str, scores: [f64; 2]| {
            json!({ "prompt": prompt, "chosen": chosen, "rejected": "n", "score_chosen": scores[0], "score_rejected": scores[1] })
                .to_string()
        };
        let folder = Folder::with_tokenizer();
        let rows = [
            row("one", "yes", [0.1, -2.0]),
            row("this prompt is far too long", "yes", [1.0, 2.0]),
            row("two", "a completion that goes on", [1.0, 2.0]),
        ];
        let other = [
            row("one", "yes", [0.1, -2.0]),
            row("three", "é", [0.3, 0.2]),
        ];
        Self {
            files: vec![
                folder.write("a.jsonl", rows.join("\n")),
                folder.write("b.jsonl", other.join("\n")),
            ],
            folder,
            config: config(16),
            needs: Needs {
                scores: true,
                ..BOTH
            },
        }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("new/cache")
    }

    fn tokenizer(&self) -> Tokenizer {
        self.folder.tokenizer()
    }

    fn try_load(&self, cache: &Path) -> Result<Loaded, DataError> {
        let (config, needs) = (&self.config, self.needs);
        let mut ignore = |_, _| ();
        load_cached(
            &self.files,
            config,
            &self.tokenizer(),
            needs,
            Some(cache),
            &mut ignore,
        )
    }

    /// Loads and checks that it is what an uncached load gives.
    #[track_caller]
    fn load(&self) -> Loaded {
        let loaded = self.try_load(&self.cache()).unwrap();
        let expected = load(&self.files, &self.config, &self.tokenizer(), self.needs).unwrap();
        let dataset = &loaded.dataset;
        assert_eq!(dataset.pairs, expected.pairs);
        assert_eq!(dataset.digest, expected.digest);
        assert_eq!(dataset.report, expected.report);
        loaded
    }

    #[track_caller]
    fn check(&self, from_cache: bool, why: &str) {
        let loaded = self.load();
        assert_eq!(loaded.from_cache, from_cache, "{why}");
        assert!(loaded.warnings.is_empty(), "{why}: {:?}", loaded.warnings);
    }

    fn cached_files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.cache()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

#[test]
fn a_second_load_is_read_from_the_cache_with_all_of_its_report() {
    let mut place = Place::new();
    place.check(false, "nothing is there");
    place.check(true, "nothing changed");
    place.needs.scores = false;
    place.check(false, "scores are not asked for");
    place.check(true, "nothing changed");
    let files = place.cached_files();
    assert_eq!(files.len(), 2, "no temporary file is left: {files:?}");
}

#[test]
fn unpaired_rows_are_kept_too() {
    let mut place = Place::new();
    let row = |label: bool| json!({ "prompt": "q", "completion": "y", "label": label }).to_string();
    let rows = [row(true), row(false)].join("\n");
    (place.files, place.needs) = (vec![place.folder.write("c.jsonl", rows)], EITHER);
    place.check(false, "nothing is there");
    place.check(true, "nothing changed");
}

/// What is changed, and how.
type Change = (&'static str, fn(&mut Place));

#[test]
fn what_decides_the_pairs_is_in_the_key_and_nothing_else() {
    let mut place = Place::new();
    place.check(false, "nothing is there");
    let decisive: [Change; 9] = [
        ("length", |it| {
            it.config.max_length = 17;
        }),
        ("truncation", |it| {
            it.config.truncation = Truncation::KeepEnd;
        }),
        ("format", |it| it.config.format = data::Format::Preference),
        ("columns", |it| it.config.columns.label = "good".into()),
        ("needs", |it| {
            it.needs.sides = data::Sides::Either;
        }),
        ("order", |it| it.files.reverse()),
        ("fewer files", |it| drop(it.files.pop())),
        ("name", |it| {
            let bytes = fs::read(&it.files[0]).unwrap();
            it.files[0] = it.folder.write("c.jsonl", bytes);
        }),
        ("template", |it| {
            it.folder.write("chat_template.jinja", "x");
        }),
    ];
    for (name, change) in decisive {
        change(&mut place);
        place.check(false, name);
        place.check(true, name);
    }
    // The same size, and the same time as far as clocks can tell.
    let text = fs::read_to_string(&place.files[0]).unwrap();
    fs::write(
        &place.files[0],
        text.replace("one", "won").replace("three", "threw"),
    )
    .unwrap();
    place.check(false, "content");
    place.config.shuffle = false;
    place.config.train.clear();
    place.check(true, "shuffling and the list of names change no pair");
}

#[test]
fn a_damaged_file_is_told_and_replaced() {
    let place = Place::new();
    place.check(false, "nothing is there");
    let file = place.cached_files().pop().unwrap();
    let whole = fs::read(&file).unwrap();
    let damaged = |content: &[u8], expected: &str| {
        fs::write(&file, content).unwrap();
        let loaded = place.load();
        assert!(!loaded.from_cache);
        let [warning] = loaded.warnings.as_slice() else {
            panic!("{:?}", loaded.warnings);
        };
        assert!(warning.contains(expected), "{warning}");
        assert!(
            warning.starts_with(&file.display().to_string()),
            "{warning}"
        );
        assert_eq!(fs::read(&file).unwrap(), whole);
    };
    for index in (0..whole.len()).step_by(61).chain([whole.len() - 1]) {
        let mut flipped = whole.clone();
        flipped[index] ^= 1;
        damaged(&flipped, "does not match its checksum");
        damaged(
            &whole[..index],
            if index < 32 {
                "ends early"
            } else {
                "its checksum"
            },
        );
    }
    damaged(&[&whole[..], b"x"].concat(), "does not match its checksum");
    // A whole file under another's name.
    let mut other = whole[..whole.len() - 32].to_vec();
    other[8] ^= 1;
    let sum = blake3::hash(&other);
    damaged(
        &[&other[..], sum.as_bytes()].concat(),
        "it holds something else",
    );
    place.check(true, "replaced");
}

#[test]
fn a_cache_that_cannot_be_written_is_a_warning() {
    let place = Place::new();
    let blocked = place.folder.write("blocked", "a file");
    let loaded = place.try_load(&blocked).unwrap();
    assert!(!loaded.from_cache);
    assert_eq!(loaded.dataset.pairs.len(), 4);
    let warning = loaded.warnings.last().unwrap();
    assert!(
        warning.starts_with("the tokenized pairs are not kept for the next time: "),
        "{warning}"
    );
    assert!(warning.ends_with("blocked can be written"), "{warning}");
}

#[test]
fn faults_are_told_with_a_cache_as_without() {
    let mut place = Place::new();
    place.files.push(place.folder.path().join("absent.jsonl"));
    let error = place.try_load(&place.cache()).unwrap_err();
    let expected = load(&place.files, &place.config, &place.tokenizer(), place.needs).unwrap_err();
    assert_eq!(error.to_string(), expected.to_string());
    place.files[2] = place.folder.write("c.jsonl", "{}");
    for _ in 0..2 {
        let error = place
            .folder
            .message(&place.try_load(&place.cache()).unwrap_err());
        assert!(
            error.starts_with("c.jsonl:1: the row has no `chosen`"),
            "{error}"
        );
    }
    assert!(!place.cache().exists());
}

#[test]
fn progress_ascends_to_all_bytes_of_every_container() {
    let place = Place::new();
    let table = crate::files::table(0..3000);
    let path = |name: &str| place.folder.path().join(name);
    crate::files::write_parquet(
        &path("a.parquet"),
        &table,
        parquet::basic::Compression::SNAPPY,
    );
    crate::files::write_arrow_file(&path("a.arrow"), &[table]);
    let row = r#"{"prompt": "q", "chosen": "y", "rejected": "n"}"#;
    place
        .folder
        .write("c.jsonl", format!("{row}\n").repeat(3000));
    place.folder.write(
        "c.jsonl.gz",
        crate::files::gzip(format!("{row}\n").repeat(9000).as_bytes()),
    );
    place
        .folder
        .write("chat_template.jinja", crate::support::TEMPLATE);
    for name in ["a.parquet", "a.arrow", "c.jsonl", "c.jsonl.gz"] {
        let files = [path(name)];
        let bytes = fs::metadata(&files[0]).unwrap().len();
        let mut told = Vec::new();
        let mut progress = |done, total| told.push((done, total));
        let tokenizer = place.tokenizer();
        load_cached(&files, &place.config, &tokenizer, BOTH, None, &mut progress).unwrap();
        assert!(told.len() >= 3, "{name}: {told:?}");
        assert!(told.is_sorted(), "{name}: {told:?}");
        assert!(
            told[0].0 > 0 && told.iter().all(|it| it.1 == bytes),
            "{name}: {told:?}"
        );
        assert_eq!(told.last().unwrap().0, bytes, "{name}");
    }
}

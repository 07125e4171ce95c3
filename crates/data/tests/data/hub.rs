//! Data sets of a hub, against a small one on loopback that answers as Hugging Face's does.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use data::{Hub, load};
use serde_json::json;

use crate::support::{BOTH, Folder, config};

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";
const ROW: &str = r#"{"prompt": "q", "chosen": "y", "rejected": "n"}"#;

/// What a hub has and how it answers.
#[derive(Clone, Default)]
struct Answers {
    files: BTreeMap<String, String>,
    /// Answered to everything.
    status: Option<u16>,
    /// Whether bodies of files break off.
    torn: bool,
}

/// A hub that listens.
struct FakeHub {
    endpoint: String,
    answers: Arc<Mutex<Answers>>,
    /// Paths, with the token that came with them.
    asked: Arc<Mutex<Vec<String>>>,
    cache: Folder,
}

impl FakeHub {
    /// One with files that each hold one row.
    fn with(names: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let files = names.iter().map(|name| ((*name).into(), ROW.into()));
        let answers = Arc::new(Mutex::new(Answers {
            files: files.collect(),
            ..Answers::default()
        }));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let hub = Self {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            answers: answers.clone(),
            asked: asked.clone(),
            cache: Folder::new(),
        };
        thread::spawn(move || {
            for stream in listener.incoming() {
                let answers = answers.lock().unwrap().clone();
                // A client that hangs up early is no fault of the test.
                drop(answer(&stream.unwrap(), &answers, &asked));
            }
        });
        hub
    }

    fn hub(&self) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            token: None,
            offline: false,
            cache: self.cache.path().join("hub"),
        }
    }

    fn fetch(&self, entry: &str) -> Result<Vec<PathBuf>, String> {
        self.hub().fetch(entry).map_err(|error| error.to_string())
    }

    /// The names in the data set of what an entry gives.
    fn names(&self, entry: &str) -> Result<Vec<String>, String> {
        let files = self.fetch(entry)?;
        let name = |file: &PathBuf| {
            let path = file.display().to_string();
            let (_, name) = path.split_once(SHA).unwrap();
            name.trim_start_matches('/').to_owned()
        };
        Ok(files.iter().map(name).collect())
    }

    fn answers(&self, change: impl FnOnce(&mut Answers)) {
        change(&mut self.answers.lock().unwrap());
    }

    fn take_asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// One request and its answer.
fn answer(
    mut stream: &TcpStream,
    answers: &Answers,
    asked: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let path = request.split(' ').nth(1).unwrap_or("").to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let token = headers.get("authorization").map_or("", String::as_str);
    asked
        .lock()
        .unwrap()
        .push(format!("{path} {token}").trim_end().to_owned());
    let mut respond = |status: u16, extra: &str, length: usize, body: &str| {
        write!(
            stream,
            "HTTP/1.1 {status} Whatever\r\nContent-Length: {length}\r\nConnection: close\r\n{extra}\r\n{body}"
        )
    };
    if let Some(status) = answers.status {
        return respond(status, "", 0, "");
    }
    if path.starts_with("/api/datasets/owner/name/revision/") {
        let names = answers
            .files
            .keys()
            .map(|name| json!({ "rfilename": name }));
        let info = json!({ "sha": SHA, "siblings": names.collect::<Vec<_>>() }).to_string();
        return respond(200, "", info.len(), &info);
    }
    let resolved = path.strip_prefix(&format!("/datasets/owner/name/resolve/{SHA}/"));
    let Some((name, content)) = resolved.and_then(|name| answers.files.get_key_value(name)) else {
        return respond(404, "", 0, "");
    };
    let range = headers
        .get("range")
        .and_then(|it| it.strip_prefix("bytes="));
    let (start, end) = range.and_then(|it| it.split_once('-')).unwrap_or(("0", ""));
    let start: usize = start.parse().unwrap();
    let end = end.parse::<usize>().map_or(content.len(), |last| last + 1);
    let body = &content[start..end];
    let extra = format!(
        "ETag: \"{}\"\r\nX-Repo-Commit: {SHA}\r\nContent-Range: bytes {start}-{}/{}\r\n",
        blake3::hash(name.as_bytes()).to_hex(),
        end - 1,
        content.len()
    );
    let sent = if answers.torn && body.len() > 1 {
        &body[..body.len() / 2]
    } else {
        body
    };
    respond(206, &extra, body.len(), sent)
}

#[test]
fn the_split_train_is_downloaded_once_and_loads() {
    let hub = FakeHub::with(&[
        "README.md",
        "data/test-00000-of-00001.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/train-00000-of-00002.jsonl",
    ]);
    let files = hub.fetch("hf://datasets/owner/name").unwrap();
    let names = hub.names("hf://datasets/owner/name").unwrap();
    assert_eq!(
        names,
        [
            "data/train-00000-of-00002.jsonl",
            "data/train-00001-of-00002.jsonl"
        ]
    );
    assert_eq!(fs::read_to_string(&files[0]).unwrap(), ROW);
    let tokenizer = Folder::with_tokenizer().tokenizer();
    assert_eq!(
        load(&files, &config(64), &tokenizer, BOTH)
            .unwrap()
            .pairs
            .len(),
        2
    );
    hub.take_asked();
    assert_eq!(hub.fetch("hf://datasets/owner/name").unwrap(), files);
    assert_eq!(hub.take_asked(), ["/api/datasets/owner/name/revision/main"]);
}

#[test]
fn a_split_has_many_names() {
    for names in [
        &["train.jsonl", "test.jsonl"][..],
        &[
            "train/0000.parquet",
            "train/0001.parquet",
            "validation/0000.parquet",
        ],
        &["default/train/0.parquet", "default/test/0.parquet"],
        &["training.json.gz", "valid.json.gz"],
        &["orca_rlhf.jsonl", "README.md"],
    ] {
        let first = names[0];
        let found = FakeHub::with(names)
            .names("hf://datasets/owner/name")
            .unwrap();
        assert!(found.contains(&first.to_owned()), "{names:?}");
        assert!(
            !found
                .iter()
                .any(|name| name.contains("te") || name.contains("val")),
            "{found:?}"
        );
    }
}

#[test]
fn splits_that_are_not_clear_are_refused_with_what_there_is() {
    for (names, reason) in [
        (
            &["train_prefs-0.parquet", "train_sft-0.parquet"][..],
            "none of its files is called train",
        ),
        (
            &["a/train.jsonl", "b/train.jsonl"],
            "it has train files in several folders or containers",
        ),
        (
            &["train.jsonl", "train.parquet"],
            "it has train files in several folders or containers",
        ),
    ] {
        let message = FakeHub::with(names)
            .fetch("hf://datasets/owner/name")
            .unwrap_err();
        let there = names.join(", ");
        let expected = format!(
            "hf://datasets/owner/name: {reason}; name files as hf://datasets/owner/name/FILE; there are {there}"
        );
        assert_eq!(message, expected);
    }
    let none = FakeHub::with(&["README.md"])
        .fetch("hf://datasets/owner/name")
        .unwrap_err();
    assert!(none.ends_with("there are none that can be read"), "{none}");
}

#[test]
fn files_folders_patterns_and_revisions_may_be_named() {
    let hub = FakeHub::with(&["a/1.jsonl", "a/2.jsonl", "a/b/3.jsonl", "a/notes.txt"]);
    for (inside, expected) in [
        ("/a/2.jsonl", &["a/2.jsonl"][..]),
        ("/a", &["a/1.jsonl", "a/2.jsonl"]),
        ("/a/", &["a/1.jsonl", "a/2.jsonl"]),
        ("/a/*.jsonl", &["a/1.jsonl", "a/2.jsonl"]),
        ("/**/*.jsonl", &["a/1.jsonl", "a/2.jsonl", "a/b/3.jsonl"]),
        ("@v1/a/1.jsonl", &["a/1.jsonl"]),
        ("@refs%2Fconvert%2Fparquet/a/1.jsonl", &["a/1.jsonl"]),
    ] {
        let entry = format!("hf://datasets/owner/name{inside}");
        assert_eq!(hub.names(&entry).unwrap(), expected, "{entry}");
    }
    let asked = hub.take_asked();
    for revision in ["v1", "refs%2Fconvert%2Fparquet"] {
        let expected = format!("/api/datasets/owner/name/revision/{revision}");
        assert!(asked.contains(&expected), "{asked:?}");
    }
    let message = hub.fetch("hf://datasets/owner/name/b.jsonl").unwrap_err();
    let expected = "hf://datasets/owner/name/b.jsonl: it has no b.jsonl; name files as ";
    assert!(message.starts_with(expected), "{message}");
}

#[test]
fn answers_that_are_no_success_say_what_was_asked_and_the_cure() {
    let hub = FakeHub::with(&["train.jsonl"]);
    let by_hand = "or download it with `hf download owner/name --repo-type dataset --local-dir data/name` and name \
                   \"data/name/**/*.parquet\"";
    let check = |hub: &Hub, status: u16, words: &str| {
        let message = hub
            .fetch("hf://datasets/owner/name")
            .unwrap_err()
            .to_string();
        let url = format!("{}/api/datasets/owner/name/revision/main", hub.endpoint);
        let expected = format!("hf://datasets/owner/name: {url} answered {status}");
        assert!(message.starts_with(&expected), "{message}");
        assert!(message.contains(words), "{message}");
        assert!(message.ends_with(by_hand), "{message}");
        assert!(!message.contains("hf_secret"), "{message}");
    };
    let with_token = Hub {
        token: Some("hf_secret".into()),
        ..hub.hub()
    };
    for status in [401, 403] {
        hub.answers(|it| it.status = Some(status));
        check(
            &hub.hub(),
            status,
            "no token was sent; check the name, accept its terms at http://",
        );
        check(
            &with_token,
            status,
            "the token that was sent has no access; accept its terms at http://",
        );
    }
    assert!(
        hub.take_asked()
            .last()
            .unwrap()
            .ends_with(" Bearer hf_secret")
    );
    hub.answers(|it| it.status = Some(404));
    check(
        &hub.hub(),
        404,
        "there is no such data set, revision or file; check the name",
    );
    hub.answers(|it| it.status = Some(500));
    check(
        &hub.hub(),
        500,
        "; try again, or set HF_ENDPOINT to a mirror",
    );
}

#[test]
fn without_a_network_the_error_says_how_to_get_the_files() {
    // A port that nobody listens on any more.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let fake = FakeHub::with(&[]);
    let unreachable = Hub {
        endpoint: endpoint.clone(),
        ..fake.hub()
    };
    let message = unreachable
        .fetch("hf://datasets/owner/name@v2")
        .unwrap_err()
        .to_string();
    let expected = format!(
        "hf://datasets/owner/name@v2: asked for {endpoint}/api/datasets/owner/name/revision/v2: "
    );
    assert!(message.starts_with(&expected), "{message}");
    assert!(
        message.contains("; try again, or set HF_ENDPOINT to a mirror, or download it with"),
        "{message}"
    );

    let offline = Hub {
        offline: true,
        ..fake.hub()
    };
    let message = offline
        .fetch("hf://datasets/owner/name")
        .unwrap_err()
        .to_string();
    let expected = format!(
        "HF_HUB_OFFLINE is set, so {} was not asked; unset it, or download it with",
        fake.endpoint
    );
    assert!(message.contains(&expected), "{message}");
    assert!(fake.take_asked().is_empty());
}

#[test]
fn a_transfer_that_breaks_off_leaves_no_file() {
    let hub = FakeHub::with(&["train.jsonl"]);
    hub.answers(|it| it.torn = true);
    hub.answers(|it| {
        let long = format!("{ROW}\n").repeat(100);
        it.files.insert("train.jsonl".into(), long);
    });
    let message = hub.fetch("hf://datasets/owner/name").unwrap_err();
    assert!(
        message.contains(&format!("/resolve/{SHA}/train.jsonl: ")),
        "{message}"
    );
    hub.answers(|it| it.torn = false);
    let files = hub.fetch("hf://datasets/owner/name").unwrap();
    assert_eq!(
        fs::read_to_string(&files[0]).unwrap(),
        format!("{ROW}\n").repeat(100)
    );
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for name in [
        "../../train.jsonl",
        "/etc/train.jsonl",
        "a/../../train.jsonl",
    ] {
        let message = FakeHub::with(&[name])
            .fetch("hf://datasets/owner/name")
            .unwrap_err();
        assert!(
            message.contains("lists names that lead out of the data set"),
            "{message}"
        );
    }
    let hub = FakeHub::with(&["train.jsonl"]);
    for entry in [
        "hf://datasets/../name",
        "hf://datasets/owner/na?me",
        "hf://datasets/owner/name@a b",
    ] {
        let message = hub.fetch(entry).unwrap_err();
        assert!(message.contains("that a hub does not have"), "{message}");
    }
    for entry in ["hf://", "hf://datasets/owner", "data/train.jsonl"] {
        let message = hub.fetch(entry).unwrap_err();
        assert!(
            message.ends_with("write hf://datasets/OWNER/NAME"),
            "{message}"
        );
    }
    assert!(hub.take_asked().is_empty());
}

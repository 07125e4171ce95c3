//! What TensorBoard, W&B and MLflow would see in the files of a tracker, read without a line of the code that wrote them.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

/// A run as one of the programs sees it.
#[derive(Debug, Default)]
pub struct Seen {
    /// Values by name, in the order of the file, each with its step.
    pub curves: BTreeMap<String, Vec<(u64, f64)>>,
    /// Samples by step.
    pub texts: BTreeMap<u64, String>,
    /// The configuration, or what of it the format has as text.
    pub config: String,
    /// How it ended, in the program's words.
    pub end: String,
}

/// A protobuf field: its number, and its content.
enum Field<'a> {
    Number(u64, u64),
    Bytes(u64, &'a [u8]),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            break;
        }
    }
    value
}

fn fields(mut bytes: &[u8]) -> Vec<Field<'_>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let mut fixed = |length: usize| {
            let (content, rest) = bytes.split_at(length);
            bytes = rest;
            content
        };
        fields.push(match key & 7 {
            0 => Field::Number(key >> 3, varint(&mut bytes)),
            1 => Field::Number(key >> 3, u64::from_le_bytes(fixed(8).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                let (content, rest) = bytes.split_at(length);
                bytes = rest;
                Field::Bytes(key >> 3, content)
            }
            5 => Field::Number(
                key >> 3,
                u64::from(u32::from_le_bytes(fixed(4).try_into().unwrap())),
            ),
            other => panic!("wire type {other}"),
        });
    }
    fields
}

fn number(message: &[u8], wanted: u64) -> Option<u64> {
    fields(message).into_iter().find_map(|field| match field {
        Field::Number(number, value) if number == wanted => Some(value),
        _ => None,
    })
}

fn all(message: &[u8], wanted: u64) -> Vec<&[u8]> {
    let fields = fields(message).into_iter();
    let wanted = fields.filter_map(|field| match field {
        Field::Bytes(number, content) if number == wanted => Some(content),
        _ => None,
    });
    wanted.collect()
}

fn text(message: &[u8], wanted: u64) -> String {
    let content = all(message, wanted).first().copied().unwrap_or_default();
    String::from_utf8(content.to_vec()).unwrap()
}

fn inside(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// As TensorBoard's EventAccumulator reads a folder: files in the order of their names, each up to what does not hold; a
/// session's start takes back its step and later ones.
pub fn tensorboard(folder: &Path) -> Seen {
    let mut seen = Seen::default();
    for path in inside(folder) {
        let bytes = fs::read(path).unwrap();
        let mut rest = &bytes[..];
        while rest.len() >= 12 {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let Some(event) = rest.get(12..12 + length) else {
                break;
            };
            if rest.len() < 12 + length + 4 {
                break;
            }
            rest = &rest[12 + length + 4..];
            let step = number(event, 2).unwrap_or(0);
            if let [session] = all(event, 7)[..] {
                assert_eq!(number(session, 1), Some(1), "SessionLog.START");
                for curve in seen.curves.values_mut() {
                    curve.retain(|(at, _)| *at < step);
                }
                seen.texts.retain(|at, _| *at < step);
            }
            for value in all(event, 5)
                .into_iter()
                .flat_map(|summary| all(summary, 1))
            {
                let tag = text(value, 1);
                if let Some(bits) = number(value, 2) {
                    let value = f64::from(f32::from_bits(bits as u32));
                    seen.curves.entry(tag).or_default().push((step, value));
                } else if tag == "config" {
                    seen.config = text(all(value, 8)[0], 8);
                } else if tag.starts_with("samples/") {
                    *seen.texts.entry(step).or_default() += &text(all(value, 8)[0], 8);
                }
            }
        }
    }
    seen.curves.retain(|_, curve| !curve.is_empty());
    seen
}

/// As W&B's clients read the only run in a folder.
pub fn wandb(folder: &Path) -> Seen {
    let mut seen = Seen::default();
    let runs = inside(folder);
    let Some(run) = runs.first() else {
        return seen;
    };
    assert_eq!(runs.len(), 1, "{runs:?}");
    let files = inside(run).into_iter();
    let mut files = files.filter(|path| path.extension().is_some_and(|it| it == "wandb"));
    let bytes = fs::read(files.next().unwrap()).unwrap();
    let mut last = None;
    for (index, record) in records(&bytes).iter().enumerate() {
        assert_eq!(
            number(record, 1),
            Some(index as u64 + 1),
            "numbers of records"
        );
        seen.end.clear();
        for history in all(record, 2) {
            let step = number(all(history, 2)[0], 1).unwrap_or(0);
            // W&B takes no step back, and one record a step.
            assert!(last.is_none_or(|last| last < step), "{step} after {last:?}");
            last = Some(step);
            for item in all(history, 1) {
                let (name, json) = (text(item, 1), text(item, 16));
                if name == "samples" {
                    let file: Value = serde_json::from_str(&json).unwrap();
                    let path = run.join("files").join(file["path"].as_str().unwrap());
                    let page = fs::read_to_string(path).unwrap();
                    assert_eq!(file["size"], page.len());
                    seen.texts.insert(step, page);
                } else if !name.starts_with('_') {
                    let value = json.parse().unwrap();
                    seen.curves.entry(name).or_default().push((step, value));
                }
            }
        }
        for run in all(record, 17) {
            let sections = all(run, 4).into_iter().flat_map(|config| all(config, 1));
            let sections = sections.map(|item| format!("{}: {}\n", text(item, 1), text(item, 16)));
            seen.config = sections.collect();
        }
        for exit in all(record, 18) {
            seen.end = format!("exit {}", number(exit, 1).unwrap_or(0));
        }
    }
    seen
}

/// LevelDB's records behind W&B's header.
fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
    assert_eq!(bytes[..7], *b":W&B\xe1\xbe\0");
    let mut records = Vec::new();
    let mut offset = 7;
    while offset < bytes.len() {
        if 32768 - offset % 32768 < 7 {
            offset += 32768 - offset % 32768;
            continue;
        }
        let length = usize::from(bytes[offset + 4]) + 256 * usize::from(bytes[offset + 5]);
        let data = &bytes[offset + 7..offset + 7 + length];
        if matches!(bytes[offset + 6], 1 | 2) {
            records.push(Vec::new());
        }
        records.last_mut().unwrap().extend(data);
        offset += 7 + length;
    }
    records
}

/// As MLflow's file store reads the only run of the only experiment in a folder; names have their slash back.
pub fn mlflow(folder: &Path) -> Seen {
    let mut seen = Seen::default();
    let experiments = inside(folder);
    let Some(experiment) = experiments.first() else {
        return seen;
    };
    let runs: Vec<_> = inside(experiment)
        .into_iter()
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!((experiments.len(), runs.len()), (1, 1));
    let mut folders = vec![runs[0].join("metrics")];
    while let Some(folder) = folders.pop() {
        for path in inside(&folder) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path
                .strip_prefix(runs[0].join("metrics"))
                .unwrap()
                .display()
                .to_string();
            let text = fs::read_to_string(path).unwrap();
            let curve = text.lines().map(|line| {
                let [at, value, step] = line.split(' ').collect::<Vec<_>>()[..] else {
                    panic!("{line}");
                };
                assert!(at.parse::<u64>().unwrap() > 1_600_000_000_000, "{line}");
                (step.parse().unwrap(), value.parse().unwrap())
            });
            seen.curves.insert(name.replace('.', "/"), curve.collect());
        }
    }
    seen.curves.retain(|_, curve| !curve.is_empty());
    for path in inside(&runs[0].join("params")) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        writeln!(seen.config, "{name}: {}", fs::read_to_string(path).unwrap()).unwrap();
    }
    for path in inside(&runs[0].join("artifacts/samples")) {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let step = name.strip_prefix("step-").unwrap().parse().unwrap();
        seen.texts.insert(step, fs::read_to_string(path).unwrap());
    }
    let meta = fs::read_to_string(runs[0].join("meta.yaml")).unwrap();
    let lines = meta.lines().filter(|line| line.starts_with("status:"));
    seen.end = lines.collect();
    seen
}

//! Files in, JSON objects with their place out: JSON lines, or one JSON array. What the objects mean is `layout`'s matter.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::error::{DataError, Place};

/// One JSON object and where it starts.
pub(crate) struct Row {
    pub place: Place,
    pub object: Map<String, Value>,
}

/// Containers that users hand over by mistake, by their first bytes.
const CONTAINERS: [(&[u8], &str); 5] = [
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (&[0x1f, 0x8b], "a gzip file"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "a zstd file"),
    (b"PK\x03\x04", "a zip file"),
];

/// Every row of `files`, in order. Blank lines are not rows.
pub(crate) fn read(files: &[PathBuf]) -> Result<Vec<Row>, DataError> {
    let mut rows = Vec::new();
    for file in files {
        let bytes = fs::read(file).map_err(|source| DataError::Read {
            file: file.clone(),
            source,
        })?;
        parse(file, &bytes, &mut rows)?;
    }
    Ok(rows)
}

/// Adds the rows of one file's content.
pub(crate) fn parse(file: &Path, bytes: &[u8], rows: &mut Vec<Row>) -> Result<(), DataError> {
    let text = utf8(file, bytes)?;
    if text.trim_start().starts_with('[') {
        read_array(file, text, rows)
    } else {
        read_lines(file, text, rows)
    }
}

fn utf8<'a>(file: &Path, bytes: &'a [u8]) -> Result<&'a str, DataError> {
    for (magic, kind) in CONTAINERS {
        if bytes.starts_with(magic) {
            return Err(DataError::Container {
                file: file.into(),
                kind,
            });
        }
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        let line_start = bytes[..at]
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |newline| newline + 1);
        DataError::NotUtf8 {
            place: place(file, newlines(&bytes[..at]) + 1),
            column: at - line_start + 1,
            byte: bytes[at],
        }
    })?;
    // Windows tools start UTF-8 files with a byte order mark.
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

fn read_lines(file: &Path, text: &str, rows: &mut Vec<Row>) -> Result<(), DataError> {
    for (index, line) in text.split('\n').enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let place = place(file, index + 1);
        let value = serde_json::from_str(line).map_err(|error| json(&place, &error))?;
        rows.push(row(place, value)?);
    }
    Ok(())
}

fn read_array(file: &Path, text: &str, rows: &mut Vec<Row>) -> Result<(), DataError> {
    // Raw elements borrow from `text`, so an element's address tells its line.
    let elements: Vec<&RawValue> =
        serde_json::from_str(text).map_err(|error| json(&place(file, 1), &error))?;
    let mut counted = 0;
    let mut line = 1;
    for element in elements {
        let offset = element.get().as_ptr() as usize - text.as_ptr() as usize;
        line += newlines(&text.as_bytes()[counted..offset]);
        counted = offset;
        let place = place(file, line);
        let value = serde_json::from_str(element.get()).map_err(|error| json(&place, &error))?;
        rows.push(row(place, value)?);
    }
    Ok(())
}

fn row(place: Place, value: Value) -> Result<Row, DataError> {
    match value {
        Value::Object(object) => Ok(Row { place, object }),
        other => Err(DataError::Row {
            place,
            reason: format!("the row is {}, not an object", kind(&other)),
            cure: "write each row as {\"prompt\": …, \"chosen\": …, \"rejected\": …}".into(),
        }),
    }
}

/// What a JSON value is, for a message.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The parser's own line and column count from the text it was given; `start` is where that text begins.
fn json(start: &Place, error: &serde_json::Error) -> DataError {
    let mut reason = error.to_string();
    if let Some(position) = reason.rfind(" at line ") {
        reason.truncate(position);
    }
    DataError::Json {
        place: place(&start.file, start.line + error.line().saturating_sub(1)),
        column: error.column().max(1),
        reason,
    }
}

fn place(file: &Path, line: usize) -> Place {
    Place {
        file: file.into(),
        line,
    }
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.split(|&byte| byte == b'\n').count() - 1
}

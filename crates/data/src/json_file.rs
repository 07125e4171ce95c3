//! JSON lines, or one JSON array: text in, rows out. Lines are read one at a time; an array is read whole.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::{DataError, Place};
use crate::rows::{Row, Sink, kind};

/// Longest line. No row of text comes near; what does is a compressed file of zeros, or no JSON lines at all.
const LINE_BYTES_MAX: u64 = 256 << 20;

/// Containers that users hand over by mistake, by their first bytes, and what to do with them.
const CONTAINERS: [(&[u8], &str, &str); 5] = [
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "name it .arrow"),
    (&[0x1f, 0x8b], "a gzip file", "name it .jsonl.gz"),
    (
        &[0x28, 0xb5, 0x2f, 0xfd],
        "a zstd file",
        "name it .jsonl.zst",
    ),
    (
        b"PK\x03\x04",
        "a zip file",
        "unpack it and name the files that it holds",
    ),
];

/// Hands every row to `sink`; `unread` is what a failure of `source` means. Blank lines are not rows.
pub(crate) fn read(
    file: &Arc<Path>,
    source: impl Read,
    unread: &dyn Fn(io::Error) -> DataError,
    sink: &mut Sink<'_>,
) -> Result<(), DataError> {
    let mut reader = BufReader::new(source);
    let mut bytes = Vec::new();
    let mut first_row = true;
    for line in 1.. {
        bytes.clear();
        let mut limited = reader.by_ref().take(LINE_BYTES_MAX);
        let length = limited.read_until(b'\n', &mut bytes).map_err(unread)?;
        if length == 0 {
            break;
        }
        if length as u64 == LINE_BYTES_MAX {
            return Err(DataError::Row {
                place: place(file, line),
                reason: format!("the line is longer than {} MiB", LINE_BYTES_MAX >> 20),
                cure: "write each row on a line of its own".into(),
            });
        }
        if line == 1 {
            refuse_container(file, &bytes)?;
        }
        let text = utf8(file, line, &bytes)?;
        if text.trim().is_empty() {
            continue;
        }
        if first_row && text.trim_start().starts_with('[') {
            reader.read_to_end(&mut bytes).map_err(unread)?;
            return read_array(file, line, utf8(file, line, &bytes)?, sink);
        }
        first_row = false;
        let place = place(file, line);
        let text = text.strip_suffix('\n').unwrap_or(text);
        let value = serde_json::from_str(text).map_err(|error| json(&place, &error))?;
        sink(row(place, value)?)?;
    }
    Ok(())
}

fn refuse_container(file: &Path, bytes: &[u8]) -> Result<(), DataError> {
    for (magic, kind, cure) in CONTAINERS {
        if bytes.starts_with(magic) {
            return Err(DataError::Container {
                file: file.into(),
                kind,
                cure,
            });
        }
    }
    Ok(())
}

/// Text that starts with line `line` of the file.
fn utf8<'a>(file: &Arc<Path>, line: usize, bytes: &'a [u8]) -> Result<&'a str, DataError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        let line_start = bytes[..at]
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |newline| newline + 1);
        DataError::NotUtf8 {
            place: place(file, line + newlines(&bytes[..at])),
            column: at - line_start + 1,
            byte: bytes[at],
        }
    })?;
    // Windows tools start UTF-8 files with a byte order mark.
    let marked = text.strip_prefix('\u{feff}').filter(|_| line == 1);
    Ok(marked.unwrap_or(text))
}

fn read_array(
    file: &Arc<Path>,
    first_line: usize,
    text: &str,
    sink: &mut Sink<'_>,
) -> Result<(), DataError> {
    // Raw elements borrow from `text`, so an element's address tells its line.
    let elements: Vec<&RawValue> =
        serde_json::from_str(text).map_err(|error| json(&place(file, first_line), &error))?;
    let mut counted = 0;
    let mut line = first_line;
    for element in elements {
        let offset = element.get().as_ptr() as usize - text.as_ptr() as usize;
        line += newlines(&text.as_bytes()[counted..offset]);
        counted = offset;
        let place = place(file, line);
        let value = serde_json::from_str(element.get()).map_err(|error| json(&place, &error))?;
        sink(row(place, value)?)?;
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

fn place(file: &Arc<Path>, line: usize) -> Place {
    Place {
        file: file.clone(),
        line,
    }
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.split(|&byte| byte == b'\n').count() - 1
}

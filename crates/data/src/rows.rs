//! Files in, JSON objects with their place out, one after another. What the objects mean is `layout`'s matter.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{DataError, Place};
use crate::inputs::{Compression, Container, Input};
use crate::{arrow_file, json_file, parquet_file};

/// One JSON object and where it starts.
pub(crate) struct Row {
    pub place: Place,
    pub object: Map<String, Value>,
}

/// Takes rows in order; its refusal ends the reading.
pub(crate) type Sink<'a> = dyn FnMut(Row) -> Result<(), DataError> + 'a;

/// How many bytes of a file have been read; of tables, about.
pub(crate) type Position = Cell<u64>;

/// Hands every row of a file to `sink`. Of the file no more is in memory than a line, a batch of a table, or one JSON array.
pub(crate) fn read(
    input: &Input,
    position: &Position,
    sink: &mut Sink<'_>,
) -> Result<(), DataError> {
    let Input { file, container } = input;
    let open = File::open(file).map_err(|source| read_error(file, source))?;
    let compression = match container {
        Container::Parquet => return parquet_file::read(file, open, position, sink),
        Container::Arrow => return arrow_file::read(file, open, position, sink),
        Container::Json(compression) => compression,
    };
    let open = Counted { open, position };
    match compression {
        Compression::None => json_file::read(file, open, &|source| read_error(file, source), sink),
        Compression::Gzip => {
            let torn = |source| damaged(file, "gzip", &source);
            json_file::read(file, flate2::read::MultiGzDecoder::new(open), &torn, sink)
        }
        Compression::Zstd => {
            let torn = |source| damaged(file, "zstd", &source);
            let reader = zstd::stream::read::Decoder::new(open).map_err(torn)?;
            json_file::read(file, reader, &torn, sink)
        }
    }
}

/// A file that says how far it has been read.
struct Counted<'a> {
    open: File,
    position: &'a Position,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.open.read(buffer)?;
        self.position.set(self.position.get() + length as u64);
        Ok(length)
    }
}

fn read_error(file: &Path, source: io::Error) -> DataError {
    DataError::Read {
        file: file.into(),
        source,
    }
}

fn damaged(file: &Path, kind: &'static str, source: &io::Error) -> DataError {
    let reason = match source.kind() {
        io::ErrorKind::UnexpectedEof => "it ends early".into(),
        _ => source.to_string(),
    };
    DataError::Damaged {
        file: file.into(),
        kind,
        reason,
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

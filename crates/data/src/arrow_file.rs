//! Arrow IPC, as a file or as a stream (which `save_to_disk` of Hugging Face writes), a record batch at a time.
//!
//! ```text
//! stream  schema │ dictionaries and record batches … │ end of stream
//! file    "ARROW1" 0 0 │ zeros, a multiple of 8 │ stream │ footer │ its bytes, u32 │ "ARROW1"
//! ```
//!
//! A file is read as the stream that it contains. The footer repeats where the batches are, which only random access needs; its end
//! tells that the file is whole. A stream without its end is refused, since a torn one looks the same.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use arrow_buffer::Buffer;
use arrow_ipc::reader::StreamDecoder;

use crate::error::DataError;
use crate::rows::{Position, Sink};
use crate::table;

const KIND: &str = "Arrow";
const MAGIC: &[u8; 6] = b"ARROW1";
/// The magic and what aligns it.
const HEAD_BYTES: u64 = 8;
/// The footer's length and the magic.
const TAIL_BYTES: u64 = 10;
const CHUNK_BYTES: u64 = 1 << 20;

/// Hands every row to `sink`.
pub(crate) fn read(
    file: &Arc<Path>,
    open: File,
    position: &Position,
    sink: &mut Sink<'_>,
) -> Result<(), DataError> {
    let unread = |source| DataError::Read {
        file: file.to_path_buf(),
        source,
    };
    let mut open = BufReader::new(open);
    let framed = framed(&mut open).map_err(unread)?;
    let (start, end) = match framed {
        Some(Ok(range)) => range,
        Some(Err(reason)) => return Err(damaged(file, reason)),
        None => (0, open.get_ref().metadata().map_err(unread)?.len()),
    };
    open.seek(SeekFrom::Start(start)).map_err(unread)?;
    let mut stream = open.take(end - start);
    let mut decoder = StreamDecoder::new();
    let mut before = 0;
    loop {
        let mut bytes = Vec::new();
        let mut chunk = stream.by_ref().take(CHUNK_BYTES);
        chunk.read_to_end(&mut bytes).map_err(unread)?;
        if bytes.is_empty() {
            break;
        }
        position.set(position.get() + bytes.len() as u64);
        let mut bytes = Buffer::from_vec(bytes);
        while let Some(batch) = table::decode(file, KIND, || {
            decoder
                .decode(&mut bytes)
                .map_err(|error| error.to_string())
        })
        .map_err(compressed)?
        {
            table::rows(file, before, &batch, sink)?;
            before += batch.num_rows();
        }
    }
    let whole = decoder.finish().is_ok();
    // Behind its end a stream takes no byte.
    let ended = whole
        && table::decode(file, KIND, || {
            Ok(decoder.decode(&mut Buffer::from_vec(vec![0_u8])).is_err())
        })?;
    if !whole || framed.is_none() && !ended {
        return Err(damaged(file, "it ends early"));
    }
    Ok(())
}

/// Where the stream in an Arrow file is, or what is wrong with the file; `None` for a stream.
fn framed(open: &mut BufReader<File>) -> io::Result<Option<Result<(u64, u64), &'static str>>> {
    let length = open.get_ref().metadata()?.len();
    let mut head = Vec::new();
    open.by_ref().take(HEAD_BYTES).read_to_end(&mut head)?;
    if !head.starts_with(MAGIC) {
        return Ok(None);
    }
    if length < HEAD_BYTES + TAIL_BYTES {
        return Ok(Some(Err("it ends early")));
    }
    let mut tail = [0; TAIL_BYTES as usize];
    open.seek(SeekFrom::Start(length - TAIL_BYTES))?;
    open.read_exact(&mut tail)?;
    let [a, b, c, d, magic @ ..] = tail;
    if magic != *MAGIC {
        return Ok(Some(Err("it ends early")));
    }
    let footer = u64::from(u32::from_le_bytes([a, b, c, d]));
    let Some(end) = (length - TAIL_BYTES).checked_sub(footer) else {
        return Ok(Some(Err("its footer is longer than the file")));
    };
    // Some writers align the stream by more than the 8 bytes that the format asks for.
    let mut start = HEAD_BYTES;
    open.seek(SeekFrom::Start(start))?;
    let mut word = [0; 8];
    while start + 8 <= end {
        open.read_exact(&mut word)?;
        if word != [0; 8] {
            return Ok(Some(Ok((start, end))));
        }
        start += 8;
    }
    Ok(Some(Err("it holds no stream")))
}

fn damaged(file: &Path, reason: &str) -> DataError {
    DataError::Damaged {
        file: file.into(),
        kind: KIND,
        reason: reason.into(),
    }
}

/// A codec that is not built in is not damage. It is left out because its decoder allocates what the file says before it looks.
fn compressed(error: DataError) -> DataError {
    match error {
        DataError::Damaged { file, reason, .. } if reason.contains("decompression requires") => {
            DataError::Input {
                path: file,
                reason: "its record batches are compressed".into(),
                cure: "write it without compression, or as .parquet".into(),
            }
        }
        other => other,
    }
}

//! A dataset as a file. All numbers are little endian.
//!
//! ```text
//! file  magic, 8 bytes │ key, 32 │ digest of the dataset, 32 │ report: its bytes, u64; JSON │ pairs, u64 │ pair … │ BLAKE3 of all that, 32
//! pair  input file, u32 │ line, u64 │ tokens of prompt, chosen, rejected, 3 × u32 │ scored, u8: 0 or 1 │ scores, 2 × f64 if scored │ ids, u32 …
//! ```
//!
//! The sum is checked before anything is believed. The names of the input files are not kept: the key has them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, Write};
use std::path::Path;

use storage::DurableFile;

use crate::dataset::{Dataset, Pair};
use crate::error::Place;
use crate::inputs::Input;

/// Ends with the version of the format.
const MAGIC: &[u8; 8] = b"CALDPOP\x01";
const SUM_BYTES: u64 = 32;
/// What a pair has besides ids.
const PAIR_BYTES_MIN: u64 = 25;

/// The dataset under `key`; `None` if there is no such file.
///
/// # Errors
/// Why a file that is there cannot be used.
pub(crate) fn read(
    file: &Path,
    key: &[u8; 32],
    inputs: &[Input],
) -> Result<Option<Dataset>, String> {
    match File::open(file) {
        Ok(open) => believed(open, key, inputs)
            .map(Some)
            .map_err(|error| error.to_string()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

fn believed(mut open: File, key: &[u8; 32], inputs: &[Input]) -> io::Result<Dataset> {
    let Some(length) = open.metadata()?.len().checked_sub(SUM_BYTES) else {
        return Err(damaged("it ends early"));
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader((&open).take(length))?;
    if bytes(&mut open)? != *hasher.finalize().as_bytes() {
        return Err(damaged("its content does not match its checksum"));
    }
    open.rewind()?;
    let mut reader = BufReader::new(open.take(length));
    if bytes(&mut reader)? != *MAGIC || bytes(&mut reader)? != *key {
        return Err(damaged("it holds something else"));
    }
    let digest = bytes(&mut reader)?;
    let report = u64::from_le_bytes(bytes(&mut reader)?);
    let report = serde_json::from_reader(reader.by_ref().take(report))?;
    let count = u64::from_le_bytes(bytes(&mut reader)?);
    let mut pairs = Vec::with_capacity(count.min(length / PAIR_BYTES_MIN) as usize);
    for _ in 0..count {
        pairs.push(pair(&mut reader, inputs)?);
    }
    Ok(Dataset {
        pairs,
        digest,
        report,
    })
}

fn pair(reader: &mut impl Read, inputs: &[Input]) -> io::Result<Pair> {
    let input = u32::from_le_bytes(bytes(reader)?) as usize;
    let Some(input) = inputs.get(input) else {
        return Err(damaged("it names a file that is not there"));
    };
    let line = u64::from_le_bytes(bytes(reader)?) as usize;
    let mut count = || Ok::<_, io::Error>(u32::from_le_bytes(bytes(reader)?));
    let [prompt, chosen, rejected] = [count()?, count()?, count()?];
    let [scored] = bytes(reader)?;
    let mut score = || Ok::<_, io::Error>(f64::from_le_bytes(bytes(reader)?));
    let scores = match scored {
        0 => None,
        _ => Some([score()?, score()?]),
    };
    Ok(Pair {
        place: Place {
            file: input.file.clone(),
            line,
        },
        prompt: ids(reader, prompt)?,
        chosen: ids(reader, chosen)?,
        rejected: ids(reader, rejected)?,
        scores,
    })
}

fn ids(reader: &mut impl Read, count: u32) -> io::Result<Vec<u32>> {
    let mut bytes = vec![0; count as usize * size_of::<u32>()];
    reader.read_exact(&mut bytes)?;
    let words = bytes.as_chunks().0.iter().copied();
    Ok(words.map(u32::from_le_bytes).collect())
}

fn bytes<const N: usize>(reader: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn damaged(reason: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}

/// Puts the dataset in place of whatever has the name; the folder is made if it is missing.
///
/// # Errors
/// Why not.
pub(crate) fn write(
    file: &Path,
    key: &[u8; 32],
    inputs: &[Input],
    dataset: &Dataset,
) -> Result<(), String> {
    let report = serde_json::to_vec(&dataset.report).map_err(|error| error.to_string())?;
    let folder = file.parent().unwrap_or(Path::new("."));
    storage::create_directory(folder).map_err(|error| error.to_string())?;
    let durable = DurableFile::create(file).map_err(|error| error.to_string())?;
    let durable = content(durable, key, inputs, &report, dataset);
    let durable = durable.map_err(|error| error.to_string())?;
    durable.commit().map_err(|error| error.to_string())
}

fn content(
    file: DurableFile,
    key: &[u8; 32],
    inputs: &[Input],
    report: &[u8],
    dataset: &Dataset,
) -> io::Result<DurableFile> {
    let mut out = BufWriter::new(Summed {
        file,
        hasher: blake3::Hasher::new(),
    });
    out.write_all(MAGIC)?;
    out.write_all(key)?;
    out.write_all(&dataset.digest)?;
    out.write_all(&(report.len() as u64).to_le_bytes())?;
    out.write_all(report)?;
    out.write_all(&(dataset.pairs.len() as u64).to_le_bytes())?;
    let indices: HashMap<&Path, u32> = inputs.iter().map(|it| &*it.file).zip(0..).collect();
    for pair in &dataset.pairs {
        let completions = [&pair.prompt, &pair.chosen, &pair.rejected];
        out.write_all(&indices[&*pair.place.file].to_le_bytes())?;
        out.write_all(&(pair.place.line as u64).to_le_bytes())?;
        for ids in completions {
            out.write_all(&(ids.len() as u32).to_le_bytes())?;
        }
        out.write_all(&[u8::from(pair.scores.is_some())])?;
        for score in pair.scores.iter().flatten() {
            out.write_all(&score.to_le_bytes())?;
        }
        for id in completions.into_iter().flatten() {
            out.write_all(&id.to_le_bytes())?;
        }
    }
    let Summed { mut file, hasher } = out.into_inner()?;
    file.write_all(hasher.finalize().as_bytes())?;
    Ok(file)
}

/// A file and the sum of what was written to it.
struct Summed {
    file: DurableFile,
    hasher: blake3::Hasher,
}

impl Write for Summed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = self.file.write(bytes)?;
        self.hasher.update(&bytes[..length]);
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

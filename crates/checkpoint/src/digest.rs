//! Two digests of a file in one pass: crc32c of each chunk, so that a ranged read can be checked without the rest of the
//! file, and BLAKE3 of the whole, which no accident and no swap gets past.

/// Bytes per checksummed chunk; the last one of a file is shorter.
pub const CHUNK_BYTES: u64 = 8 << 20;

/// The digests of what went through.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Digests {
    pub bytes: u64,
    /// Hexadecimal.
    pub blake3: String,
    pub chunks: Vec<u32>,
}

/// Takes a file's bytes in order.
#[derive(Debug, Default)]
pub(crate) struct Digester {
    hasher: blake3::Hasher,
    bytes: u64,
    chunks: Vec<u32>,
}

impl Digester {
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.hasher.update(bytes);
        while !bytes.is_empty() {
            let filled = self.bytes % CHUNK_BYTES;
            if filled == 0 {
                self.chunks.push(0);
            }
            let (now, later) = bytes.split_at(bytes.len().min((CHUNK_BYTES - filled) as usize));
            if let Some(chunk) = self.chunks.last_mut() {
                *chunk = crc32c::crc32c_append(*chunk, now);
            }
            self.bytes += now.len() as u64;
            bytes = later;
        }
    }

    pub fn finish(self) -> Digests {
        Digests {
            bytes: self.bytes,
            blake3: self.hasher.finalize().to_hex().to_string(),
            chunks: self.chunks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_cut_at_their_size_however_the_bytes_arrive() {
        let bytes: Vec<u8> = (0..CHUNK_BYTES as usize * 2 + 5)
            .map(|index| (index % 251) as u8)
            .collect();
        let mut whole = Digester::default();
        whole.update(&bytes);
        let mut pieces = Digester::default();
        for piece in bytes.chunks(1_000_003) {
            pieces.update(piece);
        }
        let whole = whole.finish();
        assert_eq!(whole, pieces.finish());
        let expected: Vec<u32> = bytes
            .chunks(CHUNK_BYTES as usize)
            .map(crc32c::crc32c)
            .collect();
        assert_eq!(whole.chunks, expected);
        assert_eq!(whole.blake3, blake3::hash(&bytes).to_hex().to_string());
    }
}

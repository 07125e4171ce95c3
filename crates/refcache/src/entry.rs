//! The name of an entry inside its scope: a digest of the prompt's and the completion's token ids.

use std::fmt;

/// BLAKE3 over the token ids of a prompt and of one completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryKey([u8; 32]);

impl EntryKey {
    /// The key of `completion` after `prompt`. Both are length-prefixed: moving the border between them changes the key.
    pub fn new(prompt: &[u32], completion: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"caldpo reference entry 1");
        for ids in [prompt, completion] {
            hasher.update(&(ids.len() as u64).to_le_bytes());
            for id in ids {
                hasher.update(&id.to_le_bytes());
            }
        }
        Self(*hasher.finalize().as_bytes())
    }

    pub(crate) fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 8 bytes as a number, so that numbers compare as keys do.
    pub(crate) fn prefix(&self) -> u64 {
        prefix(&self.0)
    }

    /// About where the key is among `count` sorted ones. Digests are spread evenly.
    pub(crate) fn place_of(&self, count: usize) -> usize {
        ((u128::from(self.prefix()) * count as u128) >> 64) as usize
    }
}

impl fmt::Display for EntryKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex(&self.0))
    }
}

/// The first 8 of some bytes as a number, so that numbers compare as the bytes do.
///
/// # Panics
/// There are fewer.
pub(crate) fn prefix(bytes: &[u8]) -> u64 {
    let (first, _) = bytes.split_first_chunk().expect("there are 8 bytes");
    u64::from_be_bytes(*first)
}

/// Lower-case hexadecimal digits of a digest.
pub(crate) fn hex(digest: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*digest).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_and_the_border_between_prompt_and_completion_matter() {
        let key = EntryKey::new(&[1, 2], &[3]);
        assert_eq!(key, EntryKey::new(&[1, 2], &[3]));
        for (prompt, completion) in [
            (&[1][..], &[2, 3][..]),
            (&[1, 2, 3], &[]),
            (&[], &[1, 2, 3]),
            (&[2, 1], &[3]),
            (&[1, 2], &[4]),
        ] {
            assert_ne!(key, EntryKey::new(prompt, completion));
        }
    }
}

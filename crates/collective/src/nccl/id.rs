//! What the ranks of one communicator must have in common: 128 bytes that one of them makes.

use std::fmt;

/// Length of an id.
pub const UNIQUE_ID_BYTES: usize = 128;

/// NCCL's unique id. It holds the address of the process that made it, which has to live until all ranks are connected, and a
/// number that lets its holder in: it is relayed like a secret, kept with its generation, and written nowhere.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; UNIQUE_ID_BYTES]);

/// Bytes that cannot be an id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UniqueIdError {
    /// Another length.
    #[error("an NCCL id has {UNIQUE_ID_BYTES} bytes, here are {0}")]
    Length(usize),
    /// Nothing but zeros: nobody made it.
    #[error("an NCCL id of zeros only, which nobody made")]
    Empty,
}

impl UniqueId {
    /// The id as it travels.
    pub fn as_bytes(&self) -> &[u8; UNIQUE_ID_BYTES] {
        &self.0
    }
}

impl TryFrom<&[u8]> for UniqueId {
    type Error = UniqueIdError;

    fn try_from(bytes: &[u8]) -> Result<Self, UniqueIdError> {
        let id: [u8; UNIQUE_ID_BYTES] = bytes
            .try_into()
            .map_err(|_| UniqueIdError::Length(bytes.len()))?;
        if id == [0; UNIQUE_ID_BYTES] {
            return Err(UniqueIdError::Empty);
        }
        Ok(Self(id))
    }
}

/// Enough to tell two ids apart, not enough to use one.
impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digest = blake3::hash(&self.0).to_hex();
        write!(f, "UniqueId(digest {})", &digest[..8])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_bytes() {
        let mut bytes = [0; UNIQUE_ID_BYTES];
        bytes[127] = 9;
        let id = UniqueId::try_from(&bytes[..]).expect("an id");
        assert_eq!(id.as_bytes(), &bytes);
        assert_eq!(UniqueId::try_from(&id.as_bytes()[..]), Ok(id));
    }

    #[test]
    fn bytes_that_are_no_id_are_refused() {
        assert_eq!(
            UniqueId::try_from(&[1; 127][..]),
            Err(UniqueIdError::Length(127))
        );
        assert_eq!(UniqueId::try_from(&[][..]), Err(UniqueIdError::Length(0)));
        assert_eq!(UniqueId::try_from(&[0; 128][..]), Err(UniqueIdError::Empty));
    }

    #[test]
    fn an_id_is_not_printed() {
        let id = UniqueId::try_from(&[0xab; 128][..]).expect("an id");
        let text = format!("{id:?}").to_lowercase();
        assert!(!text.contains("abab") && !text.contains("171"), "{text}");
    }
}

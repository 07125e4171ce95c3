//! Everything besides the tokens that decides the bits of a reference value.

use serde::{Deserialize, Serialize};

use crate::entry::hex;

/// What a value is valid for (invariant R1). Two scopes that differ in any field share nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scope {
    /// Digest of the frozen model: its configuration and weights.
    #[serde(with = "hex_digest")]
    pub weights: [u8; 32],
    /// How a pair is cut to length, with the length.
    pub truncation: String,
    /// Type of the forward pass, `f32` or `bf16`.
    pub dtype: String,
    /// Backend of the forward pass, such as `flex` or `cuda`.
    pub backend: String,
    /// Kind of device: the same kernels round differently on another one.
    pub device_class: String,
    /// Version of the kernels.
    pub kernels: String,
}

impl Scope {
    /// BLAKE3 over the fields in the order of the struct, each length-prefixed.
    pub fn digest(&self) -> [u8; 32] {
        // Taken apart, so that a new field cannot be forgotten here.
        let Self {
            weights,
            truncation,
            dtype,
            backend,
            device_class,
            kernels,
        } = self;
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"caldpo reference scope 1").update(weights);
        for field in [truncation, dtype, backend, device_class, kernels] {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// In words, as in `scope.json`.
    pub(crate) fn described(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a scope is plain data")
    }

    /// Name of the scope's folder.
    pub(crate) fn folder(&self) -> String {
        hex(&self.digest())
    }
}

/// Digests as hexadecimal digits, so that `scope.json` can be compared by eye.
mod hex_digest {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::entry::hex;

    pub fn serialize<S: Serializer>(digest: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(digest))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let digits = String::deserialize(deserializer)?;
        let hash = blake3::Hash::from_hex(&digits).map_err(D::Error::custom)?;
        Ok(*hash.as_bytes())
    }
}

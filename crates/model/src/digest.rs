//! The digest of a model's weights, parameter by parameter, so that nobody need have all of them in f32 at once.

use crate::layout::Parameter;
use crate::write::little_endian;

/// Of the parameters so far.
pub(crate) struct WeightsDigest(blake3::Hasher);

impl WeightsDigest {
    pub fn new() -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"caldpo weights 1\0");
        Self(hasher)
    }

    /// Takes the next parameter of the layout.
    pub fn add(&mut self, parameter: &Parameter, values: &[f32]) {
        let hasher = &mut self.0;
        hasher.update(&(parameter.name.len() as u64).to_le_bytes());
        hasher.update(parameter.name.as_bytes());
        hasher.update(&(parameter.shape.len() as u64).to_le_bytes());
        for &size in &parameter.shape {
            hasher.update(&(size as u64).to_le_bytes());
        }
        if cfg!(target_endian = "little") {
            // On all threads.
            hasher.update_rayon(bytemuck::cast_slice(values));
        } else {
            let hashed = little_endian(values, |bytes| {
                hasher.update(bytes);
                Ok::<(), std::convert::Infallible>(())
            });
            hashed.expect("hashing cannot fail");
        }
    }

    /// The digest of all that were taken.
    pub fn finish(&self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

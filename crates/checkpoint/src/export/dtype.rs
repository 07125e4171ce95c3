//! Element types of exported weights: which one a tensor gets, its names and size, and what does not fit into it.

use half::{bf16, f16};
use safetensors::Dtype;
use serde::Serialize;

use crate::rank_file::encode;

/// How exported weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ExportDtype {
    /// Each tensor as in the model that the run began with; f32 where that tells nothing.
    #[default]
    Source,
    /// The bits of the checkpoint.
    F32,
    /// Rounded to the nearest bf16, ties to even.
    Bf16,
    /// Rounded to the nearest f16, ties to even.
    F16,
}

/// Element type of an exported tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightDtype {
    /// 32 bits.
    F32,
    /// 16 bits with the range of f32.
    Bf16,
    /// 16 bits, at most 65504.
    F16,
}

impl WeightDtype {
    /// The type of that name in safetensors files, if the export writes it.
    pub(super) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// Its name in safetensors files.
    pub(super) fn safetensors(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// Its name in config.json.
    pub(super) fn torch(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// Bytes of an element.
    pub(super) fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The first finite value that would become infinite.
    pub(super) fn overflow(self, values: &[f32]) -> Option<f32> {
        let overflows = |value: f32| match self {
            Self::F32 => false,
            // Halfway between the largest number and what the next one would be, from where rounding goes up.
            Self::Bf16 => value.abs() >= f32::from_bits(0x7f7f_8000),
            Self::F16 => value.abs() >= 65520.0,
        };
        let mut finite = values.iter().copied().filter(|value| value.is_finite());
        finite.find(|&value| overflows(value))
    }

    /// Fills `bytes` with the values in this type, little endian.
    pub(super) fn encode(self, values: &[f32], bytes: &mut Vec<u8>) {
        match self {
            Self::F32 => encode(values, f32::to_le_bytes, bytes),
            Self::Bf16 => encode(values, |it| bf16::from_f32(it).to_le_bytes(), bytes),
            Self::F16 => encode(values, |it| f16::from_f32(it).to_le_bytes(), bytes),
        }
    }
}

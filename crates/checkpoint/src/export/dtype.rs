//! Element types of exported weights: which one a tensor gets, its names and size, and what does not fit into it.

use half::{bf16, f16};
use safetensors::Dtype;
use serde::Serialize;

use super::shards::Tensor;
use crate::rank_file::encode;

/// How exported weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ExportDtype {
    /// Each tensor as in the model that the run began with, f32 where that tells nothing; in 16 bits dithered, so that the mean of
    /// what was trained is kept.
    #[default]
    Source,
    /// The bits of the checkpoint.
    F32,
    /// Rounded to bf16: a tensor that was bf16 before the run as in `source`, others to the nearest.
    Bf16,
    /// Rounded to f16: a tensor that was f16 before the run as in `source`, others to the nearest.
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

    /// Fills `bytes` with the values in this type, little endian, rounded by `rounding`.
    pub(super) fn encode(self, values: &[f32], rounding: &mut Rounding, bytes: &mut Vec<u8>) {
        match (self, rounding) {
            (Self::F32, _) => encode(values, f32::to_le_bytes, bytes),
            (Self::Bf16, Rounding::Nearest) => {
                encode(values, |it| bf16::from_f32(it).to_le_bytes(), bytes);
            }
            (Self::F16, Rounding::Nearest) => {
                encode(values, |it| f16::from_f32(it).to_le_bytes(), bytes);
            }
            (Self::Bf16, Rounding::Dithered(thresholds)) => {
                let mut thresholds = thresholds.next(values.len());
                let element = |it| dithered_bf16(it, thresholds()).to_le_bytes();
                encode(values, element, bytes);
            }
            (Self::F16, Rounding::Dithered(thresholds)) => {
                let mut thresholds = thresholds.next(values.len());
                let element = |it| dithered_f16(it, thresholds()).to_le_bytes();
                encode(values, element, bytes);
            }
        }
    }
}

/// How values of f32 become 16 bits.
pub(super) enum Rounding {
    /// To the nearest, and to even in a tie: for values that lie anywhere.
    Nearest,
    /// For values that lay on the type's grid before they were trained. Updates of less than half a step of the grid would be lost
    /// with rounding to the nearest, which in a short run are most of them: of SmolLM2-135M's log-ratios after 24 steps with a
    /// learning rate of 1e-4 a fifth. Each element goes away from zero if it is beyond a threshold of its own between its two
    /// neighbours, so that over many elements the mean is the exact one (stochastic rounding, Gupta et al. 2015, arXiv:1502.02551).
    Dithered(Thresholds),
}

impl Rounding {
    /// That of a tensor: dithered if it had the exported type before the run.
    pub(super) fn of(tensor: &Tensor<'_>) -> Self {
        if tensor.had_dtype && tensor.dtype != WeightDtype::F32 {
            Self::Dithered(Thresholds::of(&tensor.spec.name))
        } else {
            Self::Nearest
        }
    }
}

/// 16 random bits for every element of a tensor, always the same: BLAKE3's output for its name. (Those of operands in training follow
/// from places in its buckets, which an export does not know, and a GPU has to compute them.)
pub(super) struct Thresholds {
    stream: blake3::OutputReader,
    bytes: Vec<u8>,
}

impl Thresholds {
    fn of(tensor: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"caldpo dither 1").update(tensor.as_bytes());
        Self {
            stream: hasher.finalize_xof(),
            bytes: Vec::new(),
        }
    }

    /// Those of the next `count` elements.
    fn next(&mut self, count: usize) -> impl FnMut() -> u16 {
        self.bytes.resize(2 * count, 0);
        self.stream.fill(&mut self.bytes);
        let (pairs, _) = self.bytes.as_chunks::<2>();
        let mut pairs = pairs.iter();
        move || u16::from_le_bytes(*pairs.next().expect("a threshold for every element"))
    }
}

/// `value` between two neighbours goes up for as many of 65,536 thresholds as it has passed of the way.
fn dithered_bf16(value: f32, threshold: u16) -> bf16 {
    let rounded = (value.to_bits().wrapping_add(u32::from(threshold)) >> 16) as u16;
    let rounded = bf16::from_bits(rounded);
    // The largest numbers stay numbers, and NaN stays what it is.
    if value.is_nan() || rounded.is_infinite() {
        return bf16::from_f32(value);
    }
    rounded
}

/// The same in f16.
fn dithered_f16(value: f32, threshold: u16) -> f16 {
    let nearest = f16::from_f32(value);
    if !nearest.is_finite() || nearest.to_f32() == value {
        return nearest;
    }
    let beyond = nearest.to_f32().abs() > value.abs();
    let towards_zero = f16::from_bits(nearest.to_bits() - u16::from(beyond));
    let away = f16::from_bits(towards_zero.to_bits() + 1);
    if away.is_infinite() {
        return nearest;
    }
    let [value, from, to] = [value, towards_zero.to_f32(), away.to_f32()].map(f32::abs);
    let share = (value - from) / (to - from);
    if f32::from(threshold) + share * 65536.0 >= 65536.0 {
        away
    } else {
        towards_zero
    }
}

//! What a checkpoint consists of, in the words of the trainer: tensors, kinds, pieces, the state beside them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A tensor of the model under its Hugging Face name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Such as `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Sizes of its dimensions; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of elements, or nothing if it exceeds what this machine can count.
    pub fn elements(&self) -> Option<usize> {
        let mut sizes = self.shape.iter();
        sizes.try_fold(1usize, |elements, &size| elements.checked_mul(size))
    }
}

/// Which of the three values of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The parameter itself.
    Weight,
    /// The optimizer's mean of gradients; absent, of all tensors, under one that keeps none.
    FirstMoment,
    /// The optimizer's mean of squared gradients.
    SecondMoment,
}

impl Kind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Weight, Self::FirstMoment, Self::SecondMoment];

    /// First part of a piece's name in a rank file.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Weight => "model",
            Self::FirstMoment => "first",
            Self::SecondMoment => "second",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Weight => "weight",
            Self::FirstMoment => "first moment",
            Self::SecondMoment => "second moment",
        })
    }
}

/// A contiguous part of a tensor, counted in elements of its row-major order, that one rank writes. `V` holds its values until they
/// are written.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a, V = &'a [f32]> {
    /// The tensor's name.
    pub tensor: &'a str,
    /// Which of its values.
    pub kind: Kind,
    /// First element.
    pub start: usize,
    /// The values from there on.
    pub values: V,
}

/// Where the training stands, beside the tensors. Data order is a function of seed, epoch and step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// The last committed optimizer step.
    pub step: u64,
    /// The epoch of that step.
    pub epoch: u64,
    /// Updates applied, which excludes skipped steps: what the moments' bias corrections count.
    pub updates: u64,
    /// The run's seed.
    pub seed: u64,
    /// A running mean that the objective keeps, of rewards over steps; absent where it keeps none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift: Option<MeanState>,
}

/// A running mean.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeanState {
    /// The mean; finite, to the bit in JSON.
    pub mean: f64,
    /// Values in it.
    pub count: u64,
}

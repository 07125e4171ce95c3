//! A GPU's kernels made ready before the first step, whose deadline they would otherwise eat: compiled by NVRTC, or found
//! compiled on disk. On the CPU there is nothing to do.

use data::Pair;
use kernels::{DeviceKernels, TileSums};
use model::{Device, Gradients, Model, Pack, Stage, Sums};
use serde::Serialize;

use crate::batch::pair_tokens;

/// What making kernels ready took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelTimes {
    /// Texts that were compiled; one holds all kernels of a source for one set of macros.
    pub compiled: usize,
    /// Those that were found compiled on disk.
    pub loaded: usize,
    /// Seconds of both.
    pub seconds: f64,
}

impl KernelTimes {
    /// Of all kernels that `device` was asked for so far; `None` if it is no GPU.
    pub(crate) fn of(device: &Device) -> Option<Self> {
        let DeviceKernels {
            compiled,
            loaded,
            seconds,
            ..
        } = device.kernels()?;
        Some(Self {
            compiled,
            loaded,
            seconds,
        })
    }
}

/// Takes the shortest of `pairs` forward and back, which launches every kernel that training launches, and drops what comes of
/// it, stage by stage: there need not be room for all gradients. `updates`: whether the update runs on the device too.
pub(crate) fn warm_up(model: &Model, pairs: &[Pair], updates: bool) {
    let device = model.device();
    let shortest = pairs.iter().min_by_key(|pair| pair.packed_tokens());
    let Some(shortest) = shortest.filter(|_| device.is_gpu()) else {
        return;
    };
    let pack = Pack::new([pair_tokens(shortest)]);
    model.forward(&pack);
    let (_, saved) = model.forward_train(&pack);
    let mut passing = Passing {
        gradients: Gradients::absent(&model.trained().bucket_lens(), device),
        model,
    };
    let end = model.backward_into(saved, &[[0.0; 2]], &mut passing);
    if let Some(input) = end.input {
        let add = |gradients: &mut Gradients| model.backward_input(input, gradients);
        passing.through(Stage::Embedding, add);
    }
    if updates {
        kernels::prepare_update(device);
    }
    device.synchronize();
}

/// Gradients of one stage at a time, which nobody needs.
struct Passing<'a> {
    model: &'a Model,
    gradients: Gradients,
}

impl Passing<'_> {
    fn through(&mut self, stage: Stage, add: impl FnOnce(&mut Gradients)) {
        let buckets: Vec<usize> = self.model.trained().buckets_of(stage).collect();
        for &bucket in &buckets {
            self.gradients.put_zeros(bucket);
        }
        add(&mut self.gradients);
        for bucket in buckets {
            self.gradients.drop_bucket(bucket);
        }
    }
}

impl Sums for Passing<'_> {
    fn stage(&mut self, stage: Stage, add: &mut dyn FnMut(&mut Gradients)) {
        let tied = stage == Stage::Head && self.model.config().tied;
        let stage = if tied { Stage::Embedding } else { stage };
        self.through(stage, add);
    }

    fn head(&mut self) -> Option<&mut dyn TileSums> {
        None
    }
}

/// Says what the kernels took, and what is wrong with where they are kept.
pub(crate) fn tell_kernels(device: &Device) {
    let Some(kernels) = device.kernels() else {
        return;
    };
    tracing::info!("GPU kernels ready: {kernels}");
    for problem in &kernels.problems {
        tracing::warn!("{problem}");
    }
}

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
/// it. Nothing is allocated that a step would not allocate: gradients are added to `gradients`, which are zeros before and after,
/// and buckets that are not there are there for one stage. `updates`: whether the update runs on the device too.
pub(crate) fn warm_up(model: &Model, pairs: &[Pair], gradients: &mut Gradients, updates: bool) {
    let device = model.device();
    let shortest = pairs.iter().min_by_key(|pair| pair.packed_tokens());
    let Some(shortest) = shortest.filter(|_| device.is_gpu()) else {
        return;
    };
    let pack = Pack::new([pair_tokens(shortest)]);
    model.forward(&pack);
    let (_, saved) = model.forward_train(&pack);
    let mut passing = Passing { model, gradients };
    let end = model.backward_into(saved, &[[0.0; 2]], &mut passing);
    if let Some(input) = end.input {
        let add = |gradients: &mut Gradients| model.backward_input(input, gradients);
        passing.through(Stage::Embedding, add);
    }
    gradients.zero();
    if updates {
        kernels::prepare_update(device);
    }
    device.synchronize();
}

/// Gradients which nobody needs, of one stage at a time where there are none.
struct Passing<'a> {
    model: &'a Model,
    gradients: &'a mut Gradients,
}

impl Passing<'_> {
    fn through(&mut self, stage: Stage, add: impl FnOnce(&mut Gradients)) {
        let buckets = self.model.trained().buckets_of(stage);
        let absent: Vec<usize> = buckets.filter(|&it| !self.gradients.has(it)).collect();
        for &bucket in &absent {
            self.gradients.put_zeros(bucket);
        }
        add(self.gradients);
        for bucket in absent {
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

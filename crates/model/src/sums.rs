//! Where a backward adds its gradients, stage by stage: into gradients that are its own, or into sums that the backwards of
//! several packs share. Only the border; how packs take turns is `trainer`'s.

use kernels::{EmbeddingRows, Gradients, Tensor, TileSums};

use crate::Stage;

/// Sums that a backward adds to. It passes the stages in the order head, norm, blocks from the last to the first, each once.
pub trait Sums {
    /// Calls `add` with gradients that hold the buckets of `stage`. A tied head belongs to [`Stage::Head`] here.
    fn stage(&mut self, stage: Stage, add: &mut dyn FnMut(&mut Gradients));

    /// The head's weight in tiles, where it is shared like that; it is not asked for as a stage then.
    fn head(&mut self) -> Option<&mut dyn TileSums>;
}

/// Gradients of its own.
impl Sums for Gradients {
    fn stage(&mut self, _stage: Stage, add: &mut dyn FnMut(&mut Gradients)) {
        add(self);
    }

    fn head(&mut self) -> Option<&mut dyn TileSums> {
        None
    }
}

/// The gradient of a pack's embedded tokens: what is left of a backward when it has passed the blocks.
pub struct InputGradient {
    pub(crate) tokens: Vec<u32>,
    /// `[n, hidden]`.
    pub(crate) dx: Tensor<2>,
}

impl InputGradient {
    /// Adds it row by row; packs in a fixed order give fixed bits.
    pub fn add_to(self, rows: &mut EmbeddingRows) {
        rows.add(self.dx, &self.tokens);
    }
}

//! The layout seen from the decoder: which slot each operation reads its weight from and adds its gradient to.

use kernels::Slot;

use crate::Layout;
use crate::layout::BLOCK;

/// Slots of the whole model.
pub(crate) struct Slots {
    pub embedding: Slot,
    pub blocks: Vec<BlockSlots>,
    pub norm: Slot,
    /// The embedding's slot when tied.
    pub head: Slot,
}

/// Slots of one block.
pub(crate) struct BlockSlots {
    pub queries: Slot,
    pub keys: Slot,
    pub values: Slot,
    pub output: Slot,
    pub gate: Slot,
    pub up: Slot,
    pub down: Slot,
    pub attention_norm: Slot,
    pub mlp_norm: Slot,
}

impl Slots {
    /// Reads the module order of `layout::tensors`: embedding, nine tensors a block, norm, head unless tied.
    pub fn new(layout: &Layout, blocks: usize, tied: bool) -> Self {
        let mut slots = layout.parameters.iter().map(crate::Parameter::slot);
        assert_eq!(
            slots.len(),
            2 + BLOCK.len() * blocks + usize::from(!tied),
            "parameters of {blocks} blocks"
        );
        let mut next = || slots.next().expect("the count was checked above");
        let embedding = next();
        let blocks = (0..blocks)
            .map(|_| BlockSlots {
                queries: next(),
                keys: next(),
                values: next(),
                output: next(),
                gate: next(),
                up: next(),
                down: next(),
                attention_norm: next(),
                mlp_norm: next(),
            })
            .collect();
        let norm = next();
        let head = if tied { embedding } else { next() };
        Self {
            embedding,
            blocks,
            norm,
            head,
        }
    }
}

//! The layout seen from the decoder: which slot each operation reads its weight from and adds its gradient to.

use kernels::{AttentionPlan, Slot};

use crate::config::{NormKind, Projections};
use crate::layout::{Module, Part, modules};
use crate::{Layout, Lora, ModelConfig, Parameter};

/// Slots of the whole model.
pub(crate) struct Slots {
    pub embedding: Slot,
    pub blocks: Vec<BlockSlots>,
    pub norm: Affine,
    /// The embedding's slot when tied.
    pub head: Slot,
}

/// A weight and perhaps a bias: a linear map or a norm.
#[derive(Clone, Copy)]
pub(crate) struct Affine {
    pub weight: Slot,
    pub bias: Option<Slot>,
    /// What an adapter adds to a linear map.
    pub adapter: Option<LowRank>,
}

/// A and B of an adapter, slots of its own layout.
#[derive(Clone, Copy)]
pub(crate) struct LowRank {
    pub a: Slot,
    pub b: Slot,
    pub rank: usize,
}

/// Which modules have an adapter, and its slots in order.
struct Adapters<'a> {
    lora: Option<&'a Lora>,
    slots: Box<dyn Iterator<Item = Slot> + 'a>,
}

/// Slots of one block.
pub(crate) struct BlockSlots {
    pub projections: ProjectionSlots,
    pub head_norms: Option<[Affine; 2]>,
    pub output: Affine,
    pub gate: Option<Affine>,
    pub up: Affine,
    pub down: Affine,
    pub attention_norm: Affine,
    pub attention_output_norm: Option<Affine>,
    pub mlp_norm: Affine,
    pub mlp_output_norm: Option<Affine>,
}

/// Queries, keys and values.
#[allow(
    clippy::large_enum_variant,
    reason = "one a block, and usually the large one"
)]
pub(crate) enum ProjectionSlots {
    /// A product for each; they may lie in one tensor.
    Apart([Affine; 3]),
    /// One product that makes them head by head.
    HeadByHead(Affine),
}

impl Slots {
    /// Reads the module order of `layout::tensors`, and of the adapter's layout where there is one.
    pub fn new(layout: &Layout, config: &ModelConfig, adapter: Option<(&Lora, &Layout)>) -> Self {
        let mut slots = layout.parameters.iter().map(Parameter::slot);
        let mut next = || slots.next().expect("a slot for every parameter");
        let (lora, adapter) = adapter.unzip();
        let mut adapters = Adapters {
            lora,
            slots: Box::new(
                adapter
                    .into_iter()
                    .flat_map(|layout| layout.parameters.iter().map(Parameter::slot)),
            ),
        };
        let embedding = next();
        let blocks = config.attention.iter();
        let blocks = blocks
            .map(|plan| BlockSlots::new(config, plan, &mut next, &mut adapters))
            .collect();
        let norm = Affine {
            weight: next(),
            bias: (config.norm == NormKind::Layer).then(&mut next),
            adapter: None,
        };
        let head = if config.tied { embedding } else { next() };
        let left = slots.next().or_else(|| adapters.slots.next());
        assert!(left.is_none(), "a slot in use for every parameter");
        Self {
            embedding,
            blocks,
            norm,
            head,
        }
    }
}

impl BlockSlots {
    fn new(
        config: &ModelConfig,
        plan: &AttentionPlan,
        next: &mut impl FnMut() -> Slot,
        adapters: &mut Adapters<'_>,
    ) -> Self {
        let mut found = Vec::new();
        for module in modules(config, plan) {
            let affine = Affine {
                weight: next(),
                bias: module.bias.then(&mut *next),
                adapter: adapters.of(&module),
            };
            found.push((module.part, affine));
        }
        let find = |part| {
            let place = found.iter().find(|(found, _)| *found == part);
            place.map(|(_, affine)| *affine)
        };
        let needed = |part| find(part).expect("every block has it");
        let (queries, keys) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        let projections = match config.projections {
            Projections::Separate => {
                ProjectionSlots::Apart([Part::Queries, Part::Keys, Part::Values].map(needed))
            }
            Projections::Stacked => ProjectionSlots::Apart(
                needed(Part::Projections).cut([queries, keys, keys], config.hidden),
            ),
            Projections::HeadByHead => ProjectionSlots::HeadByHead(needed(Part::Projections)),
        };
        let (gate, up) = match find(Part::GateUp) {
            Some(both) => {
                let [gate, up] = both.cut([config.mlp.intermediate; 2], config.hidden);
                (Some(gate), up)
            }
            None => (find(Part::Gate), needed(Part::Up)),
        };
        Self {
            projections,
            head_norms: config
                .head_norms
                .then(|| [Part::QueryNorm, Part::KeyNorm].map(needed)),
            output: needed(Part::Output),
            gate,
            up,
            down: needed(Part::Down),
            attention_norm: needed(Part::AttentionNorm),
            attention_output_norm: find(Part::AttentionOutputNorm),
            mlp_norm: needed(Part::MlpNorm),
            mlp_output_norm: find(Part::MlpOutputNorm),
        }
    }
}

impl Adapters<'_> {
    fn of(&mut self, module: &Module) -> Option<LowRank> {
        let lora = self.lora.filter(|lora| lora.adapts(module))?;
        let mut next = || self.slots.next().expect("an adapter has A and B");
        Some(LowRank {
            a: next(),
            b: next(),
            rank: lora.rank,
        })
    }
}

impl Affine {
    /// Linear maps whose rows lie one after another in this one's.
    fn cut<const PARTS: usize>(&self, outs: [usize; PARTS], columns: usize) -> [Self; PARTS] {
        let mut row = 0;
        outs.map(|out| {
            let part = |slot: Slot, columns: usize| Slot {
                offset: slot.offset + row * columns,
                len: out * columns,
                ..slot
            };
            let affine = Self {
                weight: part(self.weight, columns),
                bias: self.bias.map(|bias| part(bias, 1)),
                // All parts read the same A and their own rows of B.
                adapter: self.adapter.map(|adapter| LowRank {
                    b: part(adapter.b, adapter.rank),
                    ..adapter
                }),
            };
            row += out;
            affine
        })
    }
}

//! Where every parameter lies: Hugging Face names in module order, packed into flat buckets. A pure function of the
//! config, so that all processes of any world agree. The memory itself is `kernels::Flat`.
//!
//! A bucket holds parameters of one stage alone, so that its gradients are ready, and can be reduced over the ranks, as soon
//! as the backward has left that stage.

use std::ops::Range;

use kernels::{AttentionPlan, Slot};

use crate::config::{Biases, Gate, NormKind, Projections, Residual};
use crate::{Family, ModelConfig};

/// Most elements of a bucket, unless one parameter alone is larger: 64 MiB of f32, large enough that a collective is
/// bound by bandwidth, small enough that several overlap with the backward.
pub const BUCKET_ELEMENTS_MAX: usize = 1 << 24;

/// The flat layout of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Buckets in order.
    pub buckets: Vec<Bucket>,
    /// Parameters in module order: embedding, blocks, final norm, head unless tied.
    pub parameters: Vec<Parameter>,
}

/// A part of the decoder as its backward passes through it: head, norm, blocks from the last to the first, embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The embedding, which is also the head's weight when tied: complete only when the backward has ended.
    Embedding,
    /// The block of this index.
    Block(usize),
    /// The final norm.
    Norm,
    /// The head's own weight.
    Head,
}

/// A contiguous piece of memory holding whole parameters of one stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Where its parameters are.
    pub stage: Stage,
    /// Elements.
    pub len: usize,
    /// Indices into [`Layout::parameters`].
    pub parameters: Range<usize>,
}

/// One tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Hugging Face's tensor name.
    pub name: String,
    /// Its shape there, row-major.
    pub shape: Vec<usize>,
    /// Index into [`Layout::buckets`].
    pub bucket: usize,
    /// First element within the bucket.
    pub offset: usize,
    /// Whether weight decay applies: false for norms and biases.
    pub decay: bool,
}

impl Layout {
    /// The layout of the decoder that `config` describes.
    pub fn new(config: &ModelConfig) -> Self {
        Self::with_bucket_elements(config, BUCKET_ELEMENTS_MAX)
    }

    /// As [`Layout::new`] with another bound on buckets, for tests of what spans buckets.
    pub fn with_bucket_elements(config: &ModelConfig, elements_max: usize) -> Self {
        Self::of(tensors(config), elements_max)
    }

    /// Tensors in order, packed into buckets.
    pub(crate) fn of(
        tensors: impl IntoIterator<Item = (Stage, String, Vec<usize>)>,
        elements_max: usize,
    ) -> Self {
        let mut layout = Self {
            buckets: Vec::new(),
            parameters: Vec::new(),
        };
        for (stage, name, shape) in tensors {
            layout.push(stage, name, shape, elements_max);
        }
        layout
    }

    /// Elements of every bucket.
    pub fn bucket_lens(&self) -> Vec<usize> {
        self.buckets.iter().map(|bucket| bucket.len).collect()
    }

    /// Indices of a stage's buckets.
    pub fn buckets_of(&self, stage: Stage) -> impl Iterator<Item = usize> + '_ {
        let buckets = self.buckets.iter().enumerate();
        buckets
            .filter(move |(_, bucket)| bucket.stage == stage)
            .map(|(index, _)| index)
    }

    /// The elements of every bucket that a forward reads in f32 whatever products are made of: norms and biases, a few in a
    /// thousand. Neighbors are one range.
    pub fn narrow(&self) -> Vec<Vec<Range<usize>>> {
        let of = |bucket: &Bucket| {
            let mut ranges: Vec<Range<usize>> = Vec::new();
            let parameters = self.parameters[bucket.parameters.clone()].iter();
            for range in parameters
                .filter(|it| it.shape.len() < 2)
                .map(Parameter::range)
            {
                match ranges.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => ranges.push(range),
                }
            }
            ranges
        };
        self.buckets.iter().map(of).collect()
    }

    /// Number of elements in [`Layout::narrow`].
    pub fn narrow_elements(&self) -> usize {
        let narrow = self.parameters.iter().filter(|it| it.shape.len() < 2);
        narrow.map(Parameter::elements).sum()
    }

    /// Zeros for every bucket.
    pub(crate) fn zeros(&self) -> Vec<Vec<f32>> {
        self.buckets
            .iter()
            .map(|bucket| vec![0.0; bucket.len])
            .collect()
    }

    /// Number of trained scalars; tied weights count once.
    pub fn elements(&self) -> usize {
        self.buckets.iter().map(|bucket| bucket.len).sum()
    }

    /// The parameter called `name`.
    pub fn find(&self, name: &str) -> Option<&Parameter> {
        self.parameters
            .iter()
            .find(|parameter| parameter.name == name)
    }

    fn push(&mut self, stage: Stage, name: String, shape: Vec<usize>, elements_max: usize) {
        let len: usize = shape.iter().product();
        let index = self.parameters.len();
        let last = self.buckets.last();
        let full = last.is_none_or(|it| it.stage != stage || it.len + len > elements_max);
        if full {
            self.buckets.push(Bucket {
                stage,
                len: 0,
                parameters: index..index,
            });
        }
        let place = self.buckets.len() - 1;
        let bucket = &mut self.buckets[place];
        let (offset, decay) = (bucket.len, shape.len() > 1);
        bucket.len += len;
        bucket.parameters.end = index + 1;
        self.parameters.push(Parameter {
            name,
            shape,
            bucket: place,
            offset,
            decay,
        });
    }
}

impl Parameter {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements of the parameter within its bucket.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.elements()
    }

    pub(crate) fn slot(&self) -> Slot {
        Slot {
            bucket: self.bucket,
            offset: self.offset,
            len: self.elements(),
        }
    }
}

/// What a tensor of a block is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Queries,
    Keys,
    Values,
    /// Queries, keys and values in one tensor.
    Projections,
    Output,
    QueryNorm,
    KeyNorm,
    Gate,
    Up,
    /// Gate and up in one tensor.
    GateUp,
    Down,
    AttentionNorm,
    AttentionOutputNorm,
    MlpNorm,
    MlpOutputNorm,
}

/// One module of a block: a weight, and perhaps a bias.
pub(crate) struct Module {
    pub part: Part,
    /// Within its block.
    pub name: &'static str,
    /// Length of its output, and of its bias.
    pub out: usize,
    /// Columns of a matrix; norms have none.
    pub columns: Option<usize>,
    pub bias: bool,
}

/// Names outside the blocks, and what the names of a block begin with.
pub(crate) struct Names {
    /// The embedding, which is also the head when tied.
    pub embedding: &'static str,
    pub block: &'static str,
    norm: &'static str,
    pub head: &'static str,
}

impl Names {
    pub fn of(family: Family) -> Self {
        match family {
            Family::GptNeox => Self {
                embedding: "gpt_neox.embed_in.weight",
                block: "gpt_neox.layers",
                norm: "gpt_neox.final_layer_norm",
                head: "embed_out.weight",
            },
            _ => Self {
                embedding: "model.embed_tokens.weight",
                block: "model.layers",
                norm: "model.norm",
                head: "lm_head.weight",
            },
        }
    }
}

/// Modules of the block that `plan` belongs to, in order; `slots` takes them apart again.
pub(crate) fn modules(config: &ModelConfig, plan: &AttentionPlan) -> Vec<Module> {
    let (hidden, intermediate) = (config.hidden, config.mlp.intermediate);
    let (queries, keys) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    let Biases {
        projections,
        output,
        mlp,
    } = config.biases;
    let neox = config.family == Family::GptNeox;
    let linear = |part, name, out, columns, bias| Module {
        part,
        name,
        out,
        columns: Some(columns),
        bias,
    };
    let norm = |part, name, out| Module {
        part,
        name,
        out,
        columns: None,
        bias: config.norm == NormKind::Layer,
    };
    let mut modules = match config.projections {
        Projections::Separate => vec![
            linear(
                Part::Queries,
                "self_attn.q_proj",
                queries,
                hidden,
                projections,
            ),
            linear(Part::Keys, "self_attn.k_proj", keys, hidden, projections),
            linear(Part::Values, "self_attn.v_proj", keys, hidden, projections),
        ],
        Projections::Stacked | Projections::HeadByHead => {
            let name = if neox {
                "attention.query_key_value"
            } else {
                "self_attn.qkv_proj"
            };
            let out = queries + 2 * keys;
            vec![linear(Part::Projections, name, out, hidden, projections)]
        }
    };
    let name = if neox {
        "attention.dense"
    } else {
        "self_attn.o_proj"
    };
    modules.push(linear(Part::Output, name, hidden, queries, output));
    if config.head_norms {
        modules.push(norm(Part::QueryNorm, "self_attn.q_norm", plan.head_dim));
        modules.push(norm(Part::KeyNorm, "self_attn.k_norm", plan.head_dim));
    }
    match config.mlp.gate {
        Gate::Separate => {
            modules.push(linear(
                Part::Gate,
                "mlp.gate_proj",
                intermediate,
                hidden,
                mlp,
            ));
            modules.push(linear(Part::Up, "mlp.up_proj", intermediate, hidden, mlp));
        }
        Gate::Stacked => {
            modules.push(linear(
                Part::GateUp,
                "mlp.gate_up_proj",
                2 * intermediate,
                hidden,
                mlp,
            ));
        }
        Gate::None => modules.push(linear(
            Part::Up,
            "mlp.dense_h_to_4h",
            intermediate,
            hidden,
            mlp,
        )),
    }
    let name = if neox {
        "mlp.dense_4h_to_h"
    } else {
        "mlp.down_proj"
    };
    modules.push(linear(Part::Down, name, hidden, intermediate, mlp));
    modules.push(norm(Part::AttentionNorm, "input_layernorm", hidden));
    if config.residual == Residual::Sandwich {
        modules.push(norm(
            Part::AttentionOutputNorm,
            "post_attention_layernorm",
            hidden,
        ));
        modules.push(norm(Part::MlpNorm, "pre_feedforward_layernorm", hidden));
        modules.push(norm(
            Part::MlpOutputNorm,
            "post_feedforward_layernorm",
            hidden,
        ));
    } else {
        modules.push(norm(Part::MlpNorm, "post_attention_layernorm", hidden));
    }
    modules
}

/// Stages, names and shapes in module order.
fn tensors(config: &ModelConfig) -> Vec<(Stage, String, Vec<usize>)> {
    let (names, hidden) = (Names::of(config.family), config.hidden);
    let embedding = names.embedding.to_owned();
    let mut tensors = vec![(Stage::Embedding, embedding, vec![config.vocabulary, hidden])];
    for (index, plan) in config.attention.iter().enumerate() {
        for module in modules(config, plan) {
            let name = format!("{}.{index}.{}", names.block, module.name);
            let shape = match module.columns {
                Some(columns) => vec![module.out, columns],
                None => vec![module.out],
            };
            let stage = Stage::Block(index);
            tensors.push((stage, format!("{name}.weight"), shape));
            if module.bias {
                tensors.push((stage, format!("{name}.bias"), vec![module.out]));
            }
        }
    }
    tensors.push((Stage::Norm, format!("{}.weight", names.norm), vec![hidden]));
    if config.norm == NormKind::Layer {
        tensors.push((Stage::Norm, format!("{}.bias", names.norm), vec![hidden]));
    }
    if !config.tied {
        let head = names.head.to_owned();
        tensors.push((Stage::Head, head, vec![config.vocabulary, hidden]));
    }
    tensors
}

//! Where every parameter lies: Hugging Face names in module order, packed into flat buckets. A pure function of the
//! config, so that all processes of any world agree. The memory itself is `kernels::Flat`.

use std::ops::Range;

use kernels::Slot;

use crate::ModelConfig;

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

/// A contiguous piece of memory holding whole parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
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
    /// Whether weight decay applies: false for norms.
    pub decay: bool,
}

impl Layout {
    /// The layout of the decoder that `config` describes.
    pub fn new(config: &ModelConfig) -> Self {
        Self::with_bucket_elements(config, BUCKET_ELEMENTS_MAX)
    }

    /// As [`Layout::new`] with another bound on buckets, for tests of what spans buckets.
    pub fn with_bucket_elements(config: &ModelConfig, elements_max: usize) -> Self {
        let mut layout = Self {
            buckets: Vec::new(),
            parameters: Vec::new(),
        };
        for (name, shape) in tensors(config) {
            layout.push(name, shape, elements_max);
        }
        layout
    }

    /// Elements of every bucket.
    pub fn bucket_lens(&self) -> Vec<usize> {
        self.buckets.iter().map(|bucket| bucket.len).collect()
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

    fn push(&mut self, name: String, shape: Vec<usize>, elements_max: usize) {
        let len: usize = shape.iter().product();
        let index = self.parameters.len();
        let full = self
            .buckets
            .last()
            .is_none_or(|bucket| bucket.len + len > elements_max);
        if full {
            self.buckets.push(Bucket {
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

/// Names of a block's tensors after `model.layers.N.`, in module order; `slots` relies on it.
pub(crate) const BLOCK: [&str; 9] = [
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
];

/// Name of the embedding, which is also the head when tied.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the head.
pub(crate) const HEAD: &str = "lm_head.weight";

/// Names and shapes in module order.
fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let mut tensors = vec![(EMBEDDING.to_owned(), vec![config.vocabulary, hidden])];
    for (index, plan) in config.attention.iter().enumerate() {
        let (queries, keys) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        let shapes = [
            vec![queries, hidden],
            vec![keys, hidden],
            vec![keys, hidden],
            vec![hidden, queries],
            vec![intermediate, hidden],
            vec![intermediate, hidden],
            vec![hidden, intermediate],
            vec![hidden],
            vec![hidden],
        ];
        let names = BLOCK.map(|name| format!("model.layers.{index}.{name}"));
        tensors.extend(names.into_iter().zip(shapes));
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tied {
        tensors.push((HEAD.to_owned(), vec![config.vocabulary, hidden]));
    }
    tensors
}

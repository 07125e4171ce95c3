//! Small models and packs for the tests.

#![allow(dead_code, clippy::unwrap_used)]

use std::path::PathBuf;

use model::{
    AttentionPlan, Device, Family, Model, ModelConfig, Pack, PairTokens, RotaryPlan, RotaryScaling,
};

/// A Hugging Face fixture of the shared folder, or `None` with a word about it.
pub fn fixture(name: &str) -> Option<PathBuf> {
    let shared = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"));
    if !shared.exists() {
        println!("skipped: ../shared is absent");
        return None;
    }
    Some(shared.join("fixtures/hf").join(name))
}

/// Three blocks, two query heads on each of two key heads; tied or not, with or without a window.
pub fn tiny(family: Family, tied: bool, window: Option<usize>) -> ModelConfig {
    let plan = AttentionPlan {
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        scale: 1.0 / 6f64.sqrt(),
        window,
    };
    ModelConfig {
        family,
        vocabulary: 37,
        hidden: 20,
        intermediate: 28,
        norm_epsilon: 1e-5,
        attention: vec![plan; 3],
        rotary: RotaryPlan {
            theta: 10_000.0,
            scaling: RotaryScaling::Default,
        },
        tied,
        positions_max: Some(64),
        eos_ids: vec![2],
        bos_id: Some(1),
    }
}

/// A tiny model whose weights are large enough that attention is not nearly uniform.
pub fn lively(config: ModelConfig) -> Model {
    let mut model = Model::random(config, 7, &Device::flex());
    let mut weights = model.take_weights();
    weights
        .iter_mut()
        .flatten()
        .filter(|weight| **weight != 1.0)
        .for_each(|weight| *weight *= 20.0);
    model.put_weights(weights);
    model
}

/// `count` token ids, different for every seed.
pub fn ids(count: usize, seed: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % 37
    };
    (0..count).map(next).collect()
}

/// A pair that owns its tokens.
#[derive(Clone)]
pub struct Pair {
    pub prompt: Vec<u32>,
    pub chosen: Vec<u32>,
    pub rejected: Vec<u32>,
}

impl Pair {
    pub fn new(prompt: usize, chosen: usize, rejected: usize, seed: u32) -> Self {
        Self {
            prompt: ids(prompt, 3 * seed),
            chosen: ids(chosen, 3 * seed + 1),
            rejected: ids(rejected, 3 * seed + 2),
        }
    }

    pub fn tokens(&self) -> PairTokens<'_> {
        PairTokens {
            prompt: &self.prompt,
            chosen: &self.chosen,
            rejected: &self.rejected,
        }
    }
}

pub fn pack(pairs: &[Pair]) -> Pack {
    Pack::new(pairs.iter().map(Pair::tokens))
}

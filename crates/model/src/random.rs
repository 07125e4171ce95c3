//! Random numbers that are the same everywhere: fresh weights and sampling. Not for secrets.

use std::f64::consts::TAU;

use crate::adapter::A;
use crate::{Layout, ModelConfig, NormKind};

/// Weights for a new model, flat as in its layout: matrices normal with deviation 0.02, norms the identity, biases 0.
pub fn random_weights(config: &ModelConfig, seed: u64) -> Vec<Vec<f32>> {
    let layout = Layout::new(config);
    let mut random = Random::new(seed);
    let mut buckets = layout.zeros();
    for parameter in &layout.parameters {
        let values = &mut buckets[parameter.bucket][parameter.range()];
        let is_bias = parameter.name.rsplit('.').next() == Some("bias");
        if parameter.shape.len() > 1 {
            for value in values {
                *value = (0.02 * random.normal()) as f32;
            }
        } else if config.norm != NormKind::RmsPlusOne && !is_bias {
            values.fill(1.0);
        }
    }
    buckets
}

/// Weights for a fresh adapter, flat as in its `layout`: A uniform within ±1/√columns (as PEFT's default does), B zero, so
/// that the adapted model computes what the model does.
pub(crate) fn adapter_weights(layout: &Layout, seed: u64) -> Vec<Vec<f32>> {
    let mut random = Random::new(seed);
    let mut buckets = layout.zeros();
    for parameter in &layout.parameters {
        if parameter.name.ends_with(A) {
            let bound = 1.0 / (parameter.shape[1] as f64).sqrt();
            for value in &mut buckets[parameter.bucket][parameter.range()] {
                *value = (bound * (2.0 * random.uniform() - 1.0)) as f32;
            }
        }
    }
    buckets
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): one word of state, every seed is good.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box–Muller, one of the two).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (TAU * self.uniform()).cos()
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

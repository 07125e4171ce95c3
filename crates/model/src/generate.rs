//! Continuing a text token by token, for looking at a model. Keys and values of past tokens are cached on the host and
//! attention of the one new token is a plain loop; training and scoring never come through here.

use kernels::Tensor;
use kernels::{AttentionPlan, gather_rows, segment_attention};

use crate::Model;
use crate::block::Projected;
use crate::model::text;
use crate::random::Random;

/// How the next token is chosen.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f64,
    top_p: f64,
    random: Random,
}

impl Sampler {
    /// Draws from softmax(logits / `temperature`), of it from the fewest likeliest tokens that together have `top_p`
    /// (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751); at temperature 0 takes the most likely token, the first
    /// of equals.
    ///
    /// # Panics
    /// If the temperature is negative or not finite, or `top_p` is not above 0 and at most 1.
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Self {
        assert!(
            temperature.is_finite() && temperature >= 0.0,
            "temperature {temperature}"
        );
        assert!(top_p > 0.0 && top_p <= 1.0, "top_p {top_p}");
        Self {
            temperature,
            top_p,
            random: Random::new(seed),
        }
    }

    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self::new(0.0, 1.0, 0)
    }

    fn pick(&mut self, logits: &[f32]) -> u32 {
        let mut best = 0;
        for (id, logit) in logits.iter().enumerate() {
            if *logit > logits[best] {
                best = id;
            }
        }
        if self.temperature == 0.0 {
            return best as u32;
        }
        let largest = f64::from(logits[best]);
        let weight = |logit: &f32| ((f64::from(*logit) - largest) / self.temperature).exp();
        let mut weights: Vec<(usize, f64)> = logits.iter().map(weight).enumerate().collect();
        let mut total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        if self.top_p < 1.0 {
            weights.sort_by(|(_, a), (_, b)| b.total_cmp(a));
            let (mut kept, mut sum) = (0, 0.0);
            while kept < weights.len() && (kept == 0 || sum < self.top_p * total) {
                sum += weights[kept].1;
                kept += 1;
            }
            weights.truncate(kept);
            total = sum;
        }
        let mut left = self.random.uniform() * total;
        for (id, weight) in weights {
            left -= weight;
            if left < 0.0 {
                return id as u32;
            }
        }
        best as u32
    }
}

impl Model {
    /// Up to `max_new` tokens after `prompt`, ending with the first that is in `stop` (which is returned too).
    ///
    /// # Panics
    /// If the prompt is empty: nothing predicts a first token.
    pub fn generate(
        &self,
        prompt: &[u32],
        max_new: usize,
        sampler: &mut Sampler,
        stop: &[u32],
    ) -> Vec<u32> {
        assert!(!prompt.is_empty(), "a prompt needs at least one token");
        let mut new = Vec::new();
        if max_new == 0 {
            return new;
        }
        let (mut past, mut logits) = self.read(prompt);
        loop {
            let token = sampler.pick(&logits);
            new.push(token);
            if new.len() == max_new || stop.contains(&token) {
                return new;
            }
            logits = self.advance(&mut past, token, prompt.len() + new.len() - 1);
        }
    }

    /// Keys and values of all blocks over `prompt`, and the logits after it.
    fn read(&self, prompt: &[u32]) -> (Vec<Past>, Vec<f32>) {
        let pack = text(prompt);
        let tables = self.tables(&pack);
        let mut x = self.embed(prompt);
        let mut past = Vec::new();
        for index in 0..self.config().blocks() {
            let block = self.block(index);
            let Projected {
                queries,
                keys,
                values,
                ..
            } = block.project(&x, &tables);
            let (attended, _) =
                segment_attention(&queries, &keys, &values, &pack.segments, block.plan);
            x = block.finish_alone(&x, &attended);
            past.push(Past {
                keys: keys.into_vec(),
                values: values.into_vec(),
            });
        }
        let last = gather_rows(&x, &[prompt.len() - 1]);
        (past, self.predict(&last).into_vec())
    }

    /// Logits after one more token, which stands at `position`.
    fn advance(&self, past: &mut [Past], token: u32, position: usize) -> Vec<f32> {
        let tables = self.turns(&[position as u32], &[position + 1]);
        let mut x = self.embed(&[token]);
        for (index, past) in past.iter_mut().enumerate() {
            let block = self.block(index);
            let projected = block.project(&x, &tables);
            past.keys.extend(projected.keys.into_vec());
            past.values.extend(projected.values.into_vec());
            let attended = past.attend(&projected.queries.into_vec(), block.plan);
            let shape = [1, attended.len()];
            let attended = Tensor::new(attended, shape, self.device());
            x = block.finish_alone(&x, &attended);
        }
        self.predict(&x).into_vec()
    }
}

/// One block's keys and values, `[tokens, kv_heads · head_dim]`.
struct Past {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Past {
    /// Attention of the newest token, `[heads · head_dim]`.
    fn attend(&self, queries: &[f32], plan: &AttentionPlan) -> Vec<f32> {
        let AttentionPlan {
            heads,
            kv_heads,
            head_dim,
            scale,
            window,
            soft_cap,
        } = *plan;
        let columns = kv_heads * head_dim;
        let tokens = self.keys.len() / columns;
        let first = window.map_or(0, |window| tokens.saturating_sub(window));
        let mut out = Vec::with_capacity(queries.len());
        for (head, query) in queries.chunks_exact(head_dim).enumerate() {
            let column = head / (heads / kv_heads) * head_dim;
            let row = |rows: &'_ [f32], token: usize| {
                rows[token * columns + column..][..head_dim].to_vec()
            };
            let score = |token| {
                let key = row(&self.keys, token);
                let products = query.iter().zip(key);
                let score = products
                    .map(|(q, k)| f64::from(*q) * f64::from(k))
                    .sum::<f64>()
                    * scale;
                soft_cap.map_or(score, |cap| cap * (score / cap).tanh())
            };
            let scores: Vec<f64> = (first..tokens).map(score).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sum = vec![0.0; head_dim];
            for (token, weight) in (first..tokens).zip(&weights) {
                for (sum, value) in sum.iter_mut().zip(row(&self.values, token)) {
                    *sum += weight / total * f64::from(value);
                }
            }
            out.extend(sum.into_iter().map(|value| value as f32));
        }
        out
    }
}

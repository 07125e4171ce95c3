//! The floating-point operations that training on a pack cannot do without, for judging how much of a machine's speed is
//! used: multiplications and additions of matrix products and of attention over what each token may see. What is computed
//! again (recompute, the head's logits in its backward) is not needed, so it is not counted; norms, rotations and
//! activations are below a percent and are left out.

use crate::config::Gate;
use crate::{ModelConfig, PackShape};

/// Operations of a forward; a backward needs twice as many.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Operations {
    /// Products with the blocks' weights.
    pub blocks: f64,
    /// Queries by keys and probabilities by values.
    pub attention: f64,
    /// Logits.
    pub head: f64,
}

impl Operations {
    /// Of one pack's forward. `pairs` are the tokens of prompt, chosen and rejected of each of its pairs.
    pub fn of(config: &ModelConfig, pairs: &[(usize, [usize; 2])]) -> Self {
        let shape = pairs
            .iter()
            .fold(PackShape::default(), |shape, &(prompt, completions)| {
                shape.and(prompt, completions)
            });
        let hidden = config.hidden;
        let mlp = match config.mlp.gate {
            Gate::None => 2,
            Gate::Separate | Gate::Stacked => 3,
        } * hidden
            * config.mlp.intermediate;
        let (mut weights, mut attention) = (0, 0.0);
        for plan in &config.attention {
            let (queries, keys) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
            weights += hidden * (2 * queries + 2 * keys) + mlp;
            let seen: usize = pairs.iter().map(|pair| seen(pair, plan.window)).sum();
            attention += 4.0 * (seen * queries) as f64;
        }
        Self {
            blocks: 2.0 * shape.tokens as f64 * weights as f64,
            attention,
            head: 2.0 * (shape.predictions * config.vocabulary) as f64 * hidden as f64,
        }
    }

    /// Forward alone.
    pub fn forward(&self) -> f64 {
        self.blocks + self.attention + self.head
    }

    /// Forward and backward.
    pub fn training(&self) -> f64 {
        3.0 * self.forward()
    }
}

/// Keys that the tokens of a pair see together.
fn seen(&(prompt, completions): &(usize, [usize; 2]), window: Option<usize>) -> usize {
    let from = |start: usize, end: usize| -> usize {
        (start..end)
            .map(|position| (position + 1).min(window.unwrap_or(usize::MAX)))
            .sum()
    };
    let [chosen, rejected] = completions;
    from(0, prompt) + from(prompt, prompt + chosen) + from(prompt, prompt + rejected)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Operations, seen};
    use crate::ModelConfig;

    #[test]
    fn a_token_sees_itself_and_what_is_before_it_within_the_window() {
        assert_eq!(seen(&(3, [2, 0]), None), 1 + 2 + 3 + 4 + 5);
        assert_eq!(seen(&(3, [2, 1]), None), 15 + 4);
        assert_eq!(seen(&(3, [2, 0]), Some(2)), 1 + 2 + 2 + 2 + 2);
    }

    #[test]
    fn a_token_costs_two_operations_a_weight_and_what_it_sees() {
        let text = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "tie_word_embeddings": true,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5}"#;
        let config = ModelConfig::parse(text, Path::new("config.json")).expect("a config");
        let found = Operations::of(&config, &[(3, [2, 1])]);
        // q, k, v, o of one block, then gate, up, down.
        let weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16;
        assert_eq!(found.blocks, f64::from(2 * 2 * weights * 6));
        // Two products of 8 columns for each of 19 keys seen, in two blocks.
        assert_eq!(found.attention, f64::from(2 * 2 * 2 * 8 * 19));
        assert_eq!(found.head, f64::from(2 * 3 * 8 * 11));
        assert_eq!(found.training(), 3.0 * found.forward());
    }
}

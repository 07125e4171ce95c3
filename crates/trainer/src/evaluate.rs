//! Held-out pairs: reward dynamics with the present weights, and continuations to look at.

use data::{Pair, Tokenizer};
use model::{Model, Sampler};
use spec::EvaluateSection;

use crate::gate::Sample;
use crate::generate::stop_ids;

/// Greedy continuations of the first held-out prompts.
pub(crate) fn samples(
    model: &Model,
    tokenizer: &Tokenizer,
    pairs: &[Pair],
    section: &EvaluateSection,
) -> Vec<Sample> {
    let stop = stop_ids(model, tokenizer);
    pairs
        .iter()
        .take(section.samples)
        .map(|pair| {
            let mut sampler = Sampler::greedy();
            let new = model.generate(&pair.prompt, section.sample_tokens, &mut sampler, &stop);
            Sample {
                prompt: tokenizer.decode(&pair.prompt),
                text: tokenizer.decode(&new),
            }
        })
        .collect()
}

//! Generation: the cache of keys and values changes no choice, seeds repeat, stops stop.

#![allow(clippy::unwrap_used)]

mod support;

use model::{Family, Model, Sampler};
use support::{every_family, ids, lively, tiny};

fn models() -> Vec<Model> {
    let families = every_family().into_iter();
    families.map(|(_, config)| lively(config)).collect()
}

#[test]
fn greedy_tokens_are_the_largest_logits_of_a_forward_without_cache() {
    for model in models() {
        let mut text = ids(4, 1);
        let new = model.generate(&text, 20, &mut Sampler::greedy(), &[]);
        assert_eq!(new.len(), 20);
        for token in new {
            let logits = model.trace(&text).logits.into_vec();
            let last = &logits[logits.len() - 37..];
            let best = (0..37)
                .max_by(|&a, &b| last[a].total_cmp(&last[b]))
                .unwrap();
            assert_eq!(token, best as u32, "after {text:?}");
            text.push(token);
        }
    }
}

#[test]
fn a_seed_repeats_and_another_differs() {
    for model in models() {
        let sample = |seed| model.generate(&ids(3, 1), 30, &mut Sampler::new(1.0, 1.0, seed), &[]);
        assert_eq!(sample(5), sample(5));
        assert_ne!(sample(5), sample(6));
    }
}

#[test]
fn a_stop_token_ends_the_text() {
    let model = lively(tiny(Family::Llama, true, None));
    let free = model.generate(&ids(4, 1), 20, &mut Sampler::greedy(), &[]);
    let stop = free[3];
    let first = free.iter().position(|&token| token == stop).unwrap();
    assert_eq!(
        model.generate(&ids(4, 1), 20, &mut Sampler::greedy(), &[stop]),
        free[..=first]
    );
    assert!(
        model
            .generate(&ids(4, 1), 0, &mut Sampler::greedy(), &[])
            .is_empty()
    );
}

#[test]
fn a_nucleus_leaves_out_what_is_unlikely_and_nothing_else() {
    let model = lively(tiny(Family::Llama, true, None));
    let prompt = ids(4, 1);
    let logits = model.trace(&prompt).logits.into_vec();
    let last = &logits[logits.len() - 37..];
    let total: f64 = last.iter().map(|logit| f64::from(*logit).exp()).sum();
    let mut order: Vec<usize> = (0..37).collect();
    order.sort_by(|&a, &b| last[b].total_cmp(&last[a]));
    // The third likeliest token is the last that is needed for the share that it completes.
    let share = |count: usize| -> f64 {
        let kept = order[..count].iter();
        kept.map(|&id| f64::from(last[id]).exp()).sum::<f64>() / total
    };
    let mut drawn = std::collections::BTreeSet::new();
    let mut sampler = Sampler::new(1.0, share(3) - 1e-9, 5);
    for _ in 0..500 {
        drawn.insert(model.generate(&prompt, 1, &mut sampler, &[])[0] as usize);
    }
    assert_eq!(drawn, order[..3].iter().copied().collect());
    let mut narrow = Sampler::new(1.0, 1e-9, 5);
    assert_eq!(
        model.generate(&prompt, 1, &mut narrow, &[])[0] as usize,
        order[0]
    );
}

#[test]
fn sampling_follows_the_distribution() {
    let model = lively(tiny(Family::Llama, true, None));
    let prompt = ids(4, 1);
    let logits = model.trace(&prompt).logits.into_vec();
    let weights: Vec<f64> = logits[logits.len() - 37..]
        .iter()
        .map(|logit| f64::from(*logit).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let mut counts = [0u32; 37];
    let mut sampler = Sampler::new(1.0, 1.0, 11);
    for _ in 0..2000 {
        counts[model.generate(&prompt, 1, &mut sampler, &[])[0] as usize] += 1;
    }
    for (id, weight) in weights.iter().enumerate() {
        let (expected, found) = (weight / total, f64::from(counts[id]) / 2000.0);
        // Four standard deviations of a share of 2000 draws.
        let bound = 4.0 * (expected * (1.0 - expected) / 2000.0).sqrt() + 1e-3;
        assert!(
            (expected - found).abs() <= bound,
            "token {id}: {found} for {expected}"
        );
    }
}

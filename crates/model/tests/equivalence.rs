//! What must not matter, over random lengths and every family: company in the pack, padding, the shared prompt, the order of the
//! completions, how a batch is split, recomputation, an adapter that adds nothing.

#![allow(clippy::unwrap_used)]

mod support;

use model::{Lora, Model, ModelConfig, Pack, Precision, Saving, Targets};
use proptest::prelude::*;
use support::{Pair, every_family, lively, pack};

/// Of every family its number, and of one to four pairs the lengths of prompt, chosen and rejected.
fn cases() -> impl Strategy<Value = (usize, Vec<Pair>)> {
    let lengths = (1usize..9, 1usize..9, 1usize..9);
    let pairs = prop::collection::vec(lengths, 1..5).prop_map(|lengths| {
        let seeded = (1..).zip(lengths);
        seeded
            .map(|(seed, (prompt, chosen, rejected))| Pair::new(prompt, chosen, rejected, seed))
            .collect()
    });
    (0..every_family().len(), pairs)
}

fn model(family: usize) -> (ModelConfig, Model) {
    let config = every_family().remove(family).1;
    (config.clone(), lively(config))
}

/// dL/dlogp of every completion.
fn slopes(pairs: usize) -> Vec<[f32; 2]> {
    let one = |pair: usize| [0.7 - 0.2 * pair as f32, -0.4 + 0.1 * pair as f32];
    (0..pairs).map(one).collect()
}

fn bits(logps: &[[f32; 2]]) -> Vec<[u32; 2]> {
    logps.iter().map(|sides| sides.map(f32::to_bits)).collect()
}

/// Log-probs of the packs' pairs in order, and the sum of their gradients.
fn trained(model: &Model, packs: &[(Pack, Vec<[f32; 2]>)]) -> (Vec<[f32; 2]>, Vec<f32>) {
    let mut gradients = model.zero_gradients();
    let mut logps = Vec::new();
    for (pack, slopes) in packs {
        let (found, saved) = model.forward_train(pack);
        model.backward(saved, slopes, &mut gradients);
        logps.extend(found.logps);
    }
    (logps, gradients.take_host().concat())
}

fn distance(found: &[f32], expected: &[f32]) -> f64 {
    let square = |value: f64| value * value;
    let pairs = found.iter().zip(expected);
    let off: f64 = pairs
        .map(|(x, y)| square(f64::from(*x) - f64::from(*y)))
        .sum();
    let length: f64 = expected.iter().map(|y| square(f64::from(*y))).sum();
    (off / length.max(1e-30)).sqrt()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pair_alone_is_the_pair_in_a_pack_and_beside_padding((family, pairs) in cases(), padding in 1usize..7) {
        let (_, model) = model(family);
        let slopes = slopes(pairs.len());
        let (together, sums) = trained(&model, &[(pack(&pairs), slopes.clone())]);
        let alone: Vec<_> = pairs
            .iter()
            .zip(&slopes)
            .map(|(pair, slope)| (pack(std::slice::from_ref(pair)), vec![*slope]))
            .collect();
        let (apart, parts) = trained(&model, &alone);
        prop_assert_eq!(bits(&together), bits(&apart));
        prop_assert!(distance(&parts, &sums) < 1e-5);
        // Rows that belong to no pair, as padding does.
        let mut padded = pack(&pairs);
        padded.tokens.extend((0..padding).map(|token| token as u32));
        padded.positions.extend((0..padding).map(|position| position as u32));
        let (found, padded_sums) = trained(&model, &[(padded, slopes)]);
        prop_assert_eq!(bits(&found), bits(&together));
        prop_assert!(distance(&padded_sums, &sums) < 1e-5);
    }

    #[test]
    fn any_split_of_a_batch_accumulates_the_same_gradient((family, pairs) in cases(), cut in any::<prop::sample::Index>()) {
        let (_, model) = model(family);
        let slopes = slopes(pairs.len());
        let (_, whole) = trained(&model, &[(pack(&pairs), slopes.clone())]);
        let cut = cut.index(pairs.len() + 1);
        let parts = [(pack(&pairs[..cut]), slopes[..cut].to_vec()), (pack(&pairs[cut..]), slopes[cut..].to_vec())];
        let (_, split) = trained(&model, &parts);
        prop_assert!(distance(&split, &whole) < 1e-5);
    }

    #[test]
    fn a_shared_prompt_is_two_separate_sequences((family, pairs) in cases()) {
        // longrope chooses frequencies by the length of the longer sequence, which a pair alone does not have.
        prop_assume!(!every_family()[family].0.contains("longrope"));
        let (_, model) = model(family);
        let slopes = slopes(pairs.len());
        let (shared, sums) = trained(&model, &[(pack(&pairs), slopes.clone())]);
        let one_side = |side: usize| -> Vec<(Pack, Vec<[f32; 2]>)> {
            let sides = pairs.iter().zip(&slopes).map(|(pair, slopes)| {
                let completion = if side == 0 { &pair.chosen } else { &pair.rejected };
                let alone = Pair { prompt: pair.prompt.clone(), chosen: completion.clone(), rejected: Vec::new() };
                (pack(&[alone]), vec![[slopes[side], 0.0]])
            });
            sides.collect()
        };
        let separate = [one_side(0), one_side(1)].concat();
        let (found, parts) = trained(&model, &separate);
        for (pair, sides) in shared.iter().enumerate() {
            for (side, shared) in sides.iter().enumerate() {
                let alone = found[side * pairs.len() + pair][0];
                prop_assert!((shared - alone).abs() < 1e-5 * shared.abs().max(1.0));
            }
        }
        prop_assert!(distance(&parts, &sums) < 1e-5);
    }

    #[test]
    fn swapping_the_completions_swaps_their_log_probs((family, pairs) in cases()) {
        let (_, model) = model(family);
        let swapped: Vec<Pair> = pairs
            .iter()
            .map(|pair| Pair { prompt: pair.prompt.clone(), chosen: pair.rejected.clone(), rejected: pair.chosen.clone() })
            .collect();
        let there = model.forward(&pack(&pairs)).logps;
        let back: Vec<_> = model.forward(&pack(&swapped)).logps.into_iter().map(|[a, b]| [b, a]).collect();
        prop_assert_eq!(bits(&there), bits(&back));
    }

    #[test]
    fn recomputing_changes_no_bit((family, pairs) in cases(), bf16 in any::<bool>()) {
        let (_, mut model) = model(family);
        model.set_precision(if bf16 { Precision::Bf16 } else { Precision::F32 });
        let batch = [(pack(&pairs), slopes(pairs.len()))];
        let kept = trained(&model, &batch);
        model.set_saving(Saving::BlockInputs);
        let again = trained(&model, &batch);
        prop_assert_eq!(bits(&kept.0), bits(&again.0));
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&kept.1), bits(&again.1));
    }

    #[test]
    fn an_adapter_whose_b_is_zero_is_not_there((family, pairs) in cases(), rank in 1usize..5) {
        let (config, mut model) = model(family);
        let before = model.forward(&pack(&pairs)).logps;
        let lora = Lora { rank, alpha: 2.5, rank_stabilized: true, targets: Targets::AllLinear };
        model.adapt(&lora, lora.fresh(&config, 9).unwrap()).unwrap();
        let (after, gradient) = trained(&model, &[(pack(&pairs), slopes(pairs.len()))]);
        prop_assert_eq!(bits(&before), bits(&after));
        // With B = 0 only B has a gradient.
        let layout = model.trained();
        for parameter in &layout.parameters {
            let start: usize = layout.buckets[..parameter.bucket].iter().map(|bucket| bucket.len).sum();
            let range = parameter.range();
            let own = &gradient[start + range.start..start + range.end];
            prop_assert_eq!(own.iter().all(|value| *value == 0.0), parameter.name.contains("lora_A"));
        }
    }
}

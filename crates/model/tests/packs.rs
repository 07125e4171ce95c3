//! What a pack promises, on random tiny models: neighbours do not matter, sharing a prompt changes nothing, gradients
//! are those of finite differences.

#![allow(clippy::unwrap_used)]

mod support;

use model::{Family, Model, Pack, PairTokens, Saving};
use support::{Pair, every_family, lively, pack, tiny};

fn models() -> Vec<Model> {
    let families = every_family().into_iter();
    families.map(|(_, config)| lively(config)).collect()
}

fn pairs() -> Vec<Pair> {
    vec![
        Pair::new(5, 7, 4, 1),
        Pair::new(1, 1, 1, 2),
        Pair::new(9, 2, 13, 3),
        Pair::new(3, 40, 1, 4),
        Pair::new(16, 6, 0, 5),
    ]
}

#[test]
fn a_pairs_log_prob_has_the_same_bits_whichever_pairs_share_its_pack() {
    for model in models() {
        let pairs = pairs();
        let alone: Vec<_> = pairs
            .iter()
            .map(|pair| model.forward(&pack(std::slice::from_ref(pair))).logps[0])
            .collect();
        let together = model.forward(&pack(&pairs)).logps;
        let mut turned = pairs.clone();
        turned.reverse();
        let mut reversed = model.forward(&pack(&turned)).logps;
        reversed.reverse();
        for ((alone, together), reversed) in alone.iter().zip(&together).zip(&reversed) {
            assert_eq!(alone.map(f32::to_bits), together.map(f32::to_bits));
            assert_eq!(alone.map(f32::to_bits), reversed.map(f32::to_bits));
        }
    }
}

#[test]
fn training_and_scoring_forwards_agree_to_the_bit_whatever_is_saved() {
    for mut model in models() {
        let pack = pack(&pairs());
        let scored = model.forward(&pack);
        let mut gradients = Vec::new();
        for saving in [Saving::Operands, Saving::BlockInputs] {
            model.set_saving(saving);
            let (logps, saved) = model.forward_train(&pack);
            assert_eq!(logps, scored);
            let mut sums = model.zero_gradients();
            model.backward(saved, &vec![[0.5, -0.25]; pack.segments.len()], &mut sums);
            gradients.push(sums.take_host());
        }
        assert!(
            gradients[0] == gradients[1],
            "recomputed blocks give other gradients"
        );
    }
}

#[test]
fn a_shared_prompt_gives_the_log_probs_of_two_separate_sequences() {
    for model in models() {
        for pair in pairs() {
            let shared = model.forward(&pack(std::slice::from_ref(&pair)));
            let separate = |completion: &[u32]| {
                let sequence = PairTokens {
                    prompt: &pair.prompt,
                    chosen: completion,
                    rejected: &[],
                };
                model.forward(&Pack::new([sequence])).logps[0][0]
            };
            let separate = [separate(&pair.chosen), separate(&pair.rejected)];
            for (shared, separate) in shared.logps[0].iter().zip(separate) {
                assert!(
                    (shared - separate).abs() <= 1e-5 * separate.abs().max(1.0),
                    "{shared} and {separate}"
                );
            }
        }
    }
}

#[test]
fn log_probs_are_log_softmax_of_the_traced_logits() {
    for model in models() {
        let pair = Pair::new(5, 7, 0, 9);
        let text = [pair.prompt.clone(), pair.chosen.clone()].concat();
        let logits = model.trace(&text).logits.into_vec();
        let tokens = &model.token_logps(&pack(std::slice::from_ref(&pair)))[0][0];
        for (index, (logp, &target)) in tokens.iter().zip(&pair.chosen).enumerate() {
            let row = &logits[(pair.prompt.len() + index - 1) * 37..][..37];
            let total: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            let expected = f64::from(row[target as usize]) - total.ln();
            assert!(
                (f64::from(*logp) - expected).abs() < 1e-5,
                "token {index}: {logp} for {expected}"
            );
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let pack = pack(&[Pair::new(5, 7, 4, 1), Pair::new(2, 3, 6, 2)]);
    let dlogps = [[0.7f32, -0.4], [-1.1, 0.3]];
    // Others bend too much for differences in f32 with weights like these; `variants` has their gradients by torch.
    let gentle = [Family::Llama, Family::Mistral];
    for mut model in models() {
        if !gentle.contains(&model.config().family) || model.config().biases.output {
            continue;
        }
        let (_, saved) = model.forward_train(&pack);
        let mut gradients = model.zero_gradients();
        model.backward(saved, &dlogps, &mut gradients);
        let gradients = gradients.take_host();
        let objective = |model: &Model| -> f64 {
            let tokens = model.token_logps(&pack);
            let sums = tokens.iter().map(|pair| {
                pair.clone()
                    .map(|side| side.into_iter().map(f64::from).sum::<f64>())
            });
            sums.zip(dlogps)
                .map(|(sum, d)| sum[0] * f64::from(d[0]) + sum[1] * f64::from(d[1]))
                .sum()
        };
        for parameter in model.layout().parameters.clone() {
            // The entry with the largest gradient stands out of f32's rounding.
            let own = &gradients[parameter.bucket][parameter.range()];
            let entry = (0..own.len())
                .max_by(|&a, &b| own[a].abs().total_cmp(&own[b].abs()))
                .unwrap();
            let step = 4e-3f32;
            let mut at = |shift: f32| {
                let mut weights = model.take_weights();
                weights[parameter.bucket][parameter.offset + entry] += shift;
                model.put_weights(weights);
                objective(&model)
            };
            let forward = at(step);
            let backward = at(-2.0 * step);
            at(step);
            let difference = (forward - backward) / f64::from(2.0 * step);
            let expected = f64::from(own[entry]);
            assert!(
                (difference - expected).abs() <= 1e-2 * expected.abs() + 2e-3,
                "{} [{entry}]: {expected}, by differences {difference}",
                parameter.name
            );
        }
    }
}

#[test]
fn positions_restart_and_every_completion_goes_on_at_the_prompts_end() {
    let pairs = [Pair::new(3, 2, 4, 1), Pair::new(2, 1, 0, 2)];
    let pack = pack(&pairs);
    assert_eq!(pack.positions, [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2]);
    assert_eq!(pack.segments[0].prompt, 0..3);
    assert_eq!(pack.segments[0].completions, [3..5, 5..9]);
    assert_eq!(pack.segments[1].completions, [11..12, 12..12]);
    assert_eq!((pack.len(), pack.is_empty()), (12, false));
}

#[test]
fn without_a_prompt_the_first_token_is_not_scored() {
    let model = lively(tiny(Family::Llama, false, None));
    let logps = model.forward(&pack(&[Pair::new(0, 5, 1, 3)]));
    assert_eq!(logps.counts, [[4, 0]]);
    assert!(logps.logps[0][0] < 0.0);
    assert_eq!(logps.logps[0][1], 0.0);
}

#[test]
fn a_pack_that_predicts_nothing_has_no_gradient() {
    let model = lively(tiny(Family::Llama, false, None));
    for pairs in [vec![], vec![Pair::new(4, 0, 0, 1)]] {
        let pack = pack(&pairs);
        let (logps, saved) = model.forward_train(&pack);
        assert_eq!(logps.logps, vec![[0.0, 0.0]; pairs.len()]);
        let mut gradients = model.zero_gradients();
        model.backward(saved, &vec![[1.0, 1.0]; pairs.len()], &mut gradients);
        assert!(
            gradients
                .take_host()
                .iter()
                .flatten()
                .all(|gradient| *gradient == 0.0)
        );
    }
}

#[test]
fn taking_and_putting_weights_back_changes_no_bit() {
    let mut model = lively(tiny(Family::Llama, true, None));
    let pack = pack(&pairs());
    let (before, digest) = (model.forward(&pack), model.weights_digest());
    let (_, saved) = model.forward_train(&pack);
    let weights = model.take_weights();
    let place = weights[0].as_ptr();
    model.put_weights(weights);
    assert_eq!(model.forward(&pack), before);
    assert_eq!(model.weights_digest(), digest);
    drop(saved);
    let weights = model.take_weights();
    assert_eq!(
        weights[0].as_ptr(),
        place,
        "weights were copied on their way"
    );
    let mut other = weights;
    other[0][5] += 1e-7;
    model.put_weights(other);
    assert_ne!(model.weights_digest(), digest);
}

//! Several ranks are one: invariants T1, T2, T4, T5 and T6 over worlds of 1 to 4.

use std::fs;

use crate::support::{Folder, Run, Script, relative_error, run, state_bits};
use checkpoint::{Checkpoint, Kind};
use spec::Spec;
use trainer::{Sharding, StepReport};

const CAL_DPO: &str = "objective = { kind = \"cal_dpo\", beta = 0.1 }\n";

fn losses(run: &Run) -> Vec<f64> {
    run.reports.iter().map(|report| report.loss).collect()
}

/// Largest relative difference of losses between `one` and `other`.
fn drift(one: &Run, other: &Run) -> f64 {
    assert_eq!(one.reports.len(), other.reports.len());
    let pairs = losses(one).into_iter().zip(losses(other));
    pairs
        .map(|(one, other)| relative_error(other, one))
        .fold(0.0, f64::max)
}

fn training(folder: &Folder, steps: u64) -> Spec {
    folder.spec(&format!(
        "{CAL_DPO}optimizer.learning_rate = 1e-3\ntrain = {{ steps = {steps}, batch_pairs = 8, micro_batch_tokens = 96 }}"
    ))
}

#[test]
fn t1_with_unmoved_weights_every_world_reports_the_same_bits_of_every_step() {
    let folder = Folder::new(21);
    // A rate too small to move any f32 weight: the reports depend on the data and its order alone.
    let spec = folder.spec(&format!(
        "{CAL_DPO}train = {{ steps = 8, batch_pairs = 4, micro_batch_tokens = 96 }}\noptimizer.learning_rate = 1e-30"
    ));
    let bits = |world: usize| {
        let run = run(&spec, world, &Script::default());
        let reports = run.reports.into_iter().map(|mut report| {
            // A norm is a sum over all elements, whose order the world decides.
            report.grad_norm = 0.0;
            report.bits()
        });
        reports.collect::<Vec<_>>()
    };
    let alone = bits(1);
    // Step 7 begins epoch 1, whose order is another one: the log-probs of its pairs are not those of step 1.
    assert_eq!([alone[0][1], alone[6][1]], [0, 1]);
    assert_ne!(alone[0][14..16], alone[6][14..16]);
    for world in 2..=4 {
        assert_eq!(bits(world), alone, "world of {world}");
    }
}

#[test]
fn t2_worlds_of_1_to_4_give_the_same_losses_and_one_world_the_same_bits() {
    let folder = Folder::new(50);
    let short = training(&folder, 20);
    let long = training(&folder, 60);
    let script = Script::default();
    let (short_alone, long_alone) = (run(&short, 1, &script), run(&long, 1, &script));
    assert!(
        long_alone.reports[59].loss < 0.7 * long_alone.reports[0].loss,
        "{:?} trains something",
        losses(&long_alone)
    );
    for world in 1..=4 {
        let (short, long) = (run(&short, world, &script), run(&long, world, &script));
        let (at_20, at_60) = (drift(&short_alone, &short), drift(&long_alone, &long));
        println!("world of {world}: drift {at_20:.1e} over 20 steps, {at_60:.1e} over 60");
        assert!(at_20 < 1e-5, "world of {world}: {at_20}");
        assert!(at_60 < 1e-4, "world of {world}: {at_60}");
        let again = run(&training(&folder, 20), world, &script);
        let bits = |run: &Run| run.reports.iter().map(StepReport::bits).collect::<Vec<_>>();
        assert_eq!(bits(&again), bits(&short), "world of {world} twice");
    }
}

/// Where masters are in shards what is computed with has the bits of whole ones: before any weight moves, all worlds agree to the
/// bit. Afterwards sums that reorder move masters by their last bits, and an operand now and then by its own.
#[test]
fn t2_worlds_in_bf16_start_from_the_same_bits_and_stay_near() {
    let folder = Folder::new(50);
    let spec = |rate: &str| {
        folder.spec(&format!(
            "{CAL_DPO}optimizer.learning_rate = {rate}\nschedule.warmup_steps = 0\nmodel.dtype = \"bf16\"\n\
             train = {{ steps = 20, batch_pairs = 8, micro_batch_tokens = 96 }}"
        ))
    };
    let (still, moved) = (spec("1e-30"), spec("1e-3"));
    let script = Script::default();
    let alone = [&still, &moved].map(|spec| run(spec, 1, &script));
    for world in 2..=4 {
        assert_eq!(losses(&run(&still, world, &script)), losses(&alone[0]));
        let (one, two) = (run(&moved, world, &script), run(&moved, world, &script));
        assert_eq!(losses(&one), losses(&two), "world of {world} twice");
        let drift = drift(&alone[1], &one);
        println!("world of {world} in bf16: drift {drift:.1e} over 20 steps");
        assert!(drift < 1e-2, "world of {world}: {drift}");
    }
    let [first, last] = [0, 19].map(|step: usize| alone[1].reports[step].loss);
    assert!(last < 0.9 * first, "{first} to {last} trains something");
}

/// ZeRO's stage 2 adds the same parts in another order. Ranks have different numbers of packs, and some have none.
#[test]
fn t2_gradients_in_shards_are_those_of_whole_ones_within_the_order_of_their_sums() {
    let lora = "objective = { kind = \"dpo\" }\nadapter = { kind = \"lora\", rank = 4 }\n";
    let bf16 = &format!("{CAL_DPO}model.dtype = \"bf16\"\n");
    for (folder, lines, most) in [
        (Folder::new(31), CAL_DPO, 1e-5),
        (Folder::tied(31), CAL_DPO, 1e-5),
        (Folder::tied(31), bf16, 1e-2),
        (Folder::new(31), lora, 1e-5),
    ] {
        let spec = folder.spec(&format!(
            "{lines}optimizer.learning_rate = 1e-3\nschedule.warmup_steps = 0\n\
             train = {{ steps = 10, batch_pairs = 7, micro_batch_tokens = 96, compare_every_steps = 1 }}"
        ));
        for world in 2..=4 {
            let with = |mirror, gradients| {
                let script = Script {
                    sharding: Sharding {
                        mirror,
                        gradients,
                        offload: false,
                    },
                    ..Script::default()
                };
                run(&spec, world, &script)
            };
            let (whole, shards) = (with(true, false), with(true, true));
            let first = |run: &Run| run.reports[0].grad_norm;
            let norm = relative_error(first(&shards), first(&whole));
            let drift = drift(&whole, &shards);
            println!("world of {world}: drift {drift:.1e}, first norm {norm:.1e}");
            assert!(norm < 1e-5 && drift < most, "{lines}: {norm} {drift}");
            for again in [with(true, true), with(false, true)] {
                let bits = |run: &Run| run.reports.iter().map(StepReport::bits).collect::<Vec<_>>();
                assert_eq!(bits(&again), bits(&shards), "world of {world} twice");
            }
        }
    }
}

/// Packs side by side add to shared gradients: the embedding's rows, a tied head's tiles, blocks, adapters.
#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let kto = "objective = { kind = \"kto\" }\n";
    let lora = "objective = { kind = \"dpo\" }\nadapter = { kind = \"lora\", rank = 4 }\n";
    for (folder, lines) in [
        (Folder::tied(31), CAL_DPO),
        (Folder::new(31), CAL_DPO),
        (Folder::tied(31), kto),
        (Folder::tied(31), lora),
    ] {
        let spec = folder.spec(&format!(
            "{lines}optimizer.learning_rate = 1e-3\ntrain = {{ steps = 5, batch_pairs = 12, micro_batch_tokens = 400 }}"
        ));
        let bits = |threads: usize, world: usize| {
            let checkpoints = folder.path(&format!("threads-{threads}-{world}"));
            let script = Script {
                checkpoints,
                evaluate: true,
                save: true,
                threads: Some(threads),
                ..Script::default()
            };
            let run = run(&spec, world, &script);
            let state = state_bits(&Checkpoint::open(&run.checkpoints[&5]).unwrap());
            let reports = run.reports.iter().map(StepReport::bits);
            let held_out = run.evaluations.iter().map(|(row, _)| row.loss.to_bits());
            (
                state,
                reports.collect::<Vec<_>>(),
                held_out.collect::<Vec<_>>(),
            )
        };
        for world in [1, 2] {
            let alone = bits(1, world);
            for threads in 2..=4 {
                let beside = bits(threads, world);
                assert!(beside == alone, "{lines}: {threads} threads, {world} ranks");
            }
        }
    }
}

#[test]
fn t4_the_loss_is_a_mean_over_pairs_however_they_are_packed_and_recomputed() {
    let folder = Folder::new(13);
    let reports = |capacity: usize, more: &str| {
        let spec = folder.spec(&format!(
            "{CAL_DPO}train = {{ steps = 3, batch_pairs = 13, micro_batch_tokens = {capacity} }}\n\
             optimizer.learning_rate = 1e-3\nschedule.warmup_steps = 0\n{more}"
        ));
        run(&spec, 1, &Script::default()).reports
    };
    // One pair at a time, a few, everything at once.
    let whole = reports(100_000, "");
    for capacity in [1, 60, 200] {
        for (split, whole) in reports(capacity, "").iter().zip(&whole) {
            assert!(relative_error(split.loss, whole.loss) < 1e-5);
            assert!(relative_error(split.grad_norm, whole.grad_norm) < 1e-5);
        }
    }
    // Computing blocks again in the backward changes no bit.
    let again = reports(100_000, "model.gradient_checkpointing = true");
    for (again, whole) in again.iter().zip(&whole) {
        assert_eq!(again.bits(), whole.bits());
    }
}

#[test]
fn t4_an_sft_loss_is_a_mean_over_tokens_of_the_global_batch() {
    let folder = Folder::new(13);
    let report = |world: usize, capacity: usize| {
        let spec = folder.spec(&format!(
            "objective.kind = \"sft\"\ntrain = {{ steps = 1, batch_pairs = 13, micro_batch_tokens = {capacity} }}"
        ));
        let run = run(&spec, world, &Script::default());
        assert_eq!(run.counts[0].computed, 0, "sft needs no reference");
        run.reports[0].clone()
    };
    let alone = report(1, 100_000);
    // Uniform over 64 tokens would be 4.16; the mean log-prob over pairs is far from the mean over tokens.
    assert!((3.0..6.0).contains(&alone.loss), "{}", alone.loss);
    assert_eq!(alone.rewards.rewards_chosen, 0.0);
    for (world, capacity) in [(1, 30), (3, 30)] {
        let split = report(world, capacity);
        assert_eq!(split.loss.to_bits(), alone.loss.to_bits());
        assert!(relative_error(split.grad_norm, alone.grad_norm) < 1e-5);
    }
}

#[test]
fn t5_with_the_policy_as_reference_every_reward_at_step_0_is_exactly_0() {
    for world in [1, 3] {
        let folder = Folder::new(30);
        let spec = folder.spec(&format!(
            "{CAL_DPO}train = {{ steps = 1, batch_pairs = 30, micro_batch_tokens = 120 }}"
        ));
        let script = Script {
            evaluate: true,
            ..Script::default()
        };
        let run = run(&spec, world, &script);
        let (row, samples) = &run.evaluations[0];
        assert_eq!((row.step, row.pairs, samples.len()), (0, 7, 3));
        for rewards in [&row.rewards, &run.reports[0].rewards] {
            assert_eq!(rewards.log_ratios_chosen.to_bits(), 0);
            assert_eq!(rewards.log_ratios_rejected.to_bits(), 0);
            assert_eq!(rewards.rewards_margins.to_bits(), 0);
            assert_eq!(rewards.rewards_accuracies, 0.5);
        }
        // ln 2 + 2 t², t = 1/(2β) = 5.
        assert!((row.loss - 50.693_147_180_559_95).abs() < 1e-12);
    }
}

#[test]
fn t6_a_non_finite_gradient_on_one_rank_skips_the_step_on_all() {
    let folder = Folder::new(8);
    // The input row of the word that no other row has is infinite: only the rank with that pair can notice.
    folder.change_weights(|name, values| {
        if name == "model.embed_tokens.weight" {
            values[63 * 32..].fill(f32::INFINITY);
        }
    });
    let rows = fs::read_to_string(folder.path("train.jsonl")).unwrap();
    let mut rows: Vec<String> = rows.lines().map(str::to_owned).collect();
    rows[5] = "{\"prompt\": \"w3 w63\", \"chosen\": \" w4 w5\", \"rejected\": \" w6\"}".into();
    folder.write("train.jsonl", &rows.join("\n"));
    let spec = folder.spec(
        "objective.kind = \"sft\"\ndata.shuffle = false\ntrain.batch_pairs = 2\noptimizer.learning_rate = 1e-3\n\
         schedule.warmup_steps = 0",
    );
    for (world, gradients) in [(1, false), (2, false), (3, false), (2, true), (3, true)] {
        let checkpoints = tempfile::tempdir().unwrap();
        let script = Script {
            checkpoints: checkpoints.path().to_owned(),
            save: true,
            sharding: Sharding {
                mirror: false,
                gradients,
                offload: false,
            },
            ..Script::default()
        };
        let run = run(&spec, world, &script);
        let finite: Vec<bool> = run.reports.iter().map(|report| report.finite).collect();
        assert_eq!(finite, [true, true, false, true], "world of {world}");
        assert!(!run.reports[2].grad_norm.is_finite());
        assert!(run.reports[3].loss.is_finite());
        let at = |step: u64| Checkpoint::open(&run.checkpoints[&step]).unwrap();
        let (before, after) = (at(2), at(3));
        assert_eq!(before.manifest().state.updates, 2);
        assert_eq!(
            after.manifest().state.updates,
            2,
            "a skipped step is no update"
        );
        assert_eq!(after.manifest().state.step, 3);
        assert_eq!(at(4).manifest().state.updates, 3);
        assert_eq!(state_bits(&before), state_bits(&after));
    }
}

#[test]
fn decay_moves_matrices_and_leaves_norms_to_the_bit() {
    let folder = Folder::new(8);
    let after_a_step = |decay: f64, world: usize| {
        let checkpoints = tempfile::tempdir().unwrap();
        let script = Script {
            checkpoints: checkpoints.path().to_owned(),
            save: true,
            ..Script::default()
        };
        let spec = folder.spec(&format!(
            "{CAL_DPO}optimizer = {{ learning_rate = 1e-3, weight_decay = {decay:?} }}\nschedule.warmup_steps = 0\n\
             train = {{ steps = 1, batch_pairs = 8 }}"
        ));
        let run = run(&spec, world, &script);
        let checkpoint = Checkpoint::open(&run.checkpoints[&1]).unwrap();
        let tensors = checkpoint.manifest().tensors.clone();
        let weights = tensors.into_iter().map(|tensor| {
            let mut values = vec![0.0; tensor.elements().unwrap()];
            let read = checkpoint.read(&tensor.name, Kind::Weight, 0, &mut values);
            read.unwrap();
            (tensor.shape.len(), values)
        });
        weights.collect::<Vec<_>>()
    };
    for world in [1, 3] {
        let pairs = after_a_step(0.0, world)
            .into_iter()
            .zip(after_a_step(0.5, world));
        for ((dimensions, plain), (_, decayed)) in pairs {
            assert_eq!(plain == decayed, dimensions == 1, "{dimensions} dimensions");
        }
    }
}

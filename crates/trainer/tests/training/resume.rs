//! Stop and resume: invariant T3 at every step, C3 across world sizes, and what is refused.

use crate::support::{Folder, Script, relative_error, run, state_bits, try_run};
use checkpoint::{Checkpoint, Kind};
use std::path::Path;
use trainer::{Cause, End, StepReport};

const STEPS: u64 = 7;

/// 11 pairs in batches of 4: epochs of 3 steps, so that steps 1, 2, 4, 5 and 7 end in the middle of one.
const SPEC: &str = "objective = { kind = \"cal_dpo\", beta = 0.1 }\noptimizer = { learning_rate = 1e-3, weight_decay = 0.1 }\n\
                    train = { steps = 7, batch_pairs = 4, micro_batch_tokens = 80 }";

#[test]
fn t3_stopping_and_resuming_at_any_step_equals_the_uninterrupted_run_bit_for_bit() {
    let folder = Folder::new(11);
    equals_the_uninterrupted_run(&folder, SPEC, 1);
    equals_the_uninterrupted_run(&folder, SPEC, 2);
}

#[test]
fn t3_holds_in_bf16_for_adapters_and_for_objectives_that_read_the_whole_batch() {
    let folder = Folder::new(11);
    let bf16 = format!("{SPEC}\nmodel.dtype = \"bf16\"");
    equals_the_uninterrupted_run(&folder, &bf16, 1);
    // Masters in shards.
    equals_the_uninterrupted_run(&folder, &bf16, 3);
    let even = Folder::even(11);
    equals_the_uninterrupted_run(&even, &bf16, 1);
    equals_the_uninterrupted_run(&even, &bf16, 3);
    let lora = format!("{SPEC}\nadapter = {{ kind = \"lora\", rank = 2 }}");
    equals_the_uninterrupted_run(&folder, &lora, 2);
    // A running mean that a checkpoint has to carry.
    for kind in ["bco_pair", "aot", "kto"] {
        let spec = SPEC.replace("cal_dpo", kind);
        equals_the_uninterrupted_run(&folder, &spec, 2);
    }
}

/// Stops after every step of the run that `lines` specify, goes on, and compares.
fn equals_the_uninterrupted_run(folder: &Folder, lines: &str, world: usize) {
    let spec = folder.spec(lines);
    let dir = tempfile::tempdir().unwrap();
    let script = Script {
        checkpoints: dir.path().join("whole"),
        save: true,
        evaluate: true,
        ..Script::default()
    };
    let whole = run(&spec, world, &script);
    let end = state_bits(&Checkpoint::open(&whole.checkpoints[&STEPS]).unwrap());
    for stop in 1..STEPS {
        let first = Script {
            checkpoints: dir.path().join(format!("cut-{stop}")),
            stop_after: Some(stop),
            ..script.clone()
        };
        let cut = run(&spec, world, &first);
        assert!(cut.ends.iter().all(|end| *end == End::Stopped));
        let second = Script {
            resume: Some(cut.checkpoints[&stop].clone()),
            stop_after: None,
            ..first
        };
        let rest = run(&spec, world, &second);
        assert!(rest.ends.iter().all(|end| *end == End::Finished));
        assert!(rest.counts.iter().all(|counts| counts.computed == 0));
        let resumed = cut.reports.iter().chain(&rest.reports);
        let resumed: Vec<_> = resumed.map(StepReport::bits).collect();
        let expected: Vec<_> = whole.reports.iter().map(StepReport::bits).collect();
        assert_eq!(
            resumed, expected,
            "world of {world}, stopped after step {stop}"
        );
        let last = Checkpoint::open(&rest.checkpoints[&STEPS]).unwrap();
        assert_eq!(
            state_bits(&last),
            end,
            "world of {world}, stopped after step {stop}"
        );
        // Evaluations of the same step agree too, and what the model writes then.
        let ended = rest.evaluations.last().unwrap();
        let expected = whole.evaluations.last().unwrap();
        assert_eq!(ended.0.loss.to_bits(), expected.0.loss.to_bits());
        assert_eq!(ended.1, expected.1);
        assert!(rest.evaluations.iter().all(|(_, s)| s.len() == 3));
    }
}

#[test]
fn c3_a_checkpoint_of_three_ranks_goes_on_with_one_two_or_four() {
    let folder = Folder::new(11);
    let spec = folder.spec(SPEC);
    let script = Script {
        checkpoints: folder.path("three"),
        save: true,
        ..Script::default()
    };
    let whole = run(&spec, 3, &script);
    for world in [1, 2, 4] {
        let script = Script {
            checkpoints: folder.path(&format!("world-{world}")),
            resume: Some(whole.checkpoints[&3].clone()),
            ..script.clone()
        };
        let rest = run(&spec, world, &script);
        assert_eq!(rest.reports[0].step, 4);
        for (report, expected) in rest.reports.iter().zip(&whole.reports[3..]) {
            assert!(relative_error(report.loss, expected.loss) < 1e-5);
        }
    }
}

/// Ranks with masters in shards write what a rank alone writes, and read it.
#[test]
fn c3_masters_of_any_world_are_those_of_any_other_to_the_bit() {
    let folder = Folder::new(11);
    let spec = folder.spec(&format!("{SPEC}\nmodel.dtype = \"bf16\""));
    // A rate that moves no f32 weight.
    let still = SPEC.replace("1e-3, weight_decay = 0.1", "1e-30, weight_decay = 0.0");
    let still = folder.spec(&format!("{still}\nmodel.dtype = \"bf16\""));
    let weights = |path: &Path| {
        let checkpoint = Checkpoint::open(path).unwrap();
        let tensors = checkpoint.manifest().tensors.iter();
        let read = tensors.map(|tensor| {
            let mut values = vec![0.0f32; tensor.elements().unwrap()];
            let read = checkpoint.read(&tensor.name, Kind::Weight, 0, &mut values);
            read.unwrap();
            values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        });
        read.collect::<Vec<_>>()
    };
    for from in [1, 2, 3] {
        let script = Script {
            checkpoints: folder.path(&format!("from-{from}")),
            save: true,
            stop_after: Some(3),
            ..Script::default()
        };
        let cut = run(&spec, from, &script).checkpoints[&3].clone();
        let expected = weights(&cut);
        let narrow = expected.iter().flatten().any(|bits| bits & 0xffff != 0);
        assert!(narrow, "masters have more bits than bf16");
        for to in [1, 2, 3] {
            let script = Script {
                checkpoints: folder.path(&format!("from-{from}-to-{to}")),
                resume: Some(cut.clone()),
                stop_after: Some(4),
                ..script.clone()
            };
            let rest = run(&still, to, &script);
            assert!(weights(&rest.checkpoints[&4]) == expected, "{from} to {to}");
        }
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused_with_what_differs() {
    let folder = Folder::new(11);
    let spec = folder.spec(SPEC);
    let script = Script {
        checkpoints: folder.path("first"),
        save: true,
        stop_after: Some(1),
        ..Script::default()
    };
    let first = run(&spec, 1, &script);
    let resume = Script {
        resume: Some(first.checkpoints[&1].clone()),
        stop_after: None,
        ..script
    };
    let refused = |spec: &spec::Spec, word: &str| {
        let error = try_run(spec, 1, &resume).err().expect("refused");
        assert_eq!(error.cause(), Cause::Fatal);
        assert!(error.to_string().contains(word), "{error}");
    };
    let mut other = spec.clone();
    other.seed = 1;
    refused(&other, "seed 42");
    let mut other = spec.clone();
    other.data.max_length = 6;
    refused(&other, "training pairs");
    folder.change_weights(|_, values| values[0] += 0.5);
    refused(&spec, "starting weights");
}

#[test]
fn a_save_that_fails_is_reported_and_training_goes_on() {
    let folder = Folder::new(11);
    folder.write(
        "no-folder",
        "a file where the folder of checkpoints should be",
    );
    let script = Script {
        checkpoints: folder.path("no-folder"),
        save: true,
        ..Script::default()
    };
    let run = run(&folder.spec(SPEC), 2, &script);
    assert_eq!(run.reports.len() as u64, STEPS);
    assert_eq!(run.failed_saves.len() as u64, 2 * STEPS);
    assert!(
        run.failed_saves
            .iter()
            .all(|reason| reason.contains("no-folder"))
    );
}

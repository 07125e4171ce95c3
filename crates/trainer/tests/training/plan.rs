//! What a plan says of memory, against what is allocated; the settings that it offers; the probe.

use std::fs;

use crate::support::{Folder, Script, run};
use data::{pack_plan, step_pairs};
use model::{Device, Layout, ModelConfig};
use spec::Spec;
use trainer::plan::{Change, Draft, Knobs, Peers, ProbeRequest, Program, WorkerMemory};
use trainer::{Setup, Sharding, score};

/// Reading the pairs needs less than everything after it.
const PROGRAM: Program = Program {
    resident: 1 << 20,
    peak: 0,
};

const LINES: &str = "train.steps = 9\ntrain.batch_pairs = 12\ntrain.micro_batch_tokens = 512\n\
                     schedule.warmup_steps = 1\nreference.verify_samples = 0";

fn mirrored(mirror: bool) -> Sharding {
    Sharding {
        mirror,
        ..Sharding::default()
    }
}

fn draft(folder: &Folder, lines: &str) -> (Spec, Draft) {
    let spec = folder.spec(&format!("{LINES}\n{lines}"));
    let draft = Draft::load(&spec, 1).unwrap();
    (spec, draft)
}

fn moment(memory: &WorkerMemory, name: &str) -> trainer::plan::Parts {
    let moments = memory.moments.iter();
    moments
        .into_iter()
        .find(|it| it.name == name)
        .unwrap()
        .parts
}

#[test]
fn weights_gradients_moments_and_snapshot_are_the_layouts_elements() {
    let folder = Folder::new(40);
    let (spec, draft) = draft(&folder, "");
    let layout = Layout::new(&ModelConfig::load(&spec.model.path).unwrap());
    let weights = 4 * layout.elements() as u64;
    for workers in [1, 2, 3] {
        let workload = draft.workload();
        let memory = workload.memory(
            &workload.knobs(workers, 1, Sharding::default()),
            PROGRAM,
            true,
        );
        let parts = moment(&memory, "training step");
        assert_eq!([parts.weights, parts.gradients], [weights; 2]);
        // Rounded up in every bucket.
        let share = |bytes: u64| bytes.div_ceil(workers as u64);
        let most = |bytes: u64| share(bytes) + 12 * layout.buckets.len() as u64;
        assert!((share(2 * weights)..=most(2 * weights)).contains(&parts.optimizer_moments));
        let copied = parts.snapshot - weights;
        assert!((share(2 * weights)..=most(2 * weights)).contains(&copied));
        let sums = parts.collective;
        assert_eq!(sums > 0, workers > 1, "{workers} workers: {sums}");
        // A worker alone has nobody whose moments it could keep.
        let mirrored = workload.memory(&workload.knobs(workers, 1, mirrored(true)), PROGRAM, true);
        let mirrored = moment(&mirrored, "training step");
        let kept = if workers > 1 { 2 } else { 1 };
        assert_eq!(mirrored.optimizer_moments, kept * parts.optimizer_moments);
        assert_eq!(mirrored.snapshot, parts.snapshot);
    }
}

#[test]
fn of_weights_that_are_never_trained_there_is_what_a_forward_reads() {
    let folder = Folder::new(40);
    let lora = "adapter = { kind = \"lora\", rank = 2 }\n";
    let reference = format!("model.reference = {:?}\n", folder.path("model"));
    let parts = |dtype: &str, lines: &str, name: &str| {
        let (_, draft) = draft(&folder, &format!("model.dtype = \"{dtype}\"\n{lines}"));
        let workload = draft.workload();
        let memory = workload.memory(&workload.knobs(1, 1, Sharding::default()), PROGRAM, true);
        moment(&memory, name)
    };
    let layout = Layout::new(&ModelConfig::load(&folder.path("model")).unwrap());
    let narrow = layout.narrow_elements();
    let [plain, frozen] = [0, narrow].map(|more| 4 * (layout.elements() + more) as u64);
    let loaded = |dtype, lines| parts(dtype, lines, "load").weights;
    assert_eq!([loaded("f32", ""), loaded("f32", lora)], [plain; 2]);
    assert_eq!(
        [loaded("bf16", ""), loaded("bf16", lora)],
        [2 * plain, frozen]
    );
    let of_reference = |dtype| parts(dtype, &reference, "reference pass").reference_weights;
    assert_eq!([of_reference("f32"), of_reference("bf16")], [plain, frozen]);
}

#[test]
fn the_largest_micro_batch_is_that_of_the_runs_own_steps() {
    let folder = Folder::new(40);
    let (spec, draft) = draft(&folder, "");
    let request = trainer::ScoreRequest {
        model: spec.model.path.clone(),
        adapter: None,
        data: spec.data.clone(),
        micro_batch_tokens: 1024,
    };
    let mut lengths = Vec::new();
    score(&request, &Device::flex(), &mut |scored| {
        lengths.push(scored.pair.packed_tokens());
        Ok::<(), trainer::TrainError>(())
    })
    .unwrap();
    let mut largest = 0;
    for step in 1..=9 {
        let step = step_pairs(spec.seed, step, lengths.len(), 12, spec.data.shuffle).pairs;
        let step: Vec<usize> = step.iter().map(|&pair| lengths[pair]).collect();
        // A pack is a quarter of what may be on its way at once.
        let packs = pack_plan(&step, 512 / 4);
        let tokens = packs
            .iter()
            .map(|pack| pack.iter().map(|&pair| step[pair]).sum::<usize>());
        largest = largest.max(tokens.max().unwrap());
    }
    let workload = draft.workload();
    let memory = workload.memory(&workload.knobs(2, 1, Sharding::default()), PROGRAM, true);
    assert_eq!(memory.largest_micro_batch_tokens, largest);
}

#[test]
fn a_job_that_is_too_large_is_offered_settings_each_of_which_fits() {
    let folder = Folder::new(40);
    let (_, draft) = draft(&folder, "");
    let workload = draft.workload();
    let knobs = workload.knobs(3, 1, Sharding::default());
    let needed = |knobs: &Knobs| {
        let memory = workload.memory(knobs, PROGRAM, true);
        memory.peak_bytes * knobs.workers as u64
    };
    // On a machine on which one change is just enough, that change is offered; so are others, if they are enough too.
    let changes = |key, value: serde_json::Value| [Change { key, value }];
    for change in [
        changes("model.gradient_checkpointing", true.into()),
        changes("train.micro_batch_tokens", 256.into()),
        changes("cluster.workers", 2.into()),
        changes("cluster.workers", 1.into()),
    ] {
        let limit = needed(&changed(knobs, &change));
        assert!(limit < needed(&knobs), "{change:?} changes nothing");
        let cures = workload.cures(&knobs, PROGRAM, true, limit);
        for cure in &cures {
            assert_eq!(needed(&changed(knobs, &cure.changes)), cure.bytes);
            assert!(cure.bytes <= limit, "{change:?}: {cure:?}");
        }
        let offered = cures.iter().any(|cure| cure.changes == change);
        assert!(offered, "{change:?} is not among {cures:?}");
    }
}

#[test]
fn several_settings_together_are_offered_where_none_is_enough_and_none_where_all_are_not() {
    let folder = Folder::new(40);
    let (_, draft) = draft(&folder, "");
    let workload = draft.workload();
    let knobs = workload.knobs(1, 1, Sharding::default());
    let smallest = Knobs {
        gradient_checkpointing: true,
        micro_batch_tokens: 32,
        ..knobs
    };
    let limit = workload.memory(&smallest, PROGRAM, true).peak_bytes;
    let cures = workload.cures(&knobs, PROGRAM, true, limit);
    let [cure] = &cures[..] else {
        panic!("{cures:?}");
    };
    assert!(cure.changes.len() > 1 && cure.bytes <= limit, "{cure:?}");
    let least = workload.least_bytes(&knobs, PROGRAM, true);
    assert!(least <= limit);
    assert!(workload.cures(&knobs, PROGRAM, true, 1 << 20).is_empty());
    let shorter = workload.memory(
        &Knobs {
            max_length: 12,
            ..smallest
        },
        PROGRAM,
        true,
    );
    assert!(shorter.peak_bytes < limit, "shorter pairs need less");
}

fn changed(mut knobs: Knobs, changes: &[Change]) -> Knobs {
    for change in changes {
        let whole = change.value.as_u64().unwrap_or_default() as usize;
        match change.key {
            "model.gradient_checkpointing" => knobs.gradient_checkpointing = true,
            "train.micro_batch_tokens" => knobs.micro_batch_tokens = whole,
            "cluster.workers" => knobs.workers = whole,
            "data.max_length" => knobs.max_length = whole,
            "cluster.zero" => knobs.shard_gradients = whole == 2,
            other => panic!("{other}"),
        }
    }
    knobs
}

#[test]
fn checkpointing_and_smaller_micro_batches_need_less() {
    let folder = Folder::new(40);
    let step = |lines: &str| {
        let (_, draft) = draft(&folder, lines);
        let workload = draft.workload();
        let memory = workload.memory(&workload.knobs(1, 1, Sharding::default()), PROGRAM, false);
        let parts = moment(&memory, "training step");
        assert_eq!(parts.snapshot, 0, "no checkpoint on the way");
        parts.activations + parts.workspace
    };
    let plain = step("");
    assert!(step("model.gradient_checkpointing = true") < plain);
    let spec = LINES.replace("512", "256");
    let folder_spec = folder.spec(&spec);
    let draft = Draft::load(&folder_spec, 1).unwrap();
    let memory = draft.workload().memory(
        &draft.workload().knobs(1, 1, Sharding::default()),
        PROGRAM,
        false,
    );
    let parts = moment(&memory, "training step");
    assert!(parts.activations + parts.workspace < plain);
}

#[test]
fn what_is_computed_is_counted() {
    let folder = Folder::new(40);
    let (_, draft) = draft(&folder, "evaluate.samples = 2\nevaluate.sample_tokens = 5");
    let amount = draft.amount();
    assert_eq!((amount.pairs, amount.held_out_pairs), (40, 7));
    assert_eq!(
        (amount.steps, amount.batch_pairs, amount.sample_tokens),
        (9, 12, 10)
    );
    // Two epochs of four steps and one step of the third.
    assert!((amount.epochs - (80.0 + 12.0) / 40.0).abs() < 1e-12);
    assert!(amount.packed_tokens < amount.tokens);
    assert!((1..=94).contains(&amount.reference.values));
}

#[test]
fn a_probe_times_steps_of_all_workers_and_leaves_nothing() {
    let folder = Folder::new(40);
    let (_, draft) = draft(&folder, "");
    for workers in [1, 2] {
        let request = ProbeRequest {
            workers,
            threads: 1,
            checkpoints: folder.path("not/there/yet"),
        };
        let probe = draft.probe(&request, &Device::flex()).unwrap();
        assert!(probe.steps >= 1 && !probe.partial, "{probe:?}");
        assert!(probe.packed_tokens > 0);
        assert!(probe.seconds_per_token > probe.forward_seconds_per_token);
        assert!(probe.seconds_per_sample_token.is_some());
        assert!(probe.write_bytes_per_second.is_some());
    }
    let left: Vec<_> = fs::read_dir(folder.path("model").parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| !["model", "train.jsonl", "eval.jsonl"].contains(&&*name.to_string_lossy()))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_probe_counts_the_reference_values_that_the_store_does_not_have() {
    let folder = Folder::new(40);
    let (spec, draft) = draft(&folder, "");
    let all = draft.amount().reference;
    let missing = || {
        let request = ProbeRequest {
            workers: 1,
            threads: 1,
            checkpoints: folder.path("checkpoints"),
        };
        draft.probe(&request, &Device::flex()).unwrap().reference
    };
    assert_eq!(missing(), all);
    assert!(!folder.path("store").exists(), "a store");
    let script = Script {
        checkpoints: folder.path("checkpoints"),
        stop_after: Some(1),
        ..Script::default()
    };
    run(&spec, 1, &script);
    assert_eq!((missing().values, missing().packed_tokens), (0, 0));
}

#[test]
fn a_loaded_run_says_its_memory_in_one_line() {
    let folder = Folder::new(40);
    let (spec, _) = draft(&folder, "");
    let setup = Setup::load(&spec, &Device::flex(), Peers::NONE, &mut |_, _, _| Ok(())).unwrap();
    let (workload, program) = setup.workload().unwrap();
    let memory = workload.memory(&workload.knobs(2, 1, Sharding::default()), program, true);
    let line = memory.to_string();
    assert!(line.contains(" MiB at most, in the "), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(memory.peak_bytes > 1 << 20);
}

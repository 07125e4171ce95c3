//! The plan of a job on a machine of a given size: what it says, and what it refuses with which cure.

#![cfg(feature = "local")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use coordinator::config::{Config, Sources};
use coordinator::plan::{NoRoom, Plan, check_room, plan};
use tempfile::TempDir;
use worker::machine::{LimitBy, MachineMemory};

fn config(folder: &TempDir, set: &[&str]) -> Config {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart");
    let own = [
        format!("model.path={}", root.join("reference").display()),
        format!("data.train=[\"{}\"]", root.join("train.jsonl").display()),
        format!("data.eval=[\"{}\"]", root.join("eval.jsonl").display()),
        format!("job.output={}", folder.path().join("run").display()),
        format!("reference.store={}", folder.path().join("store").display()),
        "train.steps=40".into(),
        "checkpoint.every_steps=10".into(),
        "cluster.threads=1".into(),
    ];
    let set = own.into_iter().chain(set.iter().map(|it| (*it).to_owned()));
    Config::load(&Sources {
        set: set.collect(),
        ..Sources::default()
    })
    .unwrap()
}

/// The plan without a probe on a machine with so much memory, all of it free.
fn planned(set: &[&str], bytes: u64) -> Plan {
    let folder = tempfile::tempdir().unwrap();
    let machine = MachineMemory {
        limit_bytes: bytes,
        limit_by: LimitBy::Machine,
        available_bytes: bytes,
    };
    let made = plan(&config(&folder, set), Some(machine), None, false).unwrap();
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        0,
        "files"
    );
    made
}

#[test]
fn a_job_fits_exactly_when_all_workers_and_the_coordinator_do() {
    let memory = planned(&[], 1 << 40).memory.unwrap();
    assert_eq!(memory.workers, 2);
    assert_eq!(
        memory.total_bytes,
        2 * memory.worker.peak_bytes + memory.coordinator_bytes
    );
    assert!(memory.fits && memory.cures.is_empty() && memory.least_bytes.is_none());
    // This process's own memory is part of the peak and differs a little from one reading to the next.
    let slack = memory.total_bytes / 4;
    assert!(planned(&[], memory.total_bytes + slack).fits);
    let refused = planned(&[], memory.total_bytes - slack);
    assert!(!refused.fits && !refused.memory.unwrap().fits);
}

#[test]
fn what_cannot_fit_is_refused_with_settings_that_would() {
    let large = ["train.batch_pairs=256", "train.micro_batch_tokens=14000"];
    let total = |set: &[&str]| planned(set, 1 << 40).memory.unwrap().total_bytes;
    let checkpointing = [large[0], large[1], "model.gradient_checkpointing=true"];
    // Too little by half of what checkpointing saves: this process, with the tests beside this one, is part of both.
    let refused = planned(&large, u64::midpoint(total(&large), total(&checkpointing)));
    let reason = refused.refusal().unwrap();
    for part in [
        "2 workers of 1 thread need",
        "this machine has",
        "--set model.gradient_checkpointing=true",
        "--set train.micro_batch_tokens=",
        "--set cluster.workers=1",
    ] {
        assert!(reason.contains(part), "no `{part}` in: {reason}");
    }
    assert!(refused.to_string().contains("it does not fit"), "{refused}");
    let nothing = planned(&large, 48 << 20).refusal().unwrap();
    for part in [
        "no setting makes it fit",
        "one worker needs at least",
        "larger machine",
    ] {
        assert!(nothing.contains(part), "no `{part}` in: {nothing}");
    }
}

#[test]
fn memory_that_others_use_is_a_warning_and_no_refusal() {
    let folder = tempfile::tempdir().unwrap();
    let machine = MachineMemory {
        limit_bytes: 1 << 40,
        limit_by: LimitBy::Cgroup,
        available_bytes: 1 << 20,
    };
    let made = plan(&config(&folder, &[]), Some(machine), None, true).unwrap();
    assert!(made.fits && made.refusal().is_none());
    assert!(made.time.is_none());
    let text = made.to_string();
    for part in [
        "that the control group allows",
        "when other programs give some back",
        "not measured",
    ] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

#[test]
fn checkpoints_are_counted_as_many_as_are_there_at_once() {
    let checkpoints = |set: &[&str]| {
        let made = planned(set, 1 << 40);
        let items: Vec<_> = made.disk.into_iter().flat_map(|disk| disk.items).collect();
        let found = items.iter().find(|item| item.what == "checkpoints");
        found.unwrap().bytes
    };
    let one = checkpoints(&["checkpoint.every_steps=0"]);
    assert_eq!(checkpoints(&["checkpoint.every_steps=20"]), 2 * one);
    assert_eq!(checkpoints(&[]), 3 * one);
    assert_eq!(checkpoints(&["checkpoint.keep_last=3"]), 4 * one);
    assert_eq!(checkpoints(&["checkpoint.keep_last=30"]), 4 * one);
    // Besides the last one, 20 stays, or all of 10, 20 and 30; and one more while the next is written.
    let every = ["checkpoint.keep_last=1", "checkpoint.keep_every_steps=20"];
    assert_eq!(checkpoints(&every[..1]), 2 * one);
    assert_eq!(checkpoints(&every), 3 * one);
    let every = ["checkpoint.keep_last=1", "checkpoint.keep_every_steps=5"];
    assert_eq!(checkpoints(&every), 4 * one);
    // Steps 10, 20 and 30 for their cadence, 15 and 30 because they are evaluated, and the last one.
    let best = [
        "checkpoint.keep_last=30",
        "checkpoint.keep_best=true",
        "evaluate.every_steps=15",
        "evaluate.metric=loss",
    ];
    assert_eq!(checkpoints(&best), 5 * one);
    assert_eq!(
        checkpoints(&[&best[1..], &["checkpoint.keep_last=2"]].concat()),
        4 * one
    );
}

#[test]
fn what_others_have_left_is_not_taken_for_what_this_run_has() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, &[]);
    let items = || {
        let disk = plan(&config, None, None, false).unwrap().disk;
        let items = disk.into_iter().flat_map(|disk| disk.items);
        items.collect::<Vec<_>>()
    };
    let before = items();
    let names: Vec<_> = before.iter().map(|it| it.what).collect();
    assert_eq!(names, ["checkpoints", "export", "reference log-probs"]);
    // Values of other models in the store, and the beginning of a checkpoint and of an export.
    for path in [
        "store/others",
        "run/checkpoints/step-00000010/rank",
        "run/export/README.md",
    ] {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, vec![0; 8 << 20]).unwrap();
    }
    assert_eq!(items(), before);
    // An export that is there is not made again.
    std::fs::write(folder.path().join("run/export/model.safetensors"), "").unwrap();
    assert_eq!(items(), [&before[..1], &before[2..]].concat());
}

fn room(workers: usize, bytes: u64, cores: usize) -> Result<(), NoRoom> {
    let folder = tempfile::tempdir().unwrap();
    let set = [&format!("cluster.workers={workers}"), "cluster.backend=cpu"];
    let machine = MachineMemory {
        limit_bytes: bytes,
        limit_by: LimitBy::Machine,
        available_bytes: bytes,
    };
    check_room(&config(&folder, &set), Some(&machine), cores)
}

#[test]
fn workers_that_a_machine_has_no_room_for_are_refused_before_any_is_started() {
    let large = 1 << 40;
    assert_eq!(room(64, large, 2), Ok(()));
    let refused = room(65, large, 2).unwrap_err().to_string();
    for part in [
        "cluster.workers is 65",
        "2 cores",
        "set cluster.workers to at most 64",
        "coordinator --cluster",
    ] {
        assert!(refused.contains(part), "no `{part}` in: {refused}");
    }
    assert!(matches!(
        room(5000, large, 16),
        Err(NoRoom::Cores { most: 512, .. })
    ));
    // What the plan says of a job is never less, so that nothing is refused that the plan lets pass.
    let planned = planned(&[], 1 << 40).memory.unwrap().total_bytes;
    let Err(NoRoom::Memory { needed_bytes, .. }) = room(2, 1 << 20, 2) else {
        panic!("two workers in a MiB");
    };
    // The weights, gradients and moments of two workers, beside the programs, which differ a little from one reading to the next.
    assert!(needed_bytes > 2 * 12 * 114_048 + (40 << 20));
    assert!(
        needed_bytes < planned + planned / 4,
        "{needed_bytes} of {planned}"
    );
    // Half of what forty need has room for some, and not for all.
    let Err(NoRoom::Memory { needed_bytes, .. }) = room(40, 1 << 20, 2) else {
        panic!("forty workers in a MiB");
    };
    let refused = room(40, needed_bytes / 2, 2).unwrap_err();
    let NoRoom::Memory { most, .. } = refused else {
        panic!("{refused}");
    };
    assert!((5..30).contains(&most), "{refused}");
    let text = refused.to_string();
    for part in [
        "cluster.workers is 40: they take at least".to_owned(),
        format!("set cluster.workers to at most {most}"),
    ] {
        assert!(text.contains(&part), "no `{part}` in: {text}");
    }
    let none = room(40, 1 << 20, 2).unwrap_err().to_string();
    assert!(none.contains("not even one fits"), "{none}");
    // A control group that does not tell.
    let folder = tempfile::tempdir().unwrap();
    let few = config(&folder, &["cluster.workers=4"]);
    assert_eq!(check_room(&few, None, 1), Ok(()));
}

/// The plan for GPUs of so many GiB that are not here.
fn planned_for_gpu(set: &[&str], gib: f64) -> Plan {
    let folder = tempfile::tempdir().unwrap();
    let card = (gib * f64::from(1 << 30)) as u64;
    plan(&config(&folder, set), None, Some(card), true).unwrap()
}

#[test]
fn a_gpu_that_is_not_here_is_planned_for_and_not_probed() {
    let made = planned_for_gpu(&["cluster.workers=1", "model.dtype=bf16"], 8.0);
    assert!(made.fits && made.memory.is_none() && made.time.is_none());
    let gpu = made.gpu.as_ref().unwrap();
    assert!(!gpu.is_here && gpu.available_bytes < gpu.total_bytes);
    // Weights, operands, gradients and two moments.
    let training = gpu.worker.moments.iter();
    let training = training.clone().find(|it| it.name == "training step");
    let parts = training.unwrap().parts;
    assert_eq!(parts.weights, 6 * made.run.parameters);
    assert_eq!(parts.gradients, 4 * made.run.parameters);
    assert_eq!(parts.optimizer_moments, 8 * made.run.parameters);
    let text = made.to_string();
    for part in [
        "memory of each GPU",
        "GPU libraries",
        "each worker needs",
        "it fits",
        "beside its GPU each worker takes up to",
        "of a snapshot for checkpoints",
        "the GPU is not here",
    ] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    // Of two workers each has the moments of its shard, and of the other's unless there are no mirrors.
    let shard = made.run.parameters.div_ceil(2);
    for (mirror, shards) in [("true", 2), ("false", 1)] {
        let set = ["cluster.workers=2", &format!("cluster.mirror={mirror}")];
        let two = planned_for_gpu(&set, 8.0).gpu.unwrap();
        let mut moments = two.worker.moments.iter();
        let training = moments.find(|it| it.name == "training step").unwrap();
        assert_eq!(training.parts.optimizer_moments, shards * 8 * shard);
    }
}

#[test]
fn what_workers_take_beside_their_gpus_is_said_and_a_machine_without_it_refuses_the_job() {
    let set = [
        "cluster.workers=2",
        "model.dtype=bf16",
        "cluster.offload=true",
    ];
    let mut made = planned_for_gpu(&set, 8.0);
    let gpu = made.gpu.as_mut().unwrap();
    // Masters and two moments of the own shard and of the other's.
    let shard = made.run.parameters.div_ceil(2);
    assert_eq!(gpu.host.worker.optimizer, 2 * 12 * shard);
    assert!(gpu.host.worker_bytes > gpu.host.worker.peak_bytes());
    assert!(gpu.host.total_bytes > 2 * gpu.host.worker_bytes);
    // Of a machine that is not here nothing is known.
    assert!(gpu.host.fits && gpu.fits);
    gpu.host.fits = false;
    assert!(made.to_string().contains("this machine has too little"));
    let reason = made.refusal().unwrap();
    for part in [
        "2 workers take",
        "offloaded masters and moments",
        "leave cluster.offload out",
    ] {
        assert!(reason.contains(part), "no `{part}` in: {reason}");
    }
}

#[test]
fn a_gpu_that_is_too_small_is_refused_with_settings_that_fit_it() {
    let large = [
        "cluster.workers=1",
        "train.batch_pairs=256",
        "train.micro_batch_tokens=14000",
    ];
    let needed = |set: &[&str]| {
        let whole = planned_for_gpu(set, 80.0).gpu.unwrap();
        let bytes = whole.worker.certain_bytes() + whole.total_bytes - whole.available_bytes;
        bytes as f64 / f64::from(1 << 30)
    };
    let checkpointing = [&large[..], &["model.gradient_checkpointing=true"]].concat();
    assert!(planned_for_gpu(&large, needed(&large) + 1e-6).fits);
    let between = f64::midpoint(needed(&large), needed(&checkpointing));
    let refused = planned_for_gpu(&large, between);
    assert!(!refused.fits);
    let reason = refused.refusal().unwrap();
    for part in [
        "a worker needs",
        "--set model.gradient_checkpointing=true",
        "--set train.micro_batch_tokens=",
    ] {
        assert!(reason.contains(part), "no `{part}` in: {reason}");
    }
    assert!(!reason.contains("cluster.workers"), "{reason}");
    let nothing = planned_for_gpu(&large, 0.6).refusal().unwrap();
    for part in ["no setting makes it fit", "at least", "larger GPU"] {
        assert!(nothing.contains(part), "no `{part}` in: {nothing}");
    }
}

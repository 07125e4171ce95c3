#![allow(missing_docs, clippy::unwrap_used)]
//! The sections of a configuration: defaults, round trip, refusals with the key.

use objective::ObjectiveConfig;
use spec::{OptimizerKind, ScheduleKind, Spec};

fn parse(lines: &str) -> Result<Spec, toml::de::Error> {
    toml::from_str(&format!(
        "model.path = \"m\"\ndata.train = [\"a.jsonl\"]\n{lines}"
    ))
}

#[test]
fn a_model_and_data_are_enough_and_the_rest_has_the_papers_defaults() {
    let spec = parse("").unwrap();
    spec.validate().unwrap();
    assert_eq!(
        spec.objective,
        ObjectiveConfig::CalDpo {
            beta: 0.1,
            calibration_weight: 1.0,
            calibration_shift: 0.5,
            score_scale: None,
        }
    );
    assert_eq!(spec.optimizer.learning_rate, 5e-7);
    assert_eq!(
        spec.optimizer.kind,
        OptimizerKind::AdamW {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
        }
    );
    assert_eq!(spec.schedule.kind, ScheduleKind::Cosine);
    assert_eq!(spec.schedule.warmup(241), 25);
    assert_eq!(
        (spec.train.batch_pairs, spec.train.steps_total(130)),
        (64, 3)
    );
}

#[test]
fn rmsprop_has_torchs_defaults_and_its_own_parameter() {
    let kind = |keys: &str| {
        let spec = parse(&format!("optimizer = {{ kind = \"rmsprop\"{keys} }}")).unwrap();
        spec.validate().unwrap();
        spec.optimizer.kind
    };
    let (alpha, eps) = (0.99, 1e-8);
    assert_eq!(kind(""), OptimizerKind::RmsProp { alpha, eps });
    let (alpha, eps) = (0.5, 1e-6);
    assert_eq!(
        kind(", alpha = 0.5, eps = 1e-6, weight_decay = 0.0"),
        OptimizerKind::RmsProp { alpha, eps }
    );
}

#[test]
fn a_resolved_spec_reads_back_as_itself() {
    for lines in [
        "",
        "seed = 7\nmodel.reference = \"r\"\ntrain.steps = 9\nevaluate.every_steps = 3\nschedule.warmup_steps = 4",
        "adapter = { kind = \"lora\", targets = [\"q_proj\"] }\nmodel.dtype = \"bf16\"",
        "adapter = { kind = \"peft\", path = \"a\" }",
        "optimizer = { kind = \"rmsprop\", alpha = 0.9, max_grad_norm = 10.0 }",
        "objective.kind = \"sft\"\ntrain.epochs = 2\nschedule = { kind = \"linear\", warmup_ratio = 0.25 }",
    ] {
        let spec = parse(lines).unwrap();
        let text = toml::to_string(&spec).unwrap();
        assert_eq!(toml::from_str::<Spec>(&text).unwrap(), spec, "{text}");
    }
}

#[test]
fn values_that_cannot_work_are_refused_with_their_key() {
    for (lines, key) in [
        ("adapter = { kind = \"lora\", rank = 0 }", "adapter.rank"),
        (
            "adapter = { kind = \"lora\", alpha = -1.0 }",
            "adapter.alpha",
        ),
        (
            "adapter = { kind = \"lora\", dropout = 0.1 }",
            "adapter.dropout",
        ),
        (
            "adapter = { kind = \"lora\", targets = [] }",
            "adapter.targets",
        ),
        ("adapter = { kind = \"peft\", path = \"\" }", "adapter.path"),
        ("data.max_length = 1", "data.max_length"),
        (
            "objective = { kind = \"cal_dpo\", beta = 0.0 }",
            "objective.beta",
        ),
        ("reference.store = \"\"", "reference.store"),
        ("optimizer.learning_rate = 0.0", "optimizer.learning_rate"),
        ("optimizer.learning_rate = nan", "optimizer.learning_rate"),
        ("optimizer.betas = [0.9, 1.0]", "optimizer.betas"),
        ("optimizer.eps = -1e-8", "optimizer.eps"),
        (
            "optimizer = { kind = \"rmsprop\", alpha = -0.1 }",
            "optimizer.alpha",
        ),
        (
            "optimizer = { kind = \"rmsprop\", eps = 0.0 }",
            "optimizer.eps",
        ),
        ("optimizer.max_grad_norm = -1.0", "optimizer.max_grad_norm"),
        ("optimizer.weight_decay = inf", "optimizer.weight_decay"),
        ("schedule.warmup_ratio = 1.5", "schedule.warmup_ratio"),
        (
            "schedule = { warmup_ratio = 0.1, warmup_steps = 3 }",
            "schedule.warmup_ratio",
        ),
        ("train = { epochs = 1, steps = 3 }", "train.epochs"),
        ("train.steps = 0", "train.steps"),
        ("train.batch_pairs = 0", "train.batch_pairs"),
        ("train.micro_batch_tokens = 0", "train.micro_batch_tokens"),
        ("evaluate.every_steps = 0", "evaluate.every_steps"),
        ("evaluate.batch_pairs = 0", "evaluate.batch_pairs"),
    ] {
        let error = parse(lines).unwrap().validate().expect_err(lines);
        assert_eq!(error.key, key, "{lines}: {error}");
        assert!(!error.reason.is_empty());
    }
}

#[test]
fn unknown_keys_are_refused() {
    for lines in [
        "sed = 1",
        "model.paht = \"m\"",
        "optimizer.lr = 1.0",
        "optimizer.alpha = 0.9",
        "optimizer = { kind = \"rmsprop\", betas = [0.9, 0.99] }",
        "objective = { kind = \"sft\", beta = 0.1 }",
    ] {
        assert!(parse(lines).is_err(), "{lines}");
    }
}

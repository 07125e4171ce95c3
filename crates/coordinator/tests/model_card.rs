//! The model card of a completed run: what it says, and when it is written; and which step's weights it is exported with.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use checkpoint::{ExportDtype, Kind, ManifestInfo, Piece, SHARD_BYTES_MAX, TensorSpec, TrainState};
use coordinator::{
    config::{Config, Sources},
    finish::{Finished, finish},
    model_card::ModelCard,
    run_directory::RunDirectory,
    summary::{Artifacts, Ending, ReferenceCounts, Summary, Totals},
};
use protocol::{
    CommitRecord, EvaluationRow, Generation, Incarnation, MetricsRow, Outcome, Phases, Record,
    RunFacts, Statistics, Step, StepReport,
};

const STEPS: u64 = 2;

fn config(set: &[&str]) -> Config {
    let sources = Sources {
        set: set.iter().map(|text| (*text).into()).collect(),
        ..Sources::default()
    };
    Config::load(&sources).unwrap()
}

fn configured(more: &[&str]) -> Config {
    let mut set = vec![
        "job.name=stories",
        "job.seed=7",
        "model.path=/somewhere/models/stories260k",
        "model.dtype=f32",
        "data.train=['../data/train.jsonl', 'more.jsonl']",
        "data.eval=['test.jsonl']",
        "data.max_length=512",
        "data.truncation=keep_start",
        "data.shuffle=true",
        "objective.kind=cal_dpo",
        "objective.beta=0.1",
        "objective.calibration_weight=1.0",
        "optimizer.learning_rate=5e-7",
        "optimizer.betas=[0.9, 0.999]",
        "optimizer.eps=1e-8",
        "optimizer.weight_decay=0.0",
        "optimizer.max_grad_norm=1.0",
        "schedule.kind=cosine",
        "schedule.warmup_ratio=0.1",
        "train.batch_pairs=32",
    ];
    // Another objective has other parameters.
    let another = more.iter().any(|text| text.starts_with("objective."));
    set.retain(|text| !(another && text.starts_with("objective.")));
    // So has another optimizer.
    let another = more.iter().any(|text| text.starts_with("optimizer.kind"));
    set.retain(|text| !(another && text.starts_with("optimizer.")));
    set.extend(more);
    config(&set)
}

fn statistics(chosen: f64, rejected: f64) -> Statistics {
    Statistics {
        loss: 12.25,
        loss_pairwise: 0.25,
        loss_calibration: 12.0,
        log_ratios_chosen: chosen,
        log_ratios_rejected: rejected,
        rewards_accuracies: 0.87,
        ..Statistics::default()
    }
}

fn evaluation(step: u64, chosen: f64, rejected: f64) -> EvaluationRow {
    EvaluationRow {
        step,
        pairs: 123,
        statistics: statistics(chosen, rejected),
    }
}

fn row(step: u64) -> MetricsRow {
    MetricsRow {
        report: StepReport {
            step,
            finite: step != 1,
            statistics: statistics(1.5, -2.5),
            tokens: 1000,
            pairs: 32,
            ..StepReport::default()
        },
        tokens_per_second: 2000.0,
        world_size: 2,
        generation: 1,
        seconds: 0.5,
        gpu: protocol::GpuFigures::default(),
        phases: Phases::default(),
    }
}

fn facts() -> RunFacts {
    RunFacts {
        steps_total: STEPS,
        pairs: 1108,
        eval_pairs: 123,
        parameters: 260032,
        model_digest: "aaaa".into(),
        tokenizer_digest: "bbbb".into(),
        data_digest: "cccc".into(),
        committed: 0,
    }
}

fn card(config: &Config, evaluations: &[EvaluationRow]) -> String {
    let metrics: Vec<_> = (1..=STEPS).map(row).collect();
    let ending = Ending {
        outcome: &Outcome::Completed,
        facts: Some(&facts()),
        metrics: &metrics,
        evaluations,
        early_stop: None,
        warnings: &[],
        reference: ReferenceCounts::default(),
        artifacts: Artifacts::default(),
    };
    let summary = Summary::new(config, ending, UNIX_EPOCH);
    let card = ModelCard {
        config,
        summary: &summary,
        step: STEPS,
        seen: Totals::of(&metrics),
        evaluations,
    };
    let text = card.to_string();
    println!("{text}");
    text
}

#[track_caller]
fn check(text: &str, says: &[&str], silent: &[&str]) {
    for part in says {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    for part in silent {
        assert!(!text.contains(part), "`{part}` is in:\n{text}");
    }
}

#[test]
fn the_card_says_what_was_done() {
    let evaluations = [
        evaluation(0, 0.0, 0.0),
        evaluation(1, 1.25, -3.5),
        evaluation(2, 2.68, -4.28),
    ];
    let text = card(&configured(&[]), &evaluations);
    let front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\nbase_model: \"stories260k\"\n\
                 tags:\n- cal-dpo\n---\n\n# stories\n";
    assert!(text.starts_with(front), "{text}");
    let says = [
        "`stories260k` (260,032 parameters) after 2 steps of Cal-DPO",
        "| training | train.jsonl, more.jsonl | 1,108 |",
        "| held out | test.jsonl | 123 |",
        "| digest of the tokenized data | `cccc` |",
        "(r_w − 1/(2β))²",
        "| β | 0.1 |",
        "| targets ±1/(2β) | ±5 nats |",
        "| optimizer | AdamW, betas (0.9, 0.999), eps 1e-8, weight decay 0.0 |",
        "| peak learning rate | 5e-7 |",
        "| schedule | cosine, warmup over 0.1 of the steps |",
        "| pairs seen | 64 |",
        "| skipped steps | 1, ",
        "| chosen | 0 | +2.68 |",
        "| rejected | 0 | −4.28 |",
        "| 1 | +1.25 | −3.5 | +4.75 | 0.870 | 12.2 | 0.25 | 12 |",
        "AutoModelForCausalLM.from_pretrained(folder)",
    ];
    check(&text, &says, &["/somewhere", "../data", "chat template"]);
}

#[test]
fn the_optimizer_is_the_one_that_was_used() {
    let text = card(&configured(&["optimizer.kind=rmsprop"]), &[]);
    let says = ["| optimizer | RMSprop, alpha 0.99, eps 1e-8 |"];
    check(&text, &says, &["AdamW"]);
}

#[test]
fn every_objective_has_its_tag_and_its_equation() {
    let dpo = [
        "objective.kind=dpo",
        "objective.beta=0.05",
        "objective.label_smoothing=0.1",
        "model.reference=/other/base",
        "data.chat_template=/other/chat.jinja",
    ];
    let text = card(&configured(&dpo), &[]);
    let says = [
        "\n- dpo\n",
        "log σ(β·(r_w − r_l))",
        "| ε | 0.1 |",
        "π_ref: `base`",
        "chat.jinja, in place of",
        "No pairs were held out.",
        "batch of 32 training pairs, before its update: chosen +1.5 nats, rejected −2.5 nats",
    ];
    check(&text, &says, &["targets", "/other", "calibration |"]);
    let text = card(
        &configured(&["objective.kind=sft"]),
        &[evaluation(0, 0.0, 0.0)],
    );
    let says = ["\n- sft\n", "| 0 | 12.2 |", "rows seen"];
    check(&text, &says, &["Reward", "π_ref", "accuracy"]);
    let text = card(&configured(&["objective.kind=simpo"]), &[]);
    let says = [
        "\n- simpo\n",
        "arxiv.org/abs/2405.14734), equation 6",
        "| γ | 0.5 |",
        "pairs seen",
    ];
    check(&text, &says, &["π_ref", "targets"]);
    let mix = [
        "objective.kind=mix",
        "objective.parts=[{kind=\"ipo\",calibration_weight=2.0},{kind=\"sft\",weight=0.5}]",
    ];
    let text = card(&configured(&mix), &[]);
    let says = [
        "\n- mix\n",
        "A sum of 2:",
        "1.0 × [calibrated IPO](https://arxiv.org/abs/2412.14516)",
        "| λ | 2.0 |",
        "0.5 × supervised fine-tuning",
        "| targets ±1/(2β) | ±5 nats |",
        "π_ref: ",
    ];
    check(&text, &says, &[]);
}

/// A completed run of one tensor, with everything that its end needs.
struct Ended {
    folder: tempfile::TempDir,
    config: Config,
}

impl Ended {
    fn new() -> Self {
        Self::with(&[], &[])
    }

    /// With evaluations, the last of which may have ended it.
    fn with(more: &[&str], evaluations: &[EvaluationRow]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("base");
        fs::create_dir(&model).unwrap();
        fs::write(model.join("config.json"), "{}").unwrap();
        fs::write(model.join("README.md"), "the base model's card").unwrap();
        let output = format!("job.output={}", folder.path().join("run").display());
        let model = format!("model.path={}", model.display());
        let config = configured(&[&[&*output, &*model], more].concat());
        let ended = Self { folder, config };
        for step in 1..=STEPS {
            ended.save(step);
        }
        let mut directory = ended.open();
        let generation = Record::Generation {
            generation: Generation(1),
            members: vec![Incarnation(1)],
        };
        directory.journal(&generation).unwrap();
        for step in 1..=STEPS {
            let row = row(step);
            let commit = Record::Commit(CommitRecord { apply: true, row });
            directory.journal(&commit).unwrap();
            directory.record_step(row).unwrap();
        }
        let selection = ended.config.selection();
        for (index, row) in evaluations.iter().enumerate() {
            let rows = &evaluations[..=index];
            let stop = selection.as_ref().and_then(|it| it.early_stop(rows));
            directory.record_evaluation(*row, &[]).unwrap();
            let record = Record::Evaluation { row: *row, stop };
            directory.journal(&record).unwrap();
        }
        drop(directory);
        ended
    }

    fn summary(&self) -> serde_json::Value {
        serde_json::from_str(&read(&self.config.job.output.join("summary.json"))).unwrap()
    }

    fn open(&self) -> RunDirectory {
        let (config, output) = (&self.config, &self.config.job.output);
        let opened = RunDirectory::open(output, &config.identity, &config.to_toml());
        opened.unwrap().directory
    }

    fn save(&self, step: u64) {
        let dir = &self.config.checkpoint.path;
        let state = TrainState {
            step,
            epoch: 0,
            updates: step,
            seed: 7,
            shift: None,
        };
        let tensors = [TensorSpec {
            name: "weight".into(),
            shape: vec![2],
        }];
        let pieces = [Kind::Weight, Kind::FirstMoment, Kind::SecondMoment].map(|kind| Piece {
            tensor: "weight",
            kind,
            start: 0,
            values: &[1.0, 2.0],
        });
        let rank = checkpoint::write_rank(dir, 1, 0, 1, state, &tensors, pieces).unwrap();
        let info = ManifestInfo {
            model_digest: "aaaa".into(),
            tokenizer_digest: "bbbb".into(),
            data_digest: "cccc".into(),
            run_digest: self.config.run_digest(),
            tool_version: "0".into(),
        };
        checkpoint::commit(dir, &[rank], &info).unwrap();
    }

    fn finish(&self, outcome: &Outcome) {
        let finished = Finished {
            outcome,
            facts: Some(&facts()),
            references: ReferenceCounts::default(),
            same_command: "coordinator stories.toml",
        };
        finish(&self.config, &mut self.open(), &finished).unwrap();
    }

    /// As `checkpoint export` does.
    fn export_by_hand(&self, step: u64) {
        let checkpoint = self.config.checkpoint.path.join(format!("step-{step:08}"));
        let model = self.folder.path().join("base");
        let out = self.config.job.output.join("export");
        checkpoint::export(&checkpoint, &model, &out, ExportDtype::F32, SHARD_BYTES_MAX).unwrap();
    }

    fn card(&self) -> PathBuf {
        self.config.job.output.join("export/README.md")
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_completed_run_leaves_a_card_beside_its_model_and_never_writes_over_it() {
    let run = Ended::new();
    run.finish(&Outcome::Completed);
    check(
        &read(&run.card()),
        &["# stories", "base_model: \"base\""],
        &["the base model's card"],
    );
    fs::write(run.card(), "more by hand").unwrap();
    run.finish(&Outcome::Completed);
    assert_eq!(read(&run.card()), "more by hand");
}

#[test]
fn exporting_again_is_not_kept_from_by_a_card_and_the_next_start_writes_it_anew() {
    let run = Ended::new();
    run.finish(&Outcome::Completed);
    run.export_by_hand(STEPS);
    assert!(!run.card().exists(), "the folder was replaced");
    run.finish(&Outcome::Completed);
    check(&read(&run.card()), &["# stories"], &[]);
}

#[test]
fn weights_of_another_step_get_no_card() {
    let run = Ended::new();
    run.finish(&Outcome::Completed);
    run.export_by_hand(1);
    run.finish(&Outcome::Completed);
    assert!(!run.card().exists());
}

#[test]
fn a_run_that_did_not_complete_has_no_card() {
    let run = Ended::new();
    let committed = Step(STEPS);
    run.finish(&Outcome::Interrupted { committed });
    assert!(!run.card().exists());
}

/// A run of 2 steps in which step 1 was the best.
fn compared(more: &[&str]) -> Ended {
    let set = [
        &[
            "evaluate.metric=log_ratios/chosen",
            "evaluate.every_steps=1",
        ],
        more,
    ]
    .concat();
    let evaluations = [
        evaluation(0, 0.0, 0.0),
        evaluation(1, 3.5, -1.0),
        evaluation(2, 1.5, -2.0),
    ];
    Ended::with(&set, &evaluations)
}

#[test]
fn the_best_step_is_exported_where_it_is_kept_and_the_card_is_of_it() {
    let run = compared(&["checkpoint.keep_best=true"]);
    run.finish(&Outcome::Completed);
    let says = [
        "`base` (260,032 parameters) after 1 step of Cal-DPO",
        "The run's checkpoint of step 1, of 2, exported: of its evaluations the one with the best `log_ratios/chosen`, 3.5000",
        "| steps | 1 (the run went on to 2) |",
        "| pairs seen | 32 |",
        "| tokens seen | 1,000 |",
        "| chosen | 0 | +3.5 |",
        "| 1 (these weights) | +3.5 |",
        "| 2 | +1.5 |",
    ];
    check(&read(&run.card()), &says, &["last checkpoint", "early"]);
    let summary = run.summary();
    assert_eq!(summary["export_step"], 1);
    assert_eq!(summary["best"]["value"], 3.5);
    let best = summary["best_checkpoint"].as_str().unwrap();
    assert!(best.ends_with("step-00000001"), "{best}");
}

#[test]
fn without_keeping_the_best_the_last_step_is_exported() {
    let run = compared(&[]);
    run.finish(&Outcome::Completed);
    let says = [
        "The run's last checkpoint, exported;",
        "| chosen | 0 | +1.5 |",
        "| steps | 2 |",
    ];
    check(&read(&run.card()), &says, &["these weights"]);
    assert_eq!(run.summary()["export_step"], 2);
    assert_eq!(run.summary()["best_checkpoint"], serde_json::Value::Null);
}

#[test]
fn early_stopping_keeps_the_best_by_itself_and_the_card_says_why_training_ended() {
    let run = compared(&["evaluate.early_stopping_patience=1"]);
    // The evaluation of step 2 is the one that decides, and the run ended with it: not by it.
    run.finish(&Outcome::Completed);
    assert_eq!(run.summary()["early_stop"], serde_json::Value::Null);
    assert_eq!(run.summary()["export_step"], 1);

    let ended = Ended::with(
        &[
            "evaluate.metric=loss",
            "evaluate.every_steps=1",
            "evaluate.early_stopping_patience=1",
        ],
        &[evaluation(0, 0.0, 0.0), {
            let mut row = evaluation(1, 1.0, -1.0);
            row.statistics.loss = f64::INFINITY;
            row
        }],
    );
    ended.finish(&Outcome::Completed);
    let says = ["Training ended early, with step 2 of 2: loss was not finite in 1 evaluation."];
    check(&read(&ended.card()), &says, &[]);
    assert_eq!(ended.summary()["early_stop"]["decision"]["step"], 1);
    assert_eq!(ended.summary()["export_step"], 2, "there is no best");
}

#[test]
fn where_the_best_could_not_be_saved_the_best_that_is_there_is_exported() {
    let run = compared(&["checkpoint.keep_best=true"]);
    let folder = run.config.checkpoint.path.join("step-00000001");
    fs::remove_dir_all(folder).unwrap();
    run.finish(&Outcome::Completed);
    assert_eq!(run.summary()["export_step"], 2);
    assert_eq!(run.summary()["best"]["step"], 1);
    check(
        &read(&run.card()),
        &["The run's last checkpoint, exported;"],
        &[],
    );
}

#[test]
fn a_damaged_best_checkpoint_is_refused_with_the_way_to_the_last_one() {
    let run = compared(&["checkpoint.keep_best=true"]);
    let folder = run.config.checkpoint.path.join("step-00000001");
    let rank = fs::read_dir(folder).unwrap().map(|it| it.unwrap().path());
    let rank = rank
        .into_iter()
        .find(|it| it.extension().is_some_and(|it| it == "safetensors"));
    let rank = rank.unwrap();
    let mut bytes = fs::read(&rank).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    let weight = bytes.len() - 3 * 8;
    bytes[weight] ^= 1;
    fs::write(&rank, bytes).unwrap();
    let finished = Finished {
        outcome: &Outcome::Completed,
        facts: Some(&facts()),
        references: ReferenceCounts::default(),
        same_command: "coordinator stories.toml",
    };
    let error = finish(&run.config, &mut run.open(), &finished).unwrap_err();
    let text = format!("{error:#}");
    check(
        &text,
        &[
            "step 1 is the best that was kept",
            "checkpoint.keep_best=false",
            "step-00000001",
        ],
        &[],
    );
    assert!(!run.card().exists());
}

#[test]
fn an_earlier_step_that_was_evaluated_and_exported_by_hand_has_a_card_of_its_own() {
    let run = compared(&[]);
    run.finish(&Outcome::Completed);
    run.export_by_hand(1);
    run.finish(&Outcome::Completed);
    let says = [
        "The run's checkpoint of step 1, of 2, exported: of its evaluations",
        "| chosen | 0 | +3.5 |",
    ];
    check(&read(&run.card()), &says, &["last checkpoint"]);
    assert_eq!(run.summary()["export_step"], 1);
}

//! Early stopping and the best checkpoint through the real programs: what such a run leaves behind, and that whatever
//! interrupts it changes nothing (invariant T3).

use std::fs;
use std::sync::OnceLock;

use serde_json::Value;
use tests::programs::{Run, SMALL, assert_same_rows, text};

/// DPO lifts the chosen letters first and then lets them fall: evaluations at 4, 8, 12, … have their best early.
fn config() -> String {
    let replaced = [
        ("kind = \"cal_dpo\"", "kind = \"dpo\""),
        ("steps = 24", "steps = 60"),
        (
            "every_steps = 8",
            "every_steps = 4\nmetric = \"log_ratios/chosen\"\nearly_stopping_patience = 2",
        ),
        ("every_steps = 5", "every_steps = 5\nkeep_last = 1"),
    ];
    let mut config = SMALL.to_owned();
    for (from, to) in replaced {
        assert!(config.contains(from), "{from}");
        config = config.replacen(from, to, 1);
    }
    config
}

/// What an uninterrupted run comes to.
struct Expected {
    training: Vec<Value>,
    evaluations: Vec<Value>,
    samples: Vec<Value>,
    exported: Vec<u8>,
    early_stop: Value,
    best: usize,
}

impl Expected {
    fn of(run: &Run) -> Self {
        let summary = run.summary();
        Self {
            training: run.training(),
            evaluations: run.rows("eval.jsonl"),
            samples: run.rows("samples.jsonl"),
            exported: run.exported(),
            early_stop: summary["early_stop"].clone(),
            best: summary["best"]["step"].as_u64().expect("a best step") as usize,
        }
    }

    fn check(&self, run: &Run) {
        assert_same_rows("metrics.jsonl", &run.training(), &self.training);
        assert_same_rows("eval.jsonl", &run.rows("eval.jsonl"), &self.evaluations);
        assert_same_rows("samples.jsonl", &run.rows("samples.jsonl"), &self.samples);
        assert!(run.exported() == self.exported, "the exports differ");
        let summary = run.summary();
        assert_eq!(summary["early_stop"], self.early_stop);
        assert_eq!(summary["best"]["step"], self.best);
        assert_eq!(run.checkpoints(), [self.best, self.training.len()]);
    }
}

fn expected() -> &'static Expected {
    static EXPECTED: OnceLock<Expected> = OnceLock::new();
    EXPECTED.get_or_init(|| {
        let run = Run::new(&config());
        let output = run.complete();
        let expected = Expected::of(&run);
        tell(&run, &text(&output), &expected);
        expected
    })
}

/// The run says everywhere that it ended early, when, why, and whose weights it exports.
fn tell(run: &Run, said: &str, expected: &Expected) {
    let (steps, best) = (expected.training.len(), expected.best);
    assert!(steps < 60 && best < steps - 1, "{best} of {steps}");
    // The deciding evaluation is the one before the last step, and two after the best.
    assert_eq!(expected.early_stop["decision"]["step"], steps - 1);
    assert_eq!(best + 2 * 4, steps - 1);
    let reason = expected.early_stop["reason"].as_str().expect("a reason");
    let summary = run.summary();
    assert_eq!(summary["outcome"], "completed");
    assert_eq!(summary["facts"]["steps_total"], 60);
    assert_eq!(summary["export_step"], best);
    let said: String = said.split_whitespace().collect::<Vec<_>>().join(" ");
    for words in [
        format!("ended early, with step {steps} of 60: {reason}"),
        format!("exported: the weights of step {best}, the best evaluated one"),
    ] {
        assert!(said.contains(&words), "no `{words}` in: {said}");
    }
    let events = run.rows("events.jsonl");
    let event = events.iter().find(|event| event["kind"] == "early-stop");
    let event = event.expect("an event")["text"].as_str();
    assert_eq!(
        event,
        Some(&*format!("training ends early with step {steps}: {reason}"))
    );
    let card = fs::read_to_string(run.path("export/README.md")).expect("a card");
    for words in [
        format!("Training ended early, with step {steps} of 60: {reason}."),
        format!(
            "The run's checkpoint of step {best}, of {steps}, exported: of its evaluations the one with the best"
        ),
        format!("| steps | {best} (the run went on to {steps}) |"),
    ] {
        assert!(card.contains(&words), "no `{words}` in: {card}");
    }
    // The best evaluation is the best of the rows, whoever reads them.
    let value = |row: &Value| row["log_ratios/chosen"].as_f64().expect("a number");
    let rows = expected.evaluations.iter().skip(1);
    let highest = rows.max_by(|one, other| value(one).total_cmp(&value(other)));
    assert_eq!(highest.expect("evaluations")["step"], best);
    let sampled: Vec<_> = expected.samples.iter().map(|row| &row["step"]).collect();
    let evaluated: Vec<_> = expected
        .evaluations
        .iter()
        .map(|row| &row["step"])
        .collect();
    assert_eq!(
        sampled, evaluated,
        "any of them may be the one that is exported"
    );
}

#[test]
fn a_run_stops_early_says_so_everywhere_and_exports_its_best_step() {
    // The run is made, and looked at, by whoever comes first.
    expected();
}

#[test]
fn the_export_is_the_checkpoint_of_the_best_step() {
    let run = Run::new(&config()).set("evaluate.early_stopping_patience=1");
    run.complete();
    let best = run.summary()["best"]["step"].as_u64().expect("a step") as usize;
    let by_hand = run.folder().join("by-hand");
    let output = std::process::Command::new(tests::programs::program("checkpoint"))
        .current_dir(tests::workspace_root())
        .arg("export")
        .arg(run.checkpoint(best))
        .args(["--model", "configs/quickstart/reference", "--out"])
        .arg(&by_hand)
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{}", text(&output));
    let weights = fs::read(by_hand.join("model.safetensors")).expect("an export");
    assert!(
        run.exported() == weights,
        "it is not the best step's weights"
    );
}

#[test]
fn a_run_that_stopped_early_is_left_alone_by_the_same_command() {
    let run = Run::new(&config());
    run.complete();
    let files = ["metrics.jsonl", "eval.jsonl", "events.jsonl", "journal.log"];
    let read = || files.map(|name| fs::read(run.path(name)).expect("a file of the run"));
    let before = read();
    let said = text(&run.complete());
    assert!(said.contains("ended early"), "{said}");
    for ((name, before), after) in files.iter().zip(&before).zip(&read()) {
        assert!(before == after, "{name} changed");
    }
    expected().check(&run);
}

/// Starts a run, waits until `ready`, kills everything and runs it again to its end.
fn killed(what: &str, mut ready: impl FnMut(&Run) -> bool) {
    let expected = expected();
    let run = Run::new(&config());
    let mut coordinator = run.start();
    coordinator.wait_until(what, || ready(&run));
    coordinator.kill_everything();
    run.complete();
    expected.check(&run);
}

fn evaluations(run: &Run) -> usize {
    run.rows("eval.jsonl").len()
}

#[test]
fn t3_a_run_killed_around_its_best_evaluation_ends_in_the_same_bits() {
    let best = expected().best;
    killed("the best checkpoint", |run| {
        run.checkpoints().contains(&best)
    });
    killed("the best evaluation", |run| evaluations(run) > best / 4);
}

#[test]
fn t3_a_run_killed_around_the_deciding_evaluation_ends_in_the_same_bits() {
    let count = expected().evaluations.len();
    // The deciding one is the last but one; its checkpoint follows, then the last step with its own.
    killed("the deciding evaluation", |run| {
        evaluations(run) + 1 >= count
    });
    let decided = expected().training.len() - 1;
    killed("its checkpoint", |run| run.checkpoints().contains(&decided));
    killed("the last row", |run| run.metrics().len() > decided);
    killed("the last evaluation", |run| evaluations(run) >= count);
}

#[test]
fn t3_a_run_that_is_stopped_and_goes_on_ends_early_all_the_same() {
    let expected = expected();
    let run = Run::new(&config());
    let decided = expected.training.len() - 1;
    // Rows come before their evaluations: the stop is asked for in the step that the deciding evaluation follows.
    for rows in [expected.best, decided - 1] {
        let mut coordinator = run.start();
        coordinator.wait_until("rows", || run.metrics().len() >= rows);
        coordinator.signal("INT");
        coordinator.wait();
    }
    run.complete();
    expected.check(&run);
}

#[test]
fn the_rule_may_change_between_starts_of_a_run() {
    let expected = expected();
    let run = Run::new(&config());
    let mut coordinator = run.start();
    coordinator.wait_until("evaluations", || evaluations(&run) > 2);
    coordinator.kill_everything();
    let run = run.set("evaluate.early_stopping_patience=50");
    run.complete();
    let (training, summary) = (run.training(), run.summary());
    assert_eq!(training.len(), 60, "it goes on to the end of its schedule");
    let common = expected.training.len();
    assert_same_rows("metrics.jsonl", &training[..common], &expected.training);
    assert_eq!(summary["early_stop"], Value::Null);
    assert_eq!(summary["best"]["step"], expected.best);
    assert_eq!(run.checkpoints(), [expected.best, 60]);
}

#[test]
fn without_keeping_it_the_best_is_known_and_the_last_step_exported() {
    let run = Run::new(&config()).set("checkpoint.keep_best=false");
    run.complete();
    let expected = expected();
    let summary = run.summary();
    let last = expected.training.len();
    assert_eq!(
        run.training(),
        expected.training,
        "it stops at the same step"
    );
    assert_eq!(summary["best"]["step"], expected.best);
    assert_eq!(summary["export_step"], last);
    assert_eq!(run.checkpoints(), [last]);
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_written() {
    let rows: [(&[&str], &[&str]); 5] = [
        (
            &["evaluate.metric=rewards/acuracies"],
            &["evaluate.metric", "did you mean `rewards/accuracies`"],
        ),
        (
            &["evaluate.metric=rewards/rejected"],
            &["evaluate.higher_is_better", "true or false"],
        ),
        (&["data.eval=[]"], &["evaluate.metric", "data.eval"]),
        (
            &["evaluate.early_stopping_patience=0"],
            &["evaluate.early_stopping_patience", "at least 1"],
        ),
        (
            &["objective.kind=sft"],
            &["evaluate.metric", "take \"loss\""],
        ),
    ];
    for (set, words) in rows {
        let mut run = Run::new(&config().replace("beta = 0.1", ""));
        for assignment in set {
            run = run.set(assignment);
        }
        let output = run.output();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        for word in words {
            assert!(said.contains(word), "no `{word}` in: {said}");
        }
        assert!(!run.path("run.json").exists(), "{set:?}");
    }
    let run = Run::new(SMALL).set("checkpoint.keep_best=true");
    let output = run.output();
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output);
    assert!(
        said.contains("checkpoint.keep_best") && said.contains("evaluate.metric = "),
        "{said}"
    );
}

//! The best evaluation, early stopping and the checkpoint that is kept: the rule by itself, in a job, and over restarts.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod support;

use protocol::{
    Action, Best, CoordinatorMessage, EvaluationRow, Event, Generation, JobPolicy, Metric, Outcome,
    Record, Recovery, RunFacts, Selection, Statistics, Step, Waiting, WorkerMessage, early_stop,
    recover,
};
use support::{
    Play, checkpoint_committed, commit, facts, journaled, notes, outcome, place, policy, told,
};

const NAN: f64 = f64::NAN;

fn selection(name: &str, higher_is_better: bool, patience: Option<u64>) -> Selection {
    Selection {
        metric: Metric::named(name).unwrap(),
        higher_is_better,
        patience,
        min_delta: 0.0,
        keep_best: true,
    }
}

fn accuracy(patience: u64) -> Selection {
    selection("rewards/accuracies", true, Some(patience))
}

fn row(step: u64, value: f64) -> EvaluationRow {
    EvaluationRow {
        step,
        pairs: 8,
        statistics: Statistics {
            rewards_accuracies: value,
            loss: value,
            ..Statistics::default()
        },
    }
}

/// Evaluations of steps 0, 10, 20, …
fn rows(values: &[f64]) -> Vec<EvaluationRow> {
    let steps = (0..).step_by(10);
    steps
        .zip(values)
        .map(|(step, value)| row(step, *value))
        .collect()
}

#[test]
fn a_metric_is_known_by_its_name_in_the_rows_and_reads_its_own_value() {
    let statistics = Statistics::from_values(std::array::from_fn(|index| index as f64));
    for (name, value) in statistics.values() {
        let metric = Metric::named(name).unwrap();
        assert_eq!((metric.name(), metric.of(&statistics)), (name, value));
    }
    for other in ["", "rewards", "accuracy", "step", "grad_norm"] {
        assert_eq!(Metric::named(other), None, "{other}");
    }
}

#[test]
fn the_best_is_the_best_of_trained_weights_and_the_earliest_of_equals() {
    let check = |higher, values: &[f64], expected: &[u64]| {
        let selection = selection("loss", higher, None);
        let ranking = selection.ranking(&rows(values));
        let expected: Vec<_> = expected.iter().map(|step| Step(*step)).collect();
        assert_eq!(ranking, expected, "{values:?}, higher is better: {higher}");
        let best = selection.best(&rows(values)).map(|it| Step(it.step));
        assert_eq!(best, expected.first().copied());
    };
    check(true, &[0.5, 0.7, 0.9, 0.8], &[20, 30, 10]);
    check(false, &[0.5, 0.7, 0.9, 0.8], &[10, 30, 20]);
    check(true, &[9.0, 0.7, 0.9, 0.9], &[20, 30, 10]);
    check(false, &[9.0, 0.7, 0.9, 0.7], &[10, 30, 20]);
    check(true, &[0.5, NAN, -0.0, 0.0, f64::INFINITY], &[20, 30]);
    check(true, &[0.5, NAN], &[]);
    check(true, &[0.5], &[]);
    check(true, &[], &[]);
}

/// Hands the evaluations in one by one and says after which of them training ends.
fn stops_after(selection: &Selection, values: &[f64]) -> Option<u64> {
    let all = rows(values);
    let decided = (1..=all.len()).find_map(|count| selection.early_stop(&all[..count]));
    decided.map(|stop| stop.step)
}

#[test]
fn training_ends_when_the_patience_is_over_and_never_before() {
    let higher = |patience, values: &[f64]| stops_after(&accuracy(patience), values);
    assert_eq!(
        higher(2, &[0.5, 0.7, 0.6, 0.7]),
        Some(30),
        "an equal value is no gain"
    );
    assert_eq!(higher(2, &[0.5, 0.7, 0.6, 0.8, 0.7, 0.9]), None);
    assert_eq!(higher(1, &[0.5, 0.7, 0.6]), Some(20));
    assert_eq!(higher(3, &[0.5, 0.7, 0.6, 0.5]), None);
    assert_eq!(higher(1, &[0.9, 0.7, 0.8]), None, "step 0 does not count");
    assert_eq!(higher(1, &[0.9]), None, "step 0 does not count");
    assert_eq!(higher(2, &[0.5, NAN, NAN]), Some(20));
    assert_eq!(higher(2, &[0.5, NAN, 0.1, NAN, 0.2]), None);
    let lower = selection("loss", false, Some(2));
    assert_eq!(stops_after(&lower, &[9.0, 5.0, 6.0, 5.0]), Some(30));
    assert_eq!(stops_after(&lower, &[9.0, 5.0, 6.0, 4.0]), None);
    assert_eq!(
        stops_after(&selection("loss", false, None), &[1.0, 2.0, 3.0]),
        None
    );
}

#[test]
fn gains_up_to_the_least_that_counts_add_up() {
    let selection = Selection {
        min_delta: 0.25,
        ..accuracy(2)
    };
    // Each gain is too small for itself; 1.375 is more than 0.25 above 1.0.
    assert_eq!(
        stops_after(&selection, &[0.0, 1.0, 1.25, 1.375, 1.5, 1.625]),
        Some(50)
    );
    assert_eq!(stops_after(&selection, &[0.0, 1.0, 1.25, 1.25]), Some(30));
    let best = selection.best(&rows(&[0.0, 1.0, 1.25, 1.25])).unwrap();
    let expected = Best {
        step: 20,
        value: 1.25,
    };
    assert_eq!(best, expected, "the best is the best by any gain");
}

#[test]
fn the_reason_has_the_numbers() {
    let says = |selection: &Selection, values: &[f64]| {
        let stop = selection.early_stop(&rows(values)).unwrap();
        let json = serde_json::to_string(&stop).unwrap();
        let back: protocol::EarlyStop = serde_json::from_str(&json).unwrap();
        assert_eq!(back.to_string(), stop.to_string(), "{json}");
        stop.to_string()
    };
    assert_eq!(
        says(&accuracy(2), &[0.5, 0.75, 0.5, 0.625]),
        "rewards/accuracies has not come above its 0.7500 of step 10 in 2 evaluations (0.6250 at step 30)"
    );
    let selection = Selection {
        min_delta: 0.1,
        ..selection("loss", false, Some(1))
    };
    assert_eq!(
        says(&selection, &[3.0, 2.0, 1.95]),
        "loss has not come below its 2.0000 of step 10 by more than 0.1 in 1 evaluation (1.9500 at step 20)"
    );
    assert_eq!(
        says(&accuracy(2), &[3.0, NAN, NAN]),
        "rewards/accuracies was not finite in 2 evaluations"
    );
}

// In a job.

fn held_out(steps_total: u64, committed: u64) -> RunFacts {
    RunFacts {
        eval_pairs: 8,
        ..facts(steps_total, committed)
    }
}

/// Evaluates and, for `keep_best`, saves every second step.
fn evaluating(selection: Option<Selection>) -> JobPolicy {
    JobPolicy {
        evaluate_every: Some(2),
        selection,
        ..policy(2)
    }
}

/// A job in its first step of 20, with held-out pairs; rank 0 has evaluated the starting weights.
fn training(selection: Option<Selection>) -> Play {
    let mut play = ready(evaluating(selection), Recovery::default(), 20);
    play.evaluate(0, 0.5);
    play
}

fn ready(policy: JobPolicy, recovery: Recovery, steps_total: u64) -> Play {
    let mut play = Play::new(policy, recovery).0;
    play.join_all();
    let facts = held_out(steps_total, play.job.committed().0);
    for incarnation in 1..=play.world {
        play.ready(incarnation, facts.clone());
    }
    play
}

impl Play {
    fn evaluate(&mut self, step: u64, value: f64) -> Vec<Action> {
        let message = WorkerMessage::Evaluated {
            row: row(step, value),
            samples: vec![],
        };
        self.say(1, message)
    }

    /// Two steps with the evaluation of the second.
    fn round(&mut self, value: f64) -> Vec<Action> {
        let mut actions = self.step(true);
        actions.extend(self.step(true));
        let step = self.job.committed().0;
        actions.extend(self.evaluate(step, value));
        actions
    }
}

/// `save, evaluate, last` of each commit.
fn verdicts(actions: &[Action]) -> Vec<(bool, bool, bool)> {
    let commits = told(actions).into_iter().filter(|(to, _)| *to == 1);
    commits
        .filter_map(|(_, message)| match message {
            CoordinatorMessage::Commit {
                save,
                evaluate,
                last,
                ..
            } => Some((save, evaluate, last)),
            _ => None,
        })
        .collect()
}

#[test]
fn a_run_that_stops_early_saves_and_evaluates_one_more_step_and_is_complete() {
    let mut play = training(Some(accuracy(2)));
    for value in [0.75, 0.5] {
        play.round(value);
        play.checkpoint(play.job.committed().0);
    }
    let stopping = play.round(0.625);
    let notes: Vec<_> = stopping
        .iter()
        .filter_map(|it| match it {
            Action::Note(note) => Some((note.kind, note.text.as_str())),
            _ => None,
        })
        .collect();
    let text = "training ends early with step 7: rewards/accuracies has not come above its 0.7500 of step 2 in \
                2 evaluations (0.6250 at step 6)";
    assert_eq!(notes, [("early-stop", text)]);
    assert_eq!(verdicts(&play.step(true)), [(true, true, true)]);
    play.evaluate(7, 0.7);
    play.checkpoint(7);
    let done = play.finish_all();
    assert_eq!(journaled(&done), [Record::Completed { step: Step(7) }]);
    assert_eq!(outcome(&done), Some(Outcome::Completed));
}

#[test]
fn the_decision_is_journaled_with_its_evaluation_before_the_next_commit() {
    let mut play = training(Some(accuracy(1)));
    let first = play.round(0.75);
    let stops = |actions: &[Action]| -> Vec<bool> {
        let records = journaled(actions).into_iter();
        records
            .filter_map(|it| match it {
                Record::Evaluation { stop, .. } => Some(stop.is_some()),
                _ => None,
            })
            .collect()
    };
    assert_eq!(stops(&first), [false]);
    let second = play.round(0.75);
    assert_eq!(stops(&second), [true]);
    // Its row is in its file before, because a journaled evaluation is not asked for again.
    let evaluation = place(&second, |it| {
        matches!(it, Action::Journal(Record::Evaluation { .. }))
    });
    let recorded = place(&second, |it| matches!(it, Action::RecordEvaluation { .. }));
    assert!(recorded < evaluation);
}

#[test]
fn a_step_commits_only_when_the_evaluation_before_it_is_known() {
    // With a rule or without: eval.jsonl has the same rows either way.
    for selection in [None, Some(accuracy(1))] {
        let mut play = ready(evaluating(selection), Recovery::default(), 20);
        assert_eq!(play.step(true), [], "step 0 is being evaluated");
        assert_eq!(play.job.waiting(), Waiting::Evaluated { step: Step(0) });
        assert_eq!(
            play.job.waiting().to_string(),
            "waiting for the evaluation of step 0"
        );
        assert_eq!(play.step(true), [], "votes cast again");
        let actions = play.evaluate(0, 0.5);
        let commits = |actions: &[Action]| {
            let records = journaled(actions).into_iter();
            records.filter(|it| matches!(it, Record::Commit(_))).count()
        };
        assert_eq!((commits(&actions), play.job.committed()), (1, Step(1)));
        play.step(true);
        assert_eq!(commits(&play.step(true)), 0);
        assert_eq!(play.evaluate(0, 0.5), [], "said again");
        assert_eq!(commits(&play.evaluate(2, 0.5)), 1);
        assert_eq!(play.job.committed(), Step(3));
    }
}

#[test]
fn a_run_without_held_out_pairs_waits_for_no_evaluation() {
    let policy = JobPolicy {
        evaluate_every: Some(1),
        ..policy(1)
    };
    let mut play = Play::stepping(policy, 2);
    play.step(true);
    assert_eq!(verdicts(&play.step(true)), [(true, true, true)]);
    play.checkpoint(2);
    assert_eq!(outcome(&play.finish_all()), Some(Outcome::Completed));
}

#[test]
fn every_evaluated_step_is_saved_where_the_best_is_kept() {
    let asked = |selection| {
        let mut play = training(selection);
        let mut verdicts_of_all = Vec::new();
        for value in [0.6, 0.7] {
            verdicts_of_all.extend(verdicts(&play.round(value)));
        }
        verdicts_of_all
            .into_iter()
            .map(|it| (it.0, it.1))
            .collect::<Vec<_>>()
    };
    let both = (true, true);
    let neither = (false, false);
    assert_eq!(asked(Some(accuracy(9))), [neither, both, neither, both]);
    let only_stopping = Selection {
        keep_best: false,
        ..accuracy(9)
    };
    let evaluated = (false, true);
    assert_eq!(
        asked(Some(only_stopping)),
        [neither, evaluated, neither, evaluated]
    );
    assert_eq!(asked(None), [neither, evaluated, neither, evaluated]);
}

/// `step` and `best_first` of each checkpoint that is to be published.
fn published(actions: &[Action]) -> Vec<(u64, Vec<u64>)> {
    let publish = actions.iter().filter_map(|it| match it {
        Action::CommitCheckpoint {
            step, best_first, ..
        } => Some((step.0, best_first.iter().map(|it| it.0).collect())),
        _ => None,
    });
    publish.collect()
}

#[test]
fn a_checkpoint_is_published_with_its_evaluation_and_the_best_steps_so_far() {
    let mut play = training(Some(accuracy(9)));
    play.step(true);
    play.step(true);
    let saved: Vec<_> = [1, 2].iter().flat_map(|it| play.save(*it, 2)).collect();
    assert_eq!(saved, [], "its evaluation is not known yet");
    assert_eq!(published(&play.evaluate(2, 0.7)), [(2, vec![2])]);
    play.round(0.6);
    assert_eq!(published(&play.checkpoint(4)), [(4, vec![2, 4])]);
    play.round(0.8);
    assert_eq!(published(&play.checkpoint(6)), [(6, vec![6, 2, 4])]);
}

#[test]
fn a_job_ends_only_when_its_best_checkpoint_is_visible_too() {
    let ends = |event: Event| {
        let mut play = ready(evaluating(Some(accuracy(9))), Recovery::default(), 5);
        play.evaluate(0, 0.5);
        play.round(0.9);
        play.round(0.6);
        play.step(true);
        play.evaluate(5, 0.6);
        play.save(1, 2);
        // Step 4 is neither the best nor the last.
        assert_eq!(told(&play.checkpoint(5)), []);
        assert_eq!(
            play.job.waiting().to_string(),
            "waiting for rank 1 to save step 2"
        );
        assert_eq!(published(&play.save(2, 2)), [(2, vec![2, 4, 5])]);
        assert_eq!(play.job.waiting(), Waiting::Checkpoint { step: Step(2) });
        let actions = play.event(event);
        assert!(
            told(&actions)
                .iter()
                .all(|it| it.1 == CoordinatorMessage::Finish)
        );
        outcome(&play.finish_all())
    };
    let step = Step(2);
    assert_eq!(ends(checkpoint_committed(step.0)), Some(Outcome::Completed));
    let reason = "the disk is full".into();
    assert_eq!(
        ends(Event::CheckpointFailed { step, reason }),
        Some(Outcome::Completed)
    );
}

#[test]
fn where_only_the_newest_stay_no_step_is_preferred() {
    let mut play = training(None);
    for value in [0.7, 0.6] {
        play.round(value);
    }
    play.event(Event::StopRequested {
        reason: "ctrl-c".into(),
    });
    play.step(true);
    assert_eq!(published(&play.checkpoint(5)), [(5, vec![])]);
}

#[test]
fn the_last_checkpoint_has_the_time_of_an_evaluation_before_its_own() {
    let mut play = ready(evaluating(None), Recovery::default(), 2);
    play.evaluate(0, 0.5);
    play.step(true);
    play.step(true);
    play.save(1, 2);
    assert_eq!(
        play.job.waiting().to_string(),
        "waiting for rank 1 to save step 2"
    );
    play.save(2, 2);
    assert_eq!(play.job.waiting(), Waiting::Evaluated { step: Step(2) });
    // A step may take 40 s, the last checkpoint 50 s more.
    assert_eq!(outcome(&play.pass(39_000, &[1, 2])), None);
    play.evaluate(2, 0.5);
    assert_eq!(outcome(&play.pass(49_000, &[1, 2])), None);
    assert_eq!(play.job.waiting(), Waiting::Checkpoint { step: Step(2) });
    let late = play.pass(1_000, &[1, 2]);
    assert!(matches!(outcome(&late), Some(Outcome::Failed { .. })));
}

#[test]
fn an_evaluation_that_never_comes_ends_the_generation_with_its_name() {
    let mut play = ready(evaluating(None), Recovery::default(), 20);
    play.step(true);
    let late = play.pass(40_000, &[1, 2]);
    assert_eq!(outcome(&late), None);
    let over = "generation 1 is over after step 0: waiting for the evaluation of step 0 for 40 s; raise the step timeout if \
                that is too short";
    assert_eq!(notes(&late, "abort"), [over]);
}

#[test]
fn an_interrupted_job_decides_too_and_goes_on_to_the_last_step() {
    let mut play = training(Some(accuracy(1)));
    play.round(0.75);
    play.checkpoint(2);
    play.step(true);
    play.event(Event::StopRequested {
        reason: "ctrl-c".into(),
    });
    play.step(true);
    let decided = journaled(&play.evaluate(4, 0.7)).into_iter().next();
    assert!(matches!(
        decided,
        Some(Record::Evaluation { stop: Some(_), .. })
    ));
    play.checkpoint(4);
    let committed = Step(4);
    assert_eq!(
        outcome(&play.finish_all()),
        Some(Outcome::Interrupted { committed })
    );
}

#[test]
fn one_step_before_the_end_of_the_schedule_there_is_nothing_to_stop() {
    let mut play = ready(evaluating(Some(accuracy(1))), Recovery::default(), 5);
    play.evaluate(0, 0.5);
    play.round(0.75);
    play.checkpoint(2);
    let actions = play.round(0.75);
    let record = journaled(&actions).into_iter().next_back();
    assert!(matches!(
        record,
        Some(Record::Evaluation { stop: None, .. })
    ));
    play.step(true);
    play.evaluate(5, 0.75);
    play.checkpoint(5);
    assert_eq!(outcome(&play.finish_all()), Some(Outcome::Completed));
}

// Over restarts.

/// The journal of a run that evaluated steps 0, 2 and 4 with a patience of 1 and committed step 5.
fn stopped_journal(selection: &Selection) -> Vec<Record> {
    let values = [(0, 0.5), (2, 0.75), (4, 0.7)];
    let rows: Vec<_> = values.map(|(step, value)| row(step, value)).to_vec();
    let evaluation = |count: usize| Record::Evaluation {
        row: rows[count - 1],
        stop: selection.early_stop(&rows[..count]),
    };
    vec![
        Record::Generation {
            generation: Generation(1),
            members: vec![],
        },
        Record::Facts {
            facts: held_out(20, 0),
        },
        evaluation(1),
        commit(1, 1, true),
        commit(2, 1, true),
        evaluation(2),
        commit(3, 1, true),
        commit(4, 1, true),
        evaluation(3),
        commit(5, 1, true),
    ]
}

#[test]
fn t3_a_run_resumed_at_the_deciding_evaluation_ends_with_the_next_step() {
    let rule = accuracy(1);
    let recovery = recover(&stopped_journal(&rule), Some(Step(4))).unwrap();
    assert_eq!(recovery.evaluations.len(), 3);
    let mut play = ready(evaluating(Some(rule)), recovery, 20);
    let actions = play.step(true);
    assert_eq!(
        verdicts(&actions),
        [(true, true, true)],
        "nothing is evaluated again"
    );
}

#[test]
fn t3_a_run_resumed_before_the_deciding_evaluation_decides_again() {
    let rule = accuracy(1);
    let recovery = recover(&stopped_journal(&rule), Some(Step(3))).unwrap();
    assert_eq!(
        (recovery.evaluations.len(), &recovery.early_stop),
        (2, &None)
    );
    let mut play = ready(evaluating(Some(rule)), recovery, 20);
    assert_eq!(verdicts(&play.step(true)), [(true, true, false)]);
    play.evaluate(4, 0.7);
    assert_eq!(verdicts(&play.step(true)), [(true, true, true)]);
}

#[test]
fn t3_a_run_resumed_after_its_last_step_finishes_without_another() {
    let rule = accuracy(1);
    let mut journal = stopped_journal(&rule);
    journal.push(Record::Evaluation {
        row: row(5, 0.9),
        stop: None,
    });
    let recovery = recover(&journal, Some(Step(5))).unwrap();
    assert_eq!(
        recovery.evaluations.len(),
        4,
        "the last one may be better and changes nothing"
    );
    let mut play = Play::new(evaluating(Some(rule)), recovery).0;
    play.join_all();
    play.ready(1, held_out(20, 5));
    let actions = play.ready(2, held_out(20, 5));
    assert!(
        told(&actions)
            .iter()
            .all(|it| it.1 == CoordinatorMessage::Finish)
    );
    assert_eq!(outcome(&play.finish_all()), Some(Outcome::Completed));
}

#[test]
fn another_patience_at_a_later_start_judges_anew() {
    let recovery = recover(&stopped_journal(&accuracy(1)), Some(Step(4))).unwrap();
    for selection in [Some(accuracy(2)), None] {
        let stops = selection.is_some();
        let mut play = ready(evaluating(selection), recovery.clone(), 20);
        assert_eq!(verdicts(&play.step(true)), [(false, false, false)]);
        play.step(true);
        play.evaluate(6, 0.7);
        let verdict = verdicts(&play.step(true));
        assert_eq!(
            verdict,
            [(stops, stops, stops)],
            "evaluations of before count"
        );
    }
}

#[test]
fn what_a_rewind_takes_back_is_not_known() {
    let mut journal = stopped_journal(&accuracy(1));
    assert_eq!(early_stop(&journal).map(|it| it.step), Some(4));
    journal.push(Record::Rewind {
        to: Step(3),
        reason: "why".into(),
    });
    assert_eq!(early_stop(&journal), None);
    let recovery = recover(&journal, Some(Step(3))).unwrap();
    let steps: Vec<_> = recovery.evaluations.iter().map(|it| it.step).collect();
    assert_eq!((steps, recovery.early_stop), (vec![0, 2], None));
}

#[test]
fn only_a_run_that_ends_with_the_next_step_ended_by_the_decision() {
    let stop = early_stop(&stopped_journal(&accuracy(1))).unwrap();
    let ended = [4, 5, 6].map(|committed| stop.ended(Step(committed)));
    assert_eq!(ended, [false, true, false]);
}

#[test]
fn a_completed_run_still_knows_that_it_stopped_early() {
    let mut journal = stopped_journal(&accuracy(1));
    journal.push(Record::Completed { step: Step(5) });
    let recovery = recover(&journal, None).unwrap();
    assert_eq!(recovery.early_stop.map(|it| it.step), Some(4));
    assert_eq!(recovery.evaluations.len(), 3);
    assert_eq!(early_stop(&journal).map(|it| it.step), Some(4));
}

#[test]
fn the_starting_weights_are_evaluated_once() {
    let journal = [Record::Evaluation {
        row: row(0, 0.5),
        stop: None,
    }];
    let recovery = recover(&journal, None).unwrap();
    let mut play = Play::new(evaluating(None), recovery).0;
    play.join_all();
    play.ready(1, held_out(20, 0));
    let go = told(&play.ready(2, held_out(20, 0)));
    let expected = CoordinatorMessage::Go {
        step: Step(1),
        evaluate: false,
        save: false,
        last: false,
    };
    assert_eq!(go, [(1, expected.clone()), (2, expected)]);
}

#[test]
fn evaluations_read_back_as_they_were_written() {
    for record in stopped_journal(&accuracy(1)) {
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(
            serde_json::from_str::<Record>(&json).unwrap(),
            record,
            "{json}"
        );
    }
}

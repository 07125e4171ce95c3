//! What a restarted coordinator makes of a journal, and that records read back as they were written.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

mod support;

use protocol::{
    Entry, EvaluationRow, Fence, Generation, Incarnation, Phases, Record, Recovery, RecoveryError,
    Statistics, Step, fenced, recover, saved, surviving,
};
use support::{commit, facts};

fn generation(number: u64) -> Record {
    Record::Generation {
        generation: Generation(number),
        members: vec![Incarnation(5)],
    }
}

fn rewind(to: u64) -> Record {
    Record::Rewind {
        to: Step(to),
        reason: "why".into(),
    }
}

#[test]
fn an_empty_journal_starts_at_the_beginning() {
    assert_eq!(recover(&[], None), Ok(Recovery::default()));
}

#[test]
fn commits_that_no_checkpoint_holds_are_rewound() {
    let journal = [
        generation(1),
        commit(1, 1, true),
        commit(2, 1, true),
        commit(3, 1, true),
    ];
    let recovery = recover(&journal, Some(Step(2))).unwrap();
    assert_eq!(
        (recovery.committed, recovery.generation),
        (Step(2), Generation(1))
    );
    assert_eq!(recovery.highest_committed, Step(3));
    assert!(matches!(
        recovery.rewind,
        Some(Record::Rewind { to: Step(2), .. })
    ));
    assert_eq!(recover(&journal, Some(Step(3))).unwrap().rewind, None);
}

#[test]
fn m3_rewound_commits_do_not_survive_and_their_steps_come_once() {
    let journal = [
        generation(1),
        commit(1, 1, true),
        commit(2, 1, true),
        rewind(1),
        generation(2),
        commit(2, 2, true),
    ];
    let rows: Vec<_> = surviving(&journal)
        .unwrap()
        .iter()
        .map(|it| (it.row.report.step, it.row.generation))
        .collect();
    assert_eq!(rows, [(1, 1), (2, 2)]);
    assert_eq!(
        recover(&journal, Some(Step(2))).unwrap().generation,
        Generation(2)
    );
}

#[test]
fn m2_a_journal_that_a_checkpoint_has_overtaken_is_refused() {
    let journal = [generation(1), commit(1, 1, true)];
    let error = recover(&journal, Some(Step(2))).unwrap_err();
    let expected = RecoveryError::CheckpointAhead {
        checkpoint: Step(2),
        committed: Step(1),
    };
    assert_eq!(error, expected);
}

#[test]
fn m3_a_step_missing_or_doubled_in_the_journal_is_refused() {
    for (steps, committed, found) in [([1, 3], 1, 3), ([1, 1], 1, 1), ([2, 3], 0, 2)] {
        let journal = steps.map(|step| commit(step, 1, true));
        let gap = RecoveryError::Gap {
            committed: Step(committed),
            found: Step(found),
        };
        assert_eq!(surviving(&journal), Err(gap));
    }
}

#[test]
fn a_rewind_that_goes_forward_is_refused() {
    let journal = [commit(1, 1, true), rewind(2)];
    let error = RecoveryError::RewindForward {
        to: Step(2),
        committed: Step(1),
    };
    assert_eq!(surviving(&journal), Err(error));
}

#[test]
fn t6_skips_in_a_row_are_counted_up_to_the_checkpoint() {
    let applied = [true, false, true, false, false, true];
    let journal: Vec<_> = (1..)
        .zip(applied)
        .map(|(step, it)| commit(step, 1, it))
        .collect();
    let skipped = |at| recover(&journal, Some(Step(at))).unwrap().skipped;
    assert_eq!([2, 3, 4, 5, 6].map(skipped), [1, 0, 1, 2, 0]);
}

#[test]
fn a_completed_run_stays_completed_though_its_checkpoints_may_be_gone() {
    let journal = [
        generation(1),
        commit(1, 1, true),
        Record::Completed { step: Step(1) },
    ];
    let recovery = recover(&journal, None).unwrap();
    assert!(recovery.completed && recovery.rewind.is_none());
    assert_eq!(recovery.committed, Step(1));
}

#[test]
fn the_newest_checkpoint_that_the_journal_knows_is_the_last_that_no_rewind_passed_over() {
    let checkpoint = |step| Record::Checkpoint { step: Step(step) };
    let mut journal = vec![generation(1), commit(1, 1, true), commit(2, 1, true)];
    assert_eq!(saved(&journal), Step(0));
    journal.extend([checkpoint(2), checkpoint(1)]);
    assert_eq!(saved(&journal), Step(2));
    journal.extend([rewind(1), commit(2, 1, true)]);
    assert_eq!(saved(&journal), Step(1));
    journal.push(rewind(0));
    assert_eq!(saved(&journal), Step(0));
}

#[test]
fn a_run_that_begins_anew_knows_nothing_of_before_but_goes_on_counting() {
    let evaluation = Record::Evaluation {
        row: EvaluationRow::default(),
        stop: None,
    };
    let before = [
        generation(7),
        Record::Facts { facts: facts(7, 0) },
        evaluation,
    ];
    let known = recover(&before, None).unwrap();
    assert_eq!((known.evaluations.len(), known.facts.is_some()), (1, true));
    let anew = [&before[..], &[Record::Anew]].concat();
    let expected = Recovery {
        generation: Generation(7),
        ..Recovery::default()
    };
    assert_eq!(recover(&anew, None), Ok(expected));
    let misplaced = [commit(1, 1, true), Record::Anew];
    let error = surviving(&misplaced).unwrap_err().to_string();
    assert!(error.contains("begins anew"), "{error}");
}

#[test]
fn records_read_back_as_they_were_written() {
    let records = [
        Record::Anew,
        generation(3),
        Record::Facts { facts: facts(7, 0) },
        commit(1, 3, true),
        Record::Checkpoint { step: Step(1) },
        rewind(0),
        Record::Completed { step: Step(1) },
    ];
    for record in records {
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(
            serde_json::from_str::<Record>(&json).unwrap(),
            record,
            "{json}"
        );
    }
}

#[test]
fn a_row_keeps_every_digit_of_its_floats_in_json_and_a_nan_reads_back_as_nan() {
    let Record::Commit(mut it) = commit(1, 1, true) else {
        panic!("a commit");
    };
    let odd = [
        0.1 + 0.2,
        -0.0,
        1e-300,
        f64::MAX,
        1.0 / 3.0,
        5.0,
        -7.25,
        1e22,
        2e-8,
        3.0,
        f64::NAN,
    ];
    it.row.report.statistics = Statistics::from_values(odd);
    it.row.report.grad_norm = f64::NAN;
    let json = serde_json::to_string(&Record::Commit(it)).unwrap();
    let Record::Commit(back) = serde_json::from_str(&json).unwrap() else {
        panic!("{json}");
    };
    let bits = |values: [(&str, f64); 11]| values.map(|(_, value)| value.to_bits());
    let (wrote, read) = (
        it.row.report.statistics.values(),
        back.row.report.statistics.values(),
    );
    assert_eq!(bits(read), bits(wrote), "{json}");
    assert!(back.row.report.grad_norm.is_nan());
}

#[test]
fn a_metrics_row_has_the_names_that_trl_uses() {
    let Record::Commit(it) = commit(1, 1, true) else {
        panic!("a commit");
    };
    let json = serde_json::to_value(it.row).unwrap();
    let names: Vec<_> = json
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let expected = "step epoch finite loss loss/pairwise loss/calibration rewards/chosen rewards/rejected \
        rewards/margins rewards/accuracies log_ratios/chosen log_ratios/rejected logps/chosen logps/rejected \
        grad_norm learning_rate tokens pairs tokens_per_second world_size generation seconds \
        seconds/data seconds/forward seconds/head seconds/backward seconds/reduce seconds/update seconds/evaluate \
        seconds/checkpoint seconds/wait";
    assert_eq!(names, expected.split_whitespace().collect::<Vec<_>>());
}

/// A record of a journal that was written before rows had phases.
const OLD_COMMIT: &str = r#"{"record":"commit","apply":true,"row":{"step":1,"epoch":0,"finite":true,"loss":0.5,
    "loss/pairwise":0.5,"loss/calibration":0.0,"rewards/chosen":0.0,"rewards/rejected":0.0,"rewards/margins":0.0,
    "rewards/accuracies":0.5,"log_ratios/chosen":0.0,"log_ratios/rejected":0.0,"logps/chosen":-9.0,"logps/rejected":-9.0,
    "grad_norm":1.0,"learning_rate":0.001,"tokens":500,"pairs":8,"tokens_per_second":250.0,"world_size":2,
    "generation":1,"seconds":2.0}}"#;

#[test]
fn a_commit_from_before_rows_had_phases_reads_with_all_of_them_0() {
    let record: Record = serde_json::from_str(OLD_COMMIT).unwrap();
    let Record::Commit(it) = &record else {
        panic!("{record:?}");
    };
    assert_eq!(it.row.phases, Phases::default());
    assert_eq!((it.row.seconds, it.row.report.tokens), (2.0, 500));
    let recovery = recover(&[generation(1), record], Some(Step(1))).unwrap();
    assert_eq!(recovery.committed, Step(1));
}

#[test]
fn phases_have_their_names_in_rows_and_read_back_from_their_values() {
    let phases = Phases::from_values([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
    let json = serde_json::to_value(phases).unwrap();
    for (name, value) in phases.values() {
        assert_eq!(json[format!("seconds/{name}")], value, "{json}");
    }
    let values = phases.values().map(|(_, value)| value);
    assert_eq!(Phases::from_values(values), phases);
    assert_eq!(phases.total(), 45.0);
    assert_eq!(Phases::mean([&phases, &Phases::default()]).wait, 4.5);
    assert_eq!(Phases::mean([]), Phases::default());
}

fn entry(fence: u64, record: Record) -> Entry {
    let fence = Fence(fence);
    Entry { fence, record }
}

#[test]
fn m2_whoever_opens_the_journal_has_a_higher_fence_and_records_under_lower_ones_are_refused() {
    let opened = |fence| entry(fence, Record::Opened);
    assert_eq!(fenced(vec![]), Ok((vec![], Fence(1))));
    let twice = vec![
        opened(1),
        entry(1, generation(1)),
        entry(1, commit(1, 1, true)),
        opened(2),
        entry(2, generation(2)),
    ];
    let records = vec![generation(1), commit(1, 1, true), generation(2)];
    assert_eq!(fenced(twice.clone()), Ok((records, Fence(3))));
    let (index, fence, newest) = (6, Fence(1), Fence(2));
    let mut late = twice.clone();
    late.push(entry(1, commit(2, 1, true)));
    let replaced = RecoveryError::Replaced {
        index,
        fence,
        newest,
    };
    assert_eq!(fenced(late), Err(replaced));
    let mut same = twice;
    same.push(opened(2));
    let replaced = RecoveryError::Replaced {
        index,
        fence: newest,
        newest,
    };
    assert_eq!(fenced(same), Err(replaced));
}

#[test]
fn an_entry_is_its_record_with_the_fence_and_one_from_before_there_were_fences_has_0() {
    let texts = [
        r#"{"fence":3,"record":"opened"}"#,
        r#"{"fence":3,"record":"generation","generation":7,"members":[18446744073709551615]}"#,
        r#"{"fence":3,"record":"checkpoint","step":4}"#,
    ];
    for text in texts {
        let entry: Entry = serde_json::from_str(text).unwrap();
        assert_eq!(entry.fence, Fence(3));
        assert_eq!(serde_json::to_string(&entry).unwrap(), text);
    }
    let old: Entry = serde_json::from_str(OLD_COMMIT).unwrap();
    let (records, next) = fenced(vec![entry(0, generation(1)), old]).unwrap();
    assert_eq!((records.len(), next), (2, Fence(1)));
    // What is not a number reads back as such, through the fence and the tag.
    let skipped = entry(1, commit(1, 1, false));
    let text = serde_json::to_string(&skipped).unwrap();
    let back: Entry = serde_json::from_str(&text).unwrap();
    assert_eq!(format!("{back:?}"), format!("{skipped:?}"));
    assert!(serde_json::from_str::<Entry>(r#"{"fence":3}"#).is_err());
}

#[test]
fn a_word_under_a_lower_fence_is_not_admitted_and_one_of_no_job_is() {
    let mut newest = Fence(0);
    let heard = [
        (1, true),
        (1, true),
        (4, true),
        (3, false),
        (0, true),
        (4, true),
        (5, true),
    ];
    for (fence, admitted) in heard {
        assert_eq!(
            newest.admits(Fence(fence)),
            admitted,
            "{fence} after {newest}"
        );
    }
}

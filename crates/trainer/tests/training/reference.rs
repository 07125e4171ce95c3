//! Reference values: computed once, shared, and used under their full key only (R1).

use std::fs;

use crate::support::{Folder, Script, run, try_run};
use refcache::{EntryKey, Scope, Store};
use trainer::{Cause, ReferenceCounts, TrainError};

const SPEC: &str = "objective = { kind = \"dpo\" }\ntrain = { steps = 2, batch_pairs = 8 }";

fn sum(counts: &[ReferenceCounts]) -> (u64, u64) {
    let reused = counts.iter().map(|counts| counts.reused).sum();
    (reused, counts.iter().map(|counts| counts.computed).sum())
}

#[test]
fn each_distinct_completion_is_computed_once_by_one_rank_and_reused_by_every_later_world() {
    let folder = Folder::new(20);
    let spec = folder.spec(SPEC);
    let script = Script::default();
    let (reused, computed) = sum(&run(&spec, 3, &script).counts);
    assert_eq!(reused, 0);
    // 27 pairs have 54 completions; some occur more than once after the same prompt.
    assert!((30..54).contains(&computed), "{computed}");
    for world in [1, 2, 4] {
        assert_eq!(sum(&run(&spec, world, &script).counts), (computed, 0));
    }
}

#[test]
fn dropping_reordering_and_appending_pairs_reuses_every_value_that_still_applies() {
    let folder = Folder::new(20);
    let text = fs::read_to_string(folder.path("train.jsonl")).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let script = Script::default();
    let counts = |store: &str, lines: &[&str], world| {
        folder.write("train.jsonl", &lines.join("\n"));
        let mut spec = folder.spec(SPEC);
        spec.reference.store = folder.path(store);
        sum(&run(&spec, world, &script).counts)
    };
    let (_, all) = counts("all", &lines, 1);
    let (_, first) = counts("shared", &lines[..14], 2);
    let changed: Vec<_> = lines[4..].iter().rev().copied().collect();
    let (_, needed) = counts("changed", &changed, 1);
    let fresh = all - first;
    assert!(fresh > 0 && fresh < needed, "{fresh} of {needed}");
    assert_eq!(counts("shared", &changed, 3), (needed - fresh, fresh));
}

#[test]
fn r1_other_weights_truncation_or_arithmetic_of_the_model_reuse_nothing() {
    let folder = Folder::new(8);
    let spec = folder.spec(SPEC);
    let script = Script::default();
    let (_, computed) = sum(&run(&spec, 1, &script).counts);
    assert_eq!(sum(&run(&spec, 1, &script).counts), (computed, 0));

    let mut shorter = spec.clone();
    shorter.data.max_length = 512;
    assert_eq!(sum(&run(&shorter, 1, &script).counts), (0, computed));

    let config = folder.path("model").join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("10000.0", "20000.0")).unwrap();
    assert_eq!(
        sum(&run(&spec, 1, &script).counts),
        (0, computed),
        "rotary base"
    );

    folder.change_weights(|_, values| values[0] += 0.5);
    assert_eq!(
        sum(&run(&spec, 1, &script).counts),
        (0, computed),
        "weights"
    );
}

#[test]
fn a_reference_of_its_own_gives_rewards_against_it() {
    let folder = Folder::new(8);
    let copy = folder.path("reference");
    fs::create_dir_all(&copy).unwrap();
    for file in fs::read_dir(folder.path("model")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.join(file.file_name())).unwrap();
    }
    let mut spec = folder.spec(SPEC);
    spec.model.reference = Some(copy);
    let script = Script::default();
    assert_eq!(
        run(&spec, 1, &script).reports[0].rewards.log_ratios_chosen,
        0.0
    );
    folder.change_weights(|_, values| values[5] += 0.5);
    let changed = run(&spec, 2, &script);
    assert_ne!(changed.reports[0].rewards.log_ratios_chosen, 0.0);
    assert_eq!(sum(&changed.counts).1, 0, "the reference is the same");
}

#[test]
fn a_store_whose_values_are_not_this_programs_is_refused() {
    let folder = Folder::new(4);
    let mut spec = folder.spec(SPEC);
    run(&spec, 1, &Script::default());
    // The same scope elsewhere, filled with other values.
    let scope = fs::read_dir(folder.path("store")).unwrap().next().unwrap();
    let scope = fs::read(scope.unwrap().path().join("scope.json")).unwrap();
    let scope: Scope = serde_json::from_slice(&scope).unwrap();
    let forged = folder.path("forged");
    let (store, _) = Store::open(&forged, &scope).unwrap();
    let tokenizer = data::Tokenizer::load(&spec.model.path, None).unwrap();
    let needs = data::Needs {
        sides: data::Sides::Both,
        scores: false,
    };
    let pairs = data::load(&spec.data.train, &spec.data, &tokenizer, needs)
        .unwrap()
        .pairs;
    let completions = pairs.iter().flat_map(|pair| {
        [&pair.chosen, &pair.rejected].map(|completion| EntryKey::new(&pair.prompt, completion))
    });
    let entries: Vec<_> = completions.map(|key| (key, -1.5f32)).collect();
    store.writer().unwrap().append(&entries).unwrap();
    spec.reference.store = forged;
    let error = try_run(&spec, 1, &Script::default())
        .err()
        .expect("refused");
    assert!(
        matches!(error, TrainError::StoreDisagrees { stored: -1.5, .. }),
        "{error}"
    );
    assert_eq!(error.cause(), Cause::Config);
}

#[test]
fn a_reference_that_gives_no_finite_log_prob_is_refused_with_the_row() {
    let folder = Folder::new(4);
    folder.change_weights(|name, values| {
        if name == "lm_head.weight" {
            values[0] = f32::NAN;
        }
    });
    let error = try_run(&folder.spec(SPEC), 1, &Script::default())
        .err()
        .expect("refused");
    assert!(
        matches!(error, TrainError::ReferenceNotFinite { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("train.jsonl:1"), "{error}");
}

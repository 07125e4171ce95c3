//! `score` and `bench`: the forward and the step of a run, alone.

use std::fs;
use std::path::Path;

use crate::support::{Folder, fixture};
use data::DataConfig;
use model::Device;
use serde_json::Value;
use spec::Dtype;
use trainer::{BenchRequest, ScoreRequest, ScoredPair, TrainError, bench, score};

fn data(file: &Path) -> DataConfig {
    toml::from_str(&format!("train = [{file:?}]")).unwrap()
}

fn scored(model: &Path, file: &Path, micro_batch_tokens: usize) -> Vec<ScoredPair> {
    let request = ScoreRequest {
        model: model.to_owned(),
        adapter: None,
        data: data(file),
        micro_batch_tokens,
    };
    let mut pairs = Vec::new();
    let count = score(&request, &Device::flex(), &mut |pair| {
        pairs.push(pair);
        Ok::<(), TrainError>(())
    });
    assert_eq!(count.unwrap(), pairs.len());
    pairs
}

#[test]
fn scores_are_the_golden_log_probs() {
    let Some(dir) = fixture("llama") else { return };
    let golden: Value =
        serde_json::from_str(&fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
    let pairs = scored(&dir, &dir.join("pairs.jsonl"), 100);
    let golden = golden["logps_f64"].as_array().unwrap();
    assert_eq!(pairs.len(), golden.len());
    for (pair, golden) in pairs.iter().zip(golden) {
        let found = [pair.chosen_logp, pair.rejected_logp].map(Option::unwrap);
        for (found, key) in found.into_iter().zip(["chosen", "rejected"]) {
            let expected = golden[key].as_f64().unwrap();
            assert!(
                (f64::from(found) - expected).abs() < 2e-4,
                "{found} {expected}"
            );
        }
    }
}

#[test]
fn scores_come_in_the_files_order_with_the_same_bits_however_they_are_packed() {
    let folder = Folder::new(300);
    let all = |tokens| scored(&folder.path("model"), &folder.path("train.jsonl"), tokens);
    let pairs = all(1);
    assert_eq!(pairs, all(4096));
    for (index, pair) in pairs.iter().enumerate() {
        assert_eq!((pair.index, pair.pair.place.line), (index, index + 1));
    }
}

#[test]
fn a_bench_counts_pairs_and_tokens_of_the_timed_steps_alone() {
    let folder = Folder::new(10);
    let request = BenchRequest {
        model: folder.path("model"),
        data: data(&folder.path("train.jsonl")),
        batch_pairs: 5,
        micro_batch_tokens: 64,
        steps: 4,
        warmup: 1,
        dtype: Dtype::F32,
        gradient_checkpointing: false,
    };
    let result = bench(&request, &Device::flex()).unwrap();
    let pairs_per_step = result.pairs_per_second * result.seconds_per_step;
    assert!((pairs_per_step - 5.0).abs() < 1e-9);
    assert!(result.tokens_per_second > 2.0 * result.pairs_per_second);
    let profile = result.profile.unwrap();
    let seconds = profile.seconds;
    let through = seconds.forward + seconds.head + seconds.backward;
    let phases = through + seconds.data + seconds.reduce + seconds.update;
    assert!(through > 0.0 && phases <= result.seconds_per_step);
    assert!(seconds.evaluate + seconds.checkpoint + seconds.wait == 0.0);
    let speed = profile.needed_gflop / through;
    assert!((profile.gflop_per_second / speed - 1.0).abs() < 1e-9);
    // A prompt is computed once for both of its completions.
    let tokens = result.tokens_per_second * result.seconds_per_step;
    assert!(profile.computed_tokens < tokens && profile.computed_tokens > tokens / 2.0);
    let refused = bench(
        &BenchRequest {
            steps: 0,
            ..request
        },
        &Device::flex(),
    );
    assert!(refused.err().unwrap().to_string().contains("--steps"));
}

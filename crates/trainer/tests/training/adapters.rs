//! Training of an adapter, and of bf16 operands: what moves and what does not, exactly zero rewards at the start, several ranks
//! as one.

use std::fs;

use crate::support::{Folder, Script, relative_error, run};
use checkpoint::Checkpoint;
use model::{Device, Lora, Model, ModelConfig, Targets};
use trainer::plan::Peers;
use trainer::{ScoreRequest, ScoredPair, Setup, TrainError, score};

const CAL_DPO: &str = "objective = { kind = \"cal_dpo\", beta = 0.1 }\n";
const LORA: &str = "adapter = { kind = \"lora\", rank = 3, alpha = 6.0 }\n";
const BF16: &str = "model.dtype = \"bf16\"\n";

#[test]
fn t5_the_reference_is_the_model_without_its_adapter_and_of_the_same_precision() {
    let folder = Folder::new(20);
    // The same weights once more, which are then only read.
    let reference = format!("model.reference = {:?}\n", folder.path("model"));
    for lines in [
        LORA.to_owned(),
        BF16.into(),
        format!("{LORA}{BF16}"),
        format!("{reference}{BF16}"),
        format!("{reference}{LORA}{BF16}"),
    ] {
        for world in [1, 3] {
            let _ = fs::remove_dir_all(folder.path("store"));
            let spec = folder.spec(&format!(
                "{CAL_DPO}{lines}train = {{ steps = 2, batch_pairs = 20, micro_batch_tokens = 120 }}\n\
                 optimizer.learning_rate = 1e-2\nschedule.warmup_steps = 0"
            ));
            let run = run(&spec, world, &Script::default());
            let rewards = run.reports[0].rewards;
            assert_eq!(rewards.log_ratios_chosen.to_bits(), 0, "{lines}");
            assert_eq!(rewards.log_ratios_rejected.to_bits(), 0, "{lines}");
            assert!(run.reports[1].rewards.log_ratios_chosen != 0.0, "{lines}");
        }
    }
}

#[test]
fn t2_worlds_of_1_to_3_train_an_adapter_alike_and_only_it_is_in_the_checkpoint() {
    let folder = Folder::new(20);
    let spec = folder.spec(&format!(
        "{CAL_DPO}{LORA}optimizer.learning_rate = 3e-3\n\
         train = {{ steps = 12, batch_pairs = 8, micro_batch_tokens = 96 }}"
    ));
    let alone = run(&spec, 1, &Script::default());
    let (first, last) = (&alone.reports[0], &alone.reports[11]);
    assert!(last.loss < 0.9 * first.loss, "{} {}", first.loss, last.loss);
    for world in 2..=3 {
        let checkpoints = tempfile::tempdir().unwrap();
        let script = Script {
            checkpoints: checkpoints.path().to_owned(),
            save: true,
            ..Script::default()
        };
        let run = run(&spec, world, &script);
        for (report, expected) in run.reports.iter().zip(&alone.reports) {
            let drift = relative_error(report.loss, expected.loss);
            assert!(drift < 1e-5, "world of {world}: {drift}");
        }
        let checkpoint = Checkpoint::open(&run.checkpoints[&12]).unwrap();
        let tensors = &checkpoint.manifest().tensors;
        // Two blocks of seven linear maps, A and B of each.
        assert_eq!(tensors.len(), 28);
        assert!(tensors.iter().all(|tensor| tensor.name.contains(".lora_")));
    }
}

#[test]
fn bf16_trains_like_f32_and_is_not_f32() {
    let folder = Folder::new(20);
    let losses = |more: &str| -> Vec<f64> {
        let spec = folder.spec(&format!(
            "{CAL_DPO}{more}optimizer.learning_rate = 1e-3\n\
             train = {{ steps = 15, batch_pairs = 8, micro_batch_tokens = 96 }}"
        ));
        let run = run(&spec, 1, &Script::default());
        run.reports.iter().map(|report| report.loss).collect()
    };
    let (exact, rounded) = (losses(""), losses(BF16));
    for (exact, rounded) in exact.iter().zip(&rounded) {
        assert!(relative_error(*rounded, *exact) < 0.02, "{rounded} {exact}");
    }
    // The first step's log-ratios are exactly 0 in both.
    assert_eq!(exact[0].to_bits(), rounded[0].to_bits());
    assert_ne!(exact[5..], rounded[5..]);
}

#[test]
fn updates_that_are_small_beside_bf16s_grid_are_seen_where_weights_began_on_it() {
    let folder = Folder::even(20);
    // A step moves a weight by 2e-6, and bf16 counts in steps of 1e-4 and more where most weights lie.
    let ratios = |more: &str, world| -> Vec<f64> {
        let spec = folder.spec(&format!(
            "{CAL_DPO}{more}optimizer.learning_rate = 2e-6\nschedule.warmup_steps = 0\n\
             train = {{ steps = 10, batch_pairs = 20, micro_batch_tokens = 96 }}"
        ));
        let reports = run(&spec, world, &Script::default()).reports.into_iter();
        reports
            .map(|it| it.rewards.log_ratios_chosen - it.rewards.log_ratios_rejected)
            .collect()
    };
    let exact = ratios("", 1);
    for world in [1, 3] {
        let rounded = ratios(BF16, world);
        assert_eq!(rounded[0], 0.0);
        for (rounded, exact) in rounded[4..].iter().zip(&exact[4..]) {
            assert!((rounded / exact - 1.0).abs() < 0.2, "{rounded} of {exact}");
        }
    }
}

#[test]
fn an_adapter_of_peft_is_trained_on_and_scored_with() {
    let folder = Folder::new(12);
    let model = folder.path("model");
    let config = ModelConfig::load(&model).unwrap();
    let lora = Lora {
        rank: 2,
        alpha: 4.0,
        rank_stabilized: false,
        targets: Targets::Named(vec!["q_proj".into(), "down_proj".into()]),
    };
    let layout = lora.layout(&config).unwrap();
    let mut weights = lora.fresh(&config, 3).unwrap();
    for values in &mut weights {
        for (place, value) in values.iter_mut().enumerate() {
            *value += 0.05 * (place as f32).sin();
        }
    }
    let adapter = folder.path("adapter");
    fs::create_dir(&adapter).unwrap();
    let peft = lora.to_peft(&config, "base").unwrap().to_string();
    fs::write(adapter.join("adapter_config.json"), peft).unwrap();
    let mut file = fs::File::create(adapter.join("adapter_model.safetensors")).unwrap();
    model::write_safetensors(&weights, &layout, &mut file).unwrap();

    let scored = |adapter: Option<&std::path::Path>| {
        let request = ScoreRequest {
            model: model.clone(),
            adapter: adapter.map(ToOwned::to_owned),
            data: folder.spec("").data,
            micro_batch_tokens: 100,
        };
        let mut pairs: Vec<ScoredPair> = Vec::new();
        score(&request, &Device::flex(), &mut |pair| {
            pairs.push(pair);
            Ok::<(), TrainError>(())
        })
        .unwrap();
        let chosen = pairs
            .iter()
            .map(|pair| f64::from(pair.chosen_logp.unwrap()));
        chosen.sum::<f64>() / pairs.len() as f64
    };
    let spec = folder.spec(&format!(
        "{CAL_DPO}adapter = {{ kind = \"peft\", path = {adapter:?} }}\n\
         train = {{ steps = 1, batch_pairs = 12, micro_batch_tokens = 100 }}"
    ));
    let report = run(&spec, 1, &Script::default()).reports.remove(0);
    let (with, without) = (scored(Some(&adapter)), scored(None));
    assert!((report.rewards.logps_chosen - with).abs() < 1e-9);
    // The reference has no adapter.
    let ratio = report.rewards.log_ratios_chosen;
    assert!((ratio - (with - without)).abs() < 1e-5, "{ratio}");
    assert!(ratio != 0.0);
}

#[test]
fn another_adapter_is_another_start_and_unknown_targets_are_refused() {
    let folder = Folder::new(4);
    let facts = |lines: &str| {
        let setup = Setup::load(
            &folder.spec(lines),
            &Device::flex(),
            Peers::NONE,
            &mut |_, _, _| Ok(()),
        );
        setup.map(|setup| (setup.facts().model_digest, setup.notes().to_vec()))
    };
    let (plain, notes) = facts("").unwrap();
    assert!(notes.is_empty());
    let (lora, notes) = facts(LORA).unwrap();
    assert!(notes[0].contains("of the model's"), "{notes:?}");
    let (other, _) = facts(&format!("{LORA}seed = 43")).unwrap();
    assert!(plain != lora && lora != other);
    let Err(error) = facts("adapter = { kind = \"lora\", targets = [\"c_attn\"] }") else {
        panic!("accepted");
    };
    let text = error.to_string();
    assert!(
        text.starts_with("adapter.targets") && text.contains("q_proj"),
        "{text}"
    );
    // Beyond the adapter nothing of the model moves.
    let mut model = Model::load(&folder.path("model"), &Device::flex()).unwrap();
    let digest = model.weights_digest();
    let lora = Lora {
        rank: 2,
        alpha: 4.0,
        rank_stabilized: false,
        targets: Targets::AllLinear,
    };
    let weights = lora.fresh(model.config(), 1).unwrap();
    model.adapt(&lora, weights).unwrap();
    assert_eq!(model.weights_digest(), digest);
}

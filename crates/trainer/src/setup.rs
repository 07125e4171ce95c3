//! Everything a run reads before it has peers: tokens, starting weights, digests. What depends on rank and world comes after.

use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

use data::{Dataset, Hub, Needs, Pair, Report, Sides, Tokenizer};
use model::{Device, Model, ModelConfig, Precision, Saving};
use objective::ObjectiveConfig;
use serde::Serialize;
use spec::{Dtype, Spec};

use crate::adapter::Adapter;
use crate::error::TrainError;
use crate::gate::GateClosed;
use crate::plan::{Peers, Program, Workload, check_gpu, workers_min};

/// Hears how far a long phase is: its name, units done, units in all. An error ends the phase, which nobody waits for any more.
pub type Progress<'a> = &'a mut dyn FnMut(&str, u64, u64) -> Result<(), GateClosed>;

/// A loaded run.
pub struct Setup {
    pub(crate) spec: Spec,
    pub(crate) device: Device,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) train: Dataset,
    pub(crate) eval: Option<Dataset>,
    pub(crate) mismatched: MismatchedPairs,
    pub(crate) model: Model,
    pub(crate) digest: [u8; 32],
    /// What is trained in place of the model's weights; put on once the reference is known.
    pub(crate) adapter: Option<Adapter>,
    notes: Vec<String>,
}

/// What all members of a run must find alike before the first step. Digests are hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Optimizer steps of the whole run.
    pub steps_total: u64,
    /// Training pairs after drops.
    pub pairs: u64,
    /// Held-out pairs that are scored.
    pub eval_pairs: u64,
    /// Parameters of the policy; tied weights count once.
    pub parameters: u64,
    /// The starting weights and how they are computed with.
    pub model_digest: String,
    /// Tokenizer and chat template.
    pub tokenizer_digest: String,
    /// Token ids of the training and held-out pairs.
    pub data_digest: String,
}

impl Setup {
    /// Validates `spec` and reads what it names, for one of `peers`.
    ///
    /// # Errors
    /// The first thing that cannot be used, or a GPU without room for the job.
    pub fn load(
        spec: &Spec,
        device: &Device,
        peers: Peers,
        progress: Progress<'_>,
    ) -> Result<Self, TrainError> {
        spec.validate()?;
        let Tokens {
            tokenizer,
            train,
            eval,
        } = Tokens::load(spec, Kept::Always, progress)?;
        let mismatched = MismatchedPairs::of(spec, &train, eval.as_ref())?;
        let scored = held_out(spec, eval.as_ref());
        check_gpu(spec, &train.pairs, scored, peers, device, 0)?;
        // A worker may have done another job before.
        device.begin_anew();
        progress("load model", 0, 1)?;
        let model = load_policy(spec, peers, device)?;
        check_positions(&model, spec.data.max_length);
        let digest = model_digest(&model);
        let adapter = Adapter::of(spec, model.config())?;
        let notes = notes(&model, adapter.as_ref())?;
        progress("load model", 1, 1)?;
        Ok(Self {
            spec: spec.clone(),
            device: device.clone(),
            tokenizer,
            train,
            eval,
            mismatched,
            model,
            digest,
            adapter,
            notes,
        })
    }

    /// Whether what it becomes as one of `peers` has room where it was loaded, which was perhaps as one of others.
    ///
    /// # Errors
    /// A GPU without it.
    pub fn check_room(&self, peers: Peers) -> Result<(), TrainError> {
        let (train, device) = (&self.train.pairs, &self.device);
        let loaded = device.used_bytes();
        check_gpu(&self.spec, train, self.held_out(), peers, device, loaded)
    }

    /// Fewest workers, at most as many as `peers`, among whom what it becomes has room on its GPU; 0 where it has none.
    ///
    /// # Errors
    /// A model that cannot be read any more.
    pub fn workers_min(&self, peers: Peers) -> Result<usize, TrainError> {
        let (train, device) = (&self.train.pairs, &self.device);
        let loaded = device.used_bytes();
        workers_min(&self.spec, train, self.held_out(), peers, device, loaded)
    }

    /// What this run is made of.
    pub fn facts(&self) -> Facts {
        let mut data = blake3::Hasher::new();
        data.update(b"caldpo run data 1").update(&self.train.digest);
        if let Some(eval) = &self.eval {
            data.update(&eval.digest);
        }
        Facts {
            steps_total: self.spec.train.steps_total(self.train.pairs.len()),
            pairs: self.train.pairs.len() as u64,
            eval_pairs: self.held_out().len() as u64,
            parameters: self.model.layout().elements() as u64,
            model_digest: hex(&self.starting_digest()),
            tokenizer_digest: hex(&self.tokenizer.digest()),
            data_digest: hex(data.finalize().as_bytes()),
        }
    }

    /// Digest of the model that training starts with, its adapter included.
    fn starting_digest(&self) -> [u8; 32] {
        match &self.adapter {
            None => self.digest,
            Some(adapter) => {
                let mut hasher = blake3::Hasher::new();
                hasher.update(&self.digest).update(&adapter.digest());
                *hasher.finalize().as_bytes()
            }
        }
    }

    /// Leaves a copy of what an export needs of the model beside the checkpoints: exports are made where the coordinator is.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn keep_source(&self, checkpoints: &Path) -> Result<(), TrainError> {
        let template = self.spec.data.chat_template.as_deref();
        checkpoint::keep_source(&self.spec.model.path, template, checkpoints)?;
        if let Some(adapter) = &self.adapter {
            let base = self.spec.model.path.to_string_lossy();
            let peft = adapter.lora.to_peft(self.model.config(), &base)?;
            checkpoint::keep_adapter(&format!("{peft:#}\n"), checkpoints)?;
        }
        Ok(())
    }

    /// What a person should know about the model before it is trained, in words.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What became of the rows.
    pub fn reports(&self) -> Reports {
        Reports::of(&self.train, self.eval.as_ref())
    }

    /// What the memory of this run's workers depends on, and what this process has beside its model.
    ///
    /// # Errors
    /// A reference model whose config.json cannot be read.
    pub fn workload(&self) -> Result<(Workload, Program), TrainError> {
        let config = self.model.config().clone();
        let workload = Workload::new(&self.spec, config, &self.train.pairs, self.held_out())?;
        let program = Program::of_this_process(workload.loaded_weights());
        Ok((workload, program))
    }

    /// The held-out pairs that evaluations score.
    pub(crate) fn held_out(&self) -> &[Pair] {
        held_out(&self.spec, self.eval.as_ref())
    }
}

/// Reads the weights that `spec` starts with, as one of `peers` needs them: no f32 of what an adapter is put on. Workers with GPUs that
/// share f32 weights out, or keep them beside their GPU, need never have room for all of them on one.
pub(crate) fn load_policy(spec: &Spec, peers: Peers, device: &Device) -> Result<Model, TrainError> {
    let (path, precision) = (&spec.model.path, precision(spec.model.dtype));
    let apart = peers.workers > 1 || peers.sharding.offload;
    let mut model = if spec.adapter.is_some() {
        Model::load_frozen(path, device, precision)?
    } else if apart && precision == Precision::Bf16 && device.is_gpu() {
        Model::load_parked(path, device)?
    } else {
        Model::load(path, device)?
    };
    model.set_precision(precision);
    if spec.model.gradient_checkpointing {
        model.set_saving(Saving::BlockInputs);
    }
    Ok(model)
}

/// What config.json asks for and training does otherwise, and what is trained if that is not the model.
fn notes(model: &Model, adapter: Option<&Adapter>) -> Result<Vec<String>, TrainError> {
    let mut notes = model.config().notes.clone();
    if let Some(adapter) = adapter {
        let trained = adapter.lora.layout(model.config())?.elements();
        let all = model.layout().elements();
        let share = 100.0 * trained as f64 / all as f64;
        notes.push(format!(
            "an adapter of {trained} parameters is trained, {share:.2} % of the model's {all}, which stay as they are"
        ));
    }
    Ok(notes)
}

/// The arithmetic of `dtype`.
pub(crate) fn precision(dtype: Dtype) -> Precision {
    match dtype {
        Dtype::F32 => Precision::F32,
        Dtype::Bf16 => Precision::Bf16,
    }
}

/// What became of the rows of a job's files, found without its model.
///
/// # Errors
/// The first thing that training would refuse about them.
pub fn reports(spec: &Spec) -> Result<Reports, TrainError> {
    spec.validate()?;
    let tokens = Tokens::load(spec, Kept::IfThere, &mut |_, _, _| Ok(()))?;
    Ok(Reports::of(&tokens.train, tokens.eval.as_ref()))
}

/// What a run reads before its model.
pub(crate) struct Tokens {
    pub tokenizer: Tokenizer,
    pub train: Dataset,
    pub eval: Option<Dataset>,
}

/// Completions behind prompts of other rows, one for each pair in the same order; none where the objective reads none.
#[derive(Default)]
pub(crate) struct MismatchedPairs {
    pub train: Vec<Pair>,
    pub eval: Vec<Pair>,
}

impl MismatchedPairs {
    pub fn of(spec: &Spec, train: &Dataset, eval: Option<&Dataset>) -> Result<Self, TrainError> {
        if !spec.objective.reads_mismatched() {
            return Ok(Self::default());
        }
        let of = |pairs: &[Pair]| match pairs {
            [] => Ok(Vec::new()),
            _ => data::mismatched(pairs, spec.data.max_length),
        };
        Ok(Self {
            train: of(&train.pairs)?,
            eval: of(held_out(spec, eval))?,
        })
    }
}

/// `entries` with data sets of a hub downloaded and in their place the files.
fn local(entries: &[PathBuf]) -> Result<Vec<PathBuf>, TrainError> {
    let mut files = Vec::new();
    for entry in entries {
        match entry.to_str().filter(|text| text.starts_with("hf://")) {
            Some(hub) => files.extend(Hub::from_env().fetch(hub)?),
            None => files.push(entry.clone()),
        }
    }
    Ok(files)
}

/// What `objective` needs of every row.
pub(crate) fn needs(objective: &ObjectiveConfig) -> Needs {
    Needs {
        sides: match objective.sides() {
            objective::Sides::Chosen => Sides::Chosen,
            objective::Sides::Either => Sides::Either,
            objective::Sides::Both => Sides::Both,
        },
        scores: objective.needs_scores(),
    }
}

/// Whether tokens are kept for the next time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// By what trains.
    Always,
    /// Where there is a folder of them already: what only looks leaves nothing behind.
    IfThere,
}

impl Tokens {
    pub fn load(spec: &Spec, kept: Kept, progress: Progress<'_>) -> Result<Self, TrainError> {
        let config = &spec.data;
        let model = &spec.model.path;
        if !model.is_dir() {
            // Each worker looks below its own working directory.
            let path = std::path::absolute(model).unwrap_or_else(|_| model.clone());
            return Err(TrainError::NoModel { path });
        }
        let tokenizer = Tokenizer::load(model, config.chat_template.as_deref())?;
        let beside = spec.reference.store.with_file_name("data-cache");
        let cache = config.cache.as_deref().unwrap_or(&beside);
        let cache = (kept == Kept::Always || cache.exists()).then_some(cache);
        let needs = needs(&spec.objective);
        let mut load = |entries: &[PathBuf], phase: &str| {
            progress(phase, 0, 1)?;
            let files = local(entries)?;
            let mut heard = Ok(());
            let mut hear = |done, total| {
                if heard.is_ok() {
                    heard = progress(phase, done, total);
                }
            };
            let loaded = data::load_cached(&files, config, &tokenizer, needs, cache, &mut hear)?;
            heard?;
            for warning in loaded.warnings {
                tracing::warn!("{warning}");
            }
            Ok::<_, TrainError>(loaded.dataset)
        };
        let train = load(&config.train, "tokenize pairs")?;
        let eval = match config.eval.as_slice() {
            [] => None,
            entries => Some(load(entries, "tokenize held-out pairs")?),
        };
        let vocabulary = ModelConfig::load(&spec.model.path)?.vocabulary;
        for dataset in [Some(&train), eval.as_ref()].into_iter().flatten() {
            check_vocabulary(&dataset.pairs, vocabulary, &spec.model.path)?;
        }
        Ok(Self {
            tokenizer,
            train,
            eval,
        })
    }
}

/// What became of the rows: as text for a person, as JSON for a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reports {
    /// The training files.
    pub train: Report,
    /// The held-out files, if there are any.
    pub eval: Option<Report>,
}

impl Reports {
    fn of(train: &Dataset, eval: Option<&Dataset>) -> Self {
        Self {
            train: train.report.clone(),
            eval: eval.map(|eval| eval.report.clone()),
        }
    }
}

impl fmt::Display for Reports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { train, eval } = self;
        match eval {
            None => write!(f, "{train}"),
            Some(eval) => write!(f, "training pairs\n{train}\nheld-out pairs\n{eval}"),
        }
    }
}

/// The first `evaluate.batch_pairs` of the held-out pairs.
pub(crate) fn held_out<'a>(spec: &Spec, eval: Option<&'a Dataset>) -> &'a [Pair] {
    let pairs = eval.map_or(&[][..], |eval| &eval.pairs);
    let most = spec.evaluate.batch_pairs.unwrap_or(usize::MAX);
    &pairs[..pairs.len().min(most)]
}

/// Digest of a model as a function: its weights, and everything of its description that changes what they compute.
pub(crate) fn model_digest(model: &Model) -> [u8; 32] {
    // Weights alone do not tell a rotary base, a window or a residual form. Every field is named, so that a new one is decided.
    let ModelConfig {
        family: _,
        vocabulary,
        hidden,
        norm,
        norm_epsilon,
        residual,
        projections,
        biases,
        head_norms,
        attention,
        rotary,
        window_rotary,
        mlp,
        embedding_scale,
        logit_cap,
        tied,
        positions_max: _,
        eos_ids: _,
        bos_id: _,
        notes: _,
    } = model.config();
    let shape = (vocabulary, hidden, tied, norm, norm_epsilon, residual);
    let attention = (projections, biases, head_norms, attention);
    let rest = (rotary, window_rotary, mlp, embedding_scale, logit_cap);
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"caldpo model 2");
    hasher.update(&model.weights_digest());
    hasher.update(format!("{:?}", (shape, attention, rest)).as_bytes());
    *hasher.finalize().as_bytes()
}

/// Refuses ids without an embedding, which the forward would panic on.
pub(crate) fn check_vocabulary(
    pairs: &[Pair],
    vocabulary: usize,
    model: &Path,
) -> Result<(), TrainError> {
    for pair in pairs {
        for ids in [&pair.prompt, &pair.chosen, &pair.rejected] {
            check_ids(ids, &pair.place, vocabulary, model)?;
        }
    }
    Ok(())
}

/// The same for the ids of one place.
pub(crate) fn check_ids(
    ids: &[u32],
    place: &dyn fmt::Display,
    vocabulary: usize,
    model: &Path,
) -> Result<(), TrainError> {
    match ids.iter().find(|&&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(&id) => Err(TrainError::Vocabulary {
            place: place.to_string(),
            id,
            vocabulary,
            model: model.to_owned(),
        }),
    }
}

fn check_positions(model: &Model, max_length: usize) {
    if let Some(positions) = model.config().positions_max
        && max_length > positions
    {
        tracing::warn!(
            max_length,
            positions,
            "data.max_length is longer than the model was made for (max_position_embeddings)"
        );
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut digits, byte| {
        write!(digits, "{byte:02x}").expect("a string takes everything");
        digits
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn whatever_changes_the_function_changes_the_digest_and_nothing_else() {
        let neox = json!({ "model_type": "gpt_neox", "vocab_size": 30, "hidden_size": 16, "intermediate_size": 20,
            "num_hidden_layers": 2, "num_attention_heads": 2, "rotary_pct": 0.5, "max_position_embeddings": 64 });
        let gemma = json!({ "model_type": "gemma2", "vocab_size": 30, "hidden_size": 16, "intermediate_size": 20,
            "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4, "max_position_embeddings": 64 });
        let digest = |base: &Value, key: &str, value: Value| {
            let mut config = base.clone();
            config[key] = value;
            let config = ModelConfig::parse(&config.to_string(), Path::new("config.json"))
                .unwrap_or_else(|error| panic!("{error}"));
            // Equal shapes and seed: equal weights.
            model_digest(&Model::random(config, 1, &Device::flex()))
        };
        for (base, key, value, changes) in [
            (&neox, "use_parallel_residual", json!(false), true),
            (&neox, "hidden_act", json!("gelu_new"), true),
            (&neox, "rotary_pct", json!(1.0), true),
            (&neox, "rotary_emb_base", json!(500), true),
            (&neox, "layer_norm_eps", json!(1e-3), true),
            (&neox, "eos_token_id", json!(7), false),
            (&neox, "max_position_embeddings", json!(128), false),
            (&gemma, "final_logit_softcapping", json!(20.0), true),
            (&gemma, "attn_logit_softcapping", Value::Null, true),
            (&gemma, "query_pre_attn_scalar", json!(8), true),
            (&gemma, "sliding_window", json!(9), true),
            (&gemma, "attention_dropout", json!(0.1), false),
        ] {
            let same = digest(base, "bos_token_id", json!(1)) == digest(base, key, value);
            assert_eq!(same, !changes, "{key}");
        }
    }
}

//! Log-probs of pairs by one model, on this process alone: the forward that training uses, for looking at and comparing with.

use std::path::PathBuf;

use data::{DataConfig, Format, Needs, Pair, Sides, Tokenizer};
use model::{Device, Model};

use crate::adapter::put_on;
use crate::batch::Batch;
use crate::error::TrainError;
use crate::lanes::Lanes;
use crate::setup::check_vocabulary;

/// What to score.
#[derive(Clone, Debug)]
pub struct ScoreRequest {
    /// Hugging Face directory.
    pub model: PathBuf,
    /// An adapter to put on it, in PEFT's format.
    pub adapter: Option<PathBuf>,
    /// Files and how to read them; `data.train` is what is scored.
    pub data: DataConfig,
    /// Most tokens that go through the model at once.
    pub micro_batch_tokens: usize,
}

/// A pair's log-probs, summed over tokens, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredPair {
    /// Place among the pairs that were not dropped, from 0.
    pub index: usize,
    /// The pair.
    pub pair: Pair,
    /// log π(chosen | prompt); `None` for an undesirable row of unpaired data.
    pub chosen_logp: Option<f32>,
    /// log π(rejected | prompt); `None` for completion data and desirable rows.
    pub rejected_logp: Option<f32>,
}

/// Pairs that are planned together; a group's results come in order, so nothing large is held back.
const GROUP_PAIRS: usize = 256;

/// Scores every pair and hands it to `each` in order, until `each` says stop with an error of its own. Returns the number of
/// pairs.
///
/// # Errors
/// A file that cannot be used.
pub fn score<E: From<TrainError>>(
    request: &ScoreRequest,
    device: &Device,
    each: &mut dyn FnMut(ScoredPair) -> Result<(), E>,
) -> Result<usize, E> {
    let (model, pairs) = load(request, device)?;
    let mut lanes = Lanes::new(device);
    let pack_tokens = lanes.pack_tokens(request.micro_batch_tokens);
    for (group, pairs) in pairs.chunks(GROUP_PAIRS).enumerate() {
        let batch = Batch::new(pairs.iter().collect(), pack_tokens, 0, 1);
        let side_by_side = lanes.count(&batch.own_tokens(), request.micro_batch_tokens);
        let score = |index: usize| model.forward(&batch.pack(&batch.own[index]));
        let scored = lanes.all(side_by_side, batch.own.len(), &score)?;
        let mut logps = vec![[0.0; 2]; pairs.len()];
        for (slots, scored) in batch.own.iter().zip(scored) {
            for (&slot, scored) in slots.iter().zip(scored.logps) {
                logps[slot] = scored;
            }
        }
        for (slot, (pair, [chosen, rejected])) in pairs.iter().zip(logps).enumerate() {
            each(ScoredPair {
                index: group * GROUP_PAIRS + slot,
                chosen_logp: (!pair.chosen.is_empty()).then_some(chosen),
                rejected_logp: (!pair.rejected.is_empty()).then_some(rejected),
                pair: pair.clone(),
            })?;
        }
    }
    Ok(pairs.len())
}

fn load(request: &ScoreRequest, device: &Device) -> Result<(Model, Vec<Pair>), TrainError> {
    let data = &request.data;
    let tokenizer = Tokenizer::load(&request.model, data.chat_template.as_deref())?;
    // A file without a rejected side is read for its completions.
    let needs = Needs {
        sides: match data.format {
            Format::Completion => Sides::Chosen,
            _ => Sides::Either,
        },
        scores: false,
    };
    let pairs = data::load(&data.train, data, &tokenizer, needs)?.pairs;
    let mut model = Model::load(&request.model, device)?;
    put_on(request.adapter.as_deref(), &mut model)?;
    check_vocabulary(&pairs, model.config().vocabulary, &request.model)?;
    Ok((model, pairs))
}

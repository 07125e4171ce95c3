//! What can end a process's part in a run, and who is to act on it.

use spec::SpecError;

use std::path::PathBuf;

use crate::gate::GateClosed;

/// Why training could not begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A value of the configuration cannot work.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The model's folder is not there.
    #[error(
        "model.path: there is no folder {} on this machine; name a folder in Hugging Face layout (config.json, *.safetensors, \
         tokenizer.json) that every worker sees under this path",
        path.display()
    )]
    NoModel {
        /// The folder, from the root.
        path: PathBuf,
    },
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] data::TokenizerError),
    /// The pairs cannot be used.
    #[error(transparent)]
    Data(#[from] data::DataError),
    /// The model cannot be used.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// The GPU has no room for the job.
    #[error("{0}")]
    Gpu(Box<crate::plan::GpuRefusal>),
    /// A token that the model has no embedding for.
    #[error(
        "{place}: token id {id} is not below the vocabulary size {vocabulary} of {}/config.json; tokenizer.json belongs to \
         another model",
        model.display()
    )]
    Vocabulary {
        /// The pair with the token.
        place: String,
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocabulary: usize,
        /// The model directory.
        model: PathBuf,
    },
    /// A prompt that cannot be continued.
    #[error("{place} for {}: {source}", model.display())]
    Prompt {
        /// Where the prompt comes from.
        place: String,
        /// The model directory.
        model: PathBuf,
        /// What is wrong with it.
        source: data::PromptError,
    },
    /// model.reference and model.path do not share a vocabulary.
    #[error(
        "model.reference: {} has a vocabulary of {found}, model.path has {expected}; the reference must read the same tokens",
        path.display()
    )]
    ReferenceVocabulary {
        /// The reference directory.
        path: PathBuf,
        /// The policy's vocabulary size.
        expected: usize,
        /// The reference's.
        found: usize,
    },
    /// The reference store cannot be used.
    #[error(transparent)]
    Store(#[from] refcache::StoreError),
    /// The reference store cannot be written.
    #[error(transparent)]
    Append(#[from] refcache::AppendError),
    /// The reference store holds another value than is computed now.
    #[error(
        "{}: the stored reference log-prob of a completion of {place} is {stored}, computed now it is {computed}; the values \
         were made by another program or machine, remove the folder and start again",
        store.display()
    )]
    StoreDisagrees {
        /// The store's folder.
        store: PathBuf,
        /// The pair.
        place: String,
        /// The value found.
        stored: f32,
        /// The value computed.
        computed: f32,
    },
    /// All ranks are ready and values are still missing.
    #[error(
        "{}: {missing} of {total} reference log-probs are missing after every rank stored its part; all workers must use the \
         same build and kind of machine, and see one folder as reference.store or exchange values through reference.shared",
        store.display()
    )]
    ReferenceMissing {
        /// The store's folder.
        store: PathBuf,
        /// Values not found.
        missing: usize,
        /// Values needed.
        total: usize,
    },
    /// The reference model gives a pair no finite log-prob.
    #[error("{place}: the reference log-prob is {value}; check the weights of the reference model")]
    ReferenceNotFinite {
        /// The pair.
        place: String,
        /// Its log-prob.
        value: f32,
    },
    /// What an export needs of the model could not be copied beside the checkpoints.
    #[error(transparent)]
    Source(#[from] checkpoint::ExportError),
    /// The checkpoint to go on from is not this run's, or cannot be read.
    #[error("resume from {}: {reason}", path.display())]
    Resume {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The control side asked for a step that does not follow.
    #[error("asked for step {asked} after step {committed} of {total}")]
    Order {
        /// The step asked for.
        asked: u64,
        /// The last committed step.
        committed: u64,
        /// Steps of the run.
        total: u64,
    },
    /// Nobody is left who holds a part of the optimizer's moments.
    #[error(
        "the moments of shard {shard} are lost with the ranks that held them; the run goes on from a checkpoint"
    )]
    LostShard {
        /// The rank whose shard it was.
        shard: usize,
    },
    /// A rank of a new generation is not where the others are.
    #[error("rank {rank} is at step {step} where step {committed} was committed last")]
    Apart {
        /// The rank.
        rank: usize,
        /// Its step.
        step: u64,
        /// The last commit.
        committed: u64,
    },
    /// Copies that must be equal to the bit are not.
    #[error(
        "after step {step} {what} differ between rank {rank} and rank {other}: one of their machines computes wrongly, or they          run different programs; go on from the last checkpoint without it"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// Which copies.
        what: String,
        /// The first rank that differs.
        rank: usize,
        /// From this one.
        other: usize,
    },
    /// A rank was asked for what it does not hold.
    #[error("this worker does not hold {what}; it can only join anew")]
    NotHeld {
        /// What.
        what: String,
    },
    /// A peer was lost.
    #[error(transparent)]
    Collective(#[from] collective::CollectiveError),
    /// The control side is gone.
    #[error(transparent)]
    Closed(#[from] GateClosed),
    /// A thread could not be started.
    #[error("start the {thread} thread: {source}")]
    Thread {
        /// Which.
        thread: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Who is to act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Configuration or input: the same attempt fails again.
    Config,
    /// A lost process or connection: trying again may help.
    Temporary,
    /// Anything else.
    Fatal,
}

impl TrainError {
    /// Who is to act.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Spec(_)
            | Self::NoModel { .. }
            | Self::Tokenizer(_)
            | Self::Data(_)
            | Self::Model(_)
            | Self::Gpu(_)
            | Self::Vocabulary { .. }
            | Self::Prompt { .. }
            | Self::ReferenceVocabulary { .. }
            | Self::ReferenceNotFinite { .. }
            | Self::StoreDisagrees { .. } => Cause::Config,
            Self::Collective(_)
            | Self::Closed(_)
            | Self::Thread { .. }
            | Self::LostShard { .. }
            | Self::NotHeld { .. }
            | Self::Store(refcache::StoreError::InUse { .. }) => Cause::Temporary,
            Self::Store(_)
            | Self::Append(_)
            | Self::Source(_)
            | Self::ReferenceMissing { .. }
            | Self::Resume { .. }
            | Self::Apart { .. }
            | Self::Diverged { .. }
            | Self::Order { .. } => Cause::Fatal,
        }
    }
}

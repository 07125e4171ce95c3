//! The model: a decoder's weights on a device, its forward over packs and its backward, block by block in reverse.
//!
//! Shapes: n tokens of the pack, h = hidden, p predictions (completion tokens that are scored).
//! `x` is the residual stream, `[n, h]`; the head sees only the `[p, h]` rows that predict something.

use std::path::Path;
use std::time::{Duration, Instant};

use kernels::{
    Device, Flat, Gradients, HeadSaved, Precision, RotaryTable, Slot, Tensor, embedding,
    embedding_backward, gather_rows, linear, logprob_head, logprob_head_backward,
    logprob_head_backward_shared, scatter_add_rows, soft_cap,
};

use crate::block::{Block, BlockSaved, Rows, Tables};
use crate::digest::WeightsDigest;
use crate::operations::{AdapterWeights, Norm, NormSaved, Weights};
use crate::pack::{Pack, Predictions};
use crate::rotary::Frequencies;
use crate::slots::Slots;
use crate::sums::{InputGradient, Sums};
use crate::{Layout, Lora, ModelConfig, ModelError, Stage, weights};

/// A decoder with its weights, f32, on one device. With an adapter only that is trained. Products may be of bf16, made of the
/// weights; then the weights may also be elsewhere ([`Model::take_masters`]), and the model computes the same without them.
pub struct Model {
    config: ModelConfig,
    layout: Layout,
    slots: Slots,
    weights: Flat,
    /// Digest of weights that were loaded frozen, whose f32 values are gone.
    frozen: Option<[u8; 32]>,
    adapter: Option<Adapter>,
    frequencies: Frequencies,
    window_frequencies: Option<Frequencies>,
    saving: Saving,
}

/// What [`Model::adapt`] put on.
struct Adapter {
    layout: Layout,
    weights: Flat,
    scale: f32,
}

/// Log-probs of a pack's completions, one entry per segment: `[chosen, rejected]`.
#[derive(Clone, Debug, PartialEq)]
pub struct PackLogps {
    /// Sum of the token log-probs, accumulated in f64; 0 for an empty completion.
    pub logps: Vec<[f32; 2]>,
    /// Number of tokens summed.
    pub counts: Vec<[u32; 2]>,
}

/// What [`Model::forward_train`] keeps of every block for the backward. The bits of all results are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Saving {
    /// Whatever costs a matrix product or attention to make again.
    #[default]
    Operands,
    /// Only the block's input; the backward runs the block forward once more (gradient checkpointing): a third more
    /// time, and memory of one block instead of all.
    BlockInputs,
}

/// What [`Model::backward`] needs of a forward. It keeps no view of the weights.
pub struct Saved {
    /// `None` when the pack predicts nothing.
    tape: Option<Tape>,
    segments: usize,
    /// Time that the forward spent in the log-prob head.
    pub head_time: Duration,
}

/// How a backward ended.
pub struct BackwardEnd {
    /// What is left for the embedding; nothing where it is frozen or nothing was predicted.
    pub input: Option<InputGradient>,
    /// Time spent in the log-prob head, waiting for its sums included.
    pub head_time: Duration,
}

struct Tape {
    pack: Pack,
    tables: Tables,
    blocks: Vec<Kept>,
    predictions: Predictions,
    /// Rows of the last block's output that predict, `[p, h]`.
    picked: Tensor<2>,
    norm: NormSaved,
    normed: Tensor<2>,
    head: HeadSaved,
}

enum Kept {
    Operands(Box<BlockSaved>),
    Input(Box<Tensor<2>>),
}

/// Every hidden state of one text, for tests and tools.
pub struct Trace {
    /// As transformers' `output_hidden_states`: the embedding, the output of every block but the last, and the last
    /// one's after the final norm; `[n, h]` each, blocks + 1 of them.
    pub hidden: Vec<Tensor<2>>,
    /// `[n, vocabulary]`.
    pub logits: Tensor<2>,
}

impl Model {
    /// Reads config.json and the safetensors files of a Hugging Face directory; every weight becomes f32.
    pub fn load(dir: &Path, device: &Device) -> Result<Self, ModelError> {
        let config = ModelConfig::load(dir)?;
        let layout = Layout::new(&config);
        let weights = weights::load(dir, &layout, &config)?;
        let weights = Flat::read(weights, Precision::F32, device)?;
        Ok(Self::with_weights(config, layout, weights))
    }

    /// As [`Model::load`], for products of bf16, with nothing on the device that a forward does not read: f32 weights stay in the
    /// host's memory until [`Model::take_masters`] or [`Model::put_masters`]; weights of bf16 take nothing there.
    pub fn load_parked(dir: &Path, device: &Device) -> Result<Self, ModelError> {
        let config = ModelConfig::load(dir)?;
        let layout = Layout::new(&config);
        let weights = weights::load(dir, &layout, &config)?;
        let weights = Flat::parked(weights, &layout.narrow(), device)?;
        Ok(Self::with_weights(config, layout, weights))
    }

    /// As [`Model::load`], for products of `precision` and weights that are never trained: a reference, or what an adapter is put on.
    /// In bf16 nothing is kept of them but what a forward reads, 2 bytes a parameter on a GPU, and the host holds one bucket of f32
    /// at a time.
    pub fn load_frozen(
        dir: &Path,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, ModelError> {
        if precision == Precision::F32 {
            return Self::load(dir, device);
        }
        let config = ModelConfig::load(dir)?;
        let layout = Layout::new(&config);
        let mut digest = WeightsDigest::new();
        let buckets = weights::load(dir, &layout, &config)?.zip(&layout.buckets);
        let buckets = buckets.map(|(values, bucket)| {
            let values = values?;
            for parameter in &layout.parameters[bucket.parameters.clone()] {
                digest.add(parameter, &values[parameter.range()]);
            }
            Ok(values)
        });
        let weights = Flat::frozen::<ModelError>(buckets, &layout.narrow(), device)?;
        Ok(Self {
            frozen: Some(digest.finish()),
            ..Self::with_weights(config, layout, weights)
        })
    }

    /// A model from its description and its flat weights, bucket by bucket as in [`Layout::new`].
    pub fn from_parts(
        config: ModelConfig,
        weights: Vec<Vec<f32>>,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let layout = Layout::new(&config);
        let (expected, found) = (layout.bucket_lens(), weights.iter().map(Vec::len).collect());
        if expected != found {
            return Err(ModelError::Buckets { expected, found });
        }
        let weights = Flat::from_host(weights, Precision::F32, device);
        Ok(Self::with_weights(config, layout, weights))
    }

    fn with_weights(config: ModelConfig, layout: Layout, weights: Flat) -> Self {
        Self {
            slots: Slots::new(&layout, &config, None),
            weights,
            frozen: None,
            adapter: None,
            frequencies: config.rotary.frequencies(config.head_dim()),
            window_frequencies: config
                .window_rotary
                .as_ref()
                .map(|plan| plan.frequencies(config.head_dim())),
            saving: Saving::default(),
            config,
            layout,
        }
    }

    /// A fresh model with [`random_weights`](crate::random_weights), the same for the same seed.
    pub fn random(config: ModelConfig, seed: u64, device: &Device) -> Self {
        let weights = crate::random_weights(&config, seed);
        Self::from_parts(config, weights, device).expect("random weights follow the layout")
    }

    /// Puts `adapter` on; the model's own weights are frozen from here on.
    ///
    /// # Errors
    /// Targets that the model does not have, or weights that are not theirs.
    pub fn adapt(&mut self, lora: &Lora, weights: Vec<Vec<f32>>) -> Result<(), ModelError> {
        let layout = lora.layout(&self.config)?;
        let (expected, found) = (layout.bucket_lens(), weights.iter().map(Vec::len).collect());
        if expected != found {
            return Err(ModelError::Buckets { expected, found });
        }
        self.slots = Slots::new(&self.layout, &self.config, Some((lora, &layout)));
        self.adapter = Some(Adapter {
            weights: Flat::from_host(weights, self.precision(), self.device()),
            scale: lora.scale() as f32,
            layout,
        });
        Ok(())
    }

    /// The decoder as data.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where every parameter of the model itself lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where every parameter that is trained lies: the adapter's, or the model's own.
    pub fn trained(&self) -> &Layout {
        match &self.adapter {
            Some(adapter) => &adapter.layout,
            None => &self.layout,
        }
    }

    /// The device that computes.
    pub fn device(&self) -> &Device {
        self.weights.device()
    }

    /// BLAKE3 of the model's own f32 weights, as they were read where they are frozen, in layout order with their names and shapes:
    /// equal digests compute the same function.
    pub fn weights_digest(&self) -> [u8; 32] {
        if let Some(digest) = self.frozen {
            return digest;
        }
        let mut digest = WeightsDigest::new();
        for parameter in &self.layout.parameters {
            digest.add(parameter, &self.weights.master(&parameter.slot()));
        }
        digest.finish()
    }

    /// The arithmetic of products.
    pub fn precision(&self) -> Precision {
        self.weights.precision()
    }

    /// Chooses the arithmetic of products.
    pub fn set_precision(&mut self, precision: Precision) {
        self.weights.set_precision(precision);
        if let Some(adapter) = &mut self.adapter {
            adapter.weights.set_precision(precision);
        }
    }

    /// Chooses what [`Model::forward_train`] keeps.
    pub fn set_saving(&mut self, saving: Saving) {
        self.saving = saving;
    }

    /// Log-probs of the completions of `pack`, keeping nothing.
    ///
    /// # Panics
    /// If a token id is not below the vocabulary size.
    pub fn forward(&self, pack: &Pack) -> PackLogps {
        let Run {
            tokens,
            predictions,
            ..
        } = self.run(pack, None);
        sums(&tokens, &predictions)
    }

    /// As [`Model::forward`], to the bit, and what the backward needs.
    pub fn forward_train(&self, pack: &Pack) -> (PackLogps, Saved) {
        let run = self.run(pack, Some(self.saving));
        let logps = sums(&run.tokens, &run.predictions);
        let tape = run.tape;
        let tape = tape.map(|tape| tape.close(pack.clone(), run.predictions));
        (
            logps,
            Saved {
                tape,
                segments: pack.segments.len(),
                head_time: run.head_time,
            },
        )
    }

    /// The log-prob of every scored completion token, one list per completion; [`Model::forward`] sums them.
    pub fn token_logps(&self, pack: &Pack) -> Vec<[Vec<f32>; 2]> {
        let run = self.run(pack, None);
        run.predictions.split(&run.tokens)
    }

    /// Adds to `gradients` the gradient of Σ `dlogps[s][c]` · logps[s][c] over segments and completions.
    pub fn backward(&self, saved: Saved, dlogps: &[[f32; 2]], gradients: &mut Gradients) {
        let end = self.backward_into(saved, dlogps, gradients);
        if let Some(input) = end.input {
            self.backward_input(input, gradients);
        }
    }

    /// Adds what [`Model::backward_into`] left for the embedding to its gradient.
    pub fn backward_input(&self, input: InputGradient, gradients: &mut Gradients) {
        let InputGradient { tokens, dx } = input;
        embedding_backward(&dx, &tokens, gradients, &self.slots.embedding);
    }

    /// As [`Model::backward`], adding to `sums` as it comes to each stage; the embedding is left to the caller.
    pub fn backward_into(
        &self,
        saved: Saved,
        dlogps: &[[f32; 2]],
        sums: &mut dyn Sums,
    ) -> BackwardEnd {
        assert_eq!(dlogps.len(), saved.segments, "derivatives and segments");
        let Some(tape) = saved.tape else {
            return BackwardEnd {
                input: None,
                head_time: Duration::ZERO,
            };
        };
        let start = Instant::now();
        let mut dx = self.head_backward(&tape, dlogps, sums);
        let head_time = start.elapsed();
        let rows = Rows {
            tables: &tape.tables,
            segments: &tape.pack.segments,
        };
        for (index, kept) in tape.blocks.into_iter().enumerate().rev() {
            let block = self.block(index);
            let saved = match kept {
                Kept::Operands(saved) => *saved,
                Kept::Input(x) => block.forward(*x, &rows).1,
            };
            let mut saved = Some(saved);
            sums.stage(Stage::Block(index), &mut |gradients| {
                let saved = saved.take().expect("a stage is passed once");
                dx = block.backward(&dx, saved, &rows, gradients);
            });
        }
        let input = self.adapter.is_none().then(|| InputGradient {
            tokens: tape.pack.tokens,
            dx: match self.config.embedding_scale {
                Some(scale) => dx.scale(scale),
                None => dx,
            },
        });
        BackwardEnd { input, head_time }
    }

    /// Where the table of tokens lies among what is trained.
    pub fn embedding_slot(&self) -> Slot {
        self.slots.embedding
    }

    /// Where the head's weight lies among what is trained: the embedding's place when tied.
    pub fn head_slot(&self) -> Slot {
        self.slots.head
    }

    /// Whether the model's own weights are trained, and not an adapter alone.
    pub fn trains_itself(&self) -> bool {
        self.adapter.is_none()
    }

    /// Zeros laid out like what is trained.
    pub fn zero_gradients(&self) -> Gradients {
        Gradients::zeros(&self.trained().bucket_lens(), self.device())
    }

    /// The flat weights that are trained as host memory, without a copy on the CPU; the model computes nothing until
    /// [`Model::put_weights`].
    pub fn take_weights(&mut self) -> Vec<Vec<f32>> {
        self.trained_weights().take_host()
    }

    /// Puts the flat weights that are trained (back) in place.
    ///
    /// # Panics
    /// If their lengths are not those of [`Model::trained`].
    pub fn put_weights(&mut self, weights: Vec<Vec<f32>>) {
        let lens: Vec<usize> = weights.iter().map(Vec::len).collect();
        let expected = self.trained().bucket_lens();
        assert_eq!(lens, expected, "lengths of the weight buckets");
        self.trained_weights().put_host(weights);
    }

    /// The flat weights that are trained, where they lie.
    pub fn flat(&self) -> &Flat {
        match &self.adapter {
            Some(adapter) => &adapter.weights,
            None => &self.weights,
        }
    }

    /// The same, for changing what a forward reads of weights whose masters are elsewhere.
    pub fn flat_mut(&mut self) -> &mut Flat {
        self.trained_weights()
    }

    /// The f32 weights that are trained, by bucket, where products are of bf16: the model computes on with what it has of them. They
    /// are memory of the device, or what [`Model::load_parked`] has of them.
    ///
    /// # Panics
    /// If they have been taken, or products are of f32.
    pub fn take_masters(&mut self) -> Vec<Tensor<1>> {
        let narrow = self.trained().narrow();
        self.trained_weights().take_masters(&narrow)
    }

    /// Puts f32 weights that were taken (back) in place, on the device.
    ///
    /// # Panics
    /// If their lengths are not those of [`Model::trained`].
    pub fn put_masters(&mut self, masters: Vec<Tensor<1>>) {
        let lens: Vec<usize> = masters.iter().map(|bucket| bucket.dims()[0]).collect();
        let expected = self.trained().bucket_lens();
        assert_eq!(lens, expected, "lengths of the weight buckets");
        self.trained_weights().put_masters(masters);
    }

    /// To be called after the trained weights were changed where they lie.
    pub fn refresh(&mut self) {
        self.trained_weights().refresh();
    }

    fn trained_weights(&mut self) -> &mut Flat {
        if let Some(adapter) = &mut self.adapter {
            return &mut adapter.weights;
        }
        assert!(self.frozen.is_none(), "weights that were loaded frozen");
        &mut self.weights
    }

    fn both(&self) -> Weights<'_> {
        let adapter = self.adapter.as_ref();
        Weights {
            base: &self.weights,
            adapter: adapter.map(|adapter| AdapterWeights {
                flat: &adapter.weights,
                scale: adapter.scale,
            }),
        }
    }

    /// All hidden states and logits of one text.
    pub fn trace(&self, tokens: &[u32]) -> Trace {
        let pack = text(tokens);
        let tables = self.tables(&pack);
        let rows = Rows {
            tables: &tables,
            segments: &pack.segments,
        };
        let mut x = self.embed(tokens);
        let mut hidden = Vec::new();
        for index in 0..self.config.blocks() {
            hidden.push(x.clone());
            x = self.block(index).forward(x, &rows).0;
        }
        let (normed, _) = self.final_norm(&x);
        let logits = self.logits(&normed);
        hidden.push(normed);
        Trace { hidden, logits }
    }

    /// Log-probs of all predictions, and the open tape if something is to be kept.
    fn run(&self, pack: &Pack, saving: Option<Saving>) -> Run {
        let predictions = pack.predictions();
        if predictions.rows.is_empty() {
            return Run {
                tokens: Vec::new(),
                predictions,
                tape: None,
                head_time: Duration::ZERO,
            };
        }
        let tables = self.tables(pack);
        let rows = Rows {
            tables: &tables,
            segments: &pack.segments,
        };
        let mut x = self.embed(&pack.tokens);
        let mut blocks = Vec::new();
        for index in 0..self.config.blocks() {
            let block = self.block(index);
            let input = (saving == Some(Saving::BlockInputs)).then(|| x.clone());
            let (y, saved) = block.forward(x, &rows);
            match (saving, input) {
                (Some(_), Some(input)) => blocks.push(Kept::Input(Box::new(input))),
                (Some(_), None) => blocks.push(Kept::Operands(Box::new(saved))),
                (None, _) => drop(saved),
            }
            x = y;
        }
        let start = Instant::now();
        let picked = gather_rows(&x, &predictions.rows);
        let (normed, norm) = self.final_norm(&picked);
        let (tokens, head) = logprob_head(
            &normed,
            &self.head(),
            &predictions.targets,
            self.config.logit_cap,
        );
        let tape = saving.map(|_| OpenTape {
            tables,
            blocks,
            picked,
            norm,
            normed,
            head,
        });
        Run {
            tokens,
            predictions,
            tape,
            head_time: start.elapsed(),
        }
    }

    /// The gradient of the last block's output, `[n, h]`.
    fn head_backward(&self, tape: &Tape, dlogps: &[[f32; 2]], sums: &mut dyn Sums) -> Tensor<2> {
        let Predictions { rows, targets, .. } = &tape.predictions;
        let dlogps = tape.predictions.spread(dlogps);
        let cap = self.config.logit_cap;
        let (normed, head, saved) = (&tape.normed, &self.head(), &tape.head);
        let alone = |sums: Option<(&mut Gradients, &Slot)>| {
            logprob_head_backward(&dlogps, normed, head, targets, cap, saved, sums)
        };
        let dnormed = if self.adapter.is_some() {
            alone(None)
        } else if let Some(tiles) = sums.head() {
            logprob_head_backward_shared(&dlogps, normed, head, targets, cap, saved, tiles)
        } else {
            let mut dnormed = None;
            sums.stage(Stage::Head, &mut |gradients| {
                dnormed = Some(alone(Some((gradients, &self.slots.head))));
            });
            dnormed.expect("a stage is passed once")
        };
        let mut dpicked = None;
        sums.stage(Stage::Norm, &mut |gradients| {
            dpicked = Some(self.slots.norm.norm_backward(
                self.both(),
                &dnormed,
                &tape.picked,
                &tape.norm,
                self.config.norm,
                gradients,
            ));
        });
        let dpicked = dpicked.expect("a stage is passed once");
        scatter_add_rows(&dpicked, rows, tape.pack.len())
    }

    pub(crate) fn block(&self, index: usize) -> Block<'_> {
        Block {
            weights: self.both(),
            slots: &self.slots.blocks[index],
            plan: &self.config.attention[index],
            config: &self.config,
        }
    }

    pub(crate) fn embed(&self, tokens: &[u32]) -> Tensor<2> {
        let shape = [self.config.vocabulary, self.config.hidden];
        // The operand, so that the bits do not depend on who has the masters.
        let x = embedding(&self.weights.operand(&self.slots.embedding, shape), tokens);
        match self.config.embedding_scale {
            Some(scale) => x.scale(scale),
            None => x,
        }
    }

    /// The turns of a pack's rows. A row turns as in its longer sequence: the prompt is shared, and where the frequencies
    /// depend on the length (longrope) a pair has one length.
    pub(crate) fn tables(&self, pack: &Pack) -> Tables {
        let mut lengths = vec![0; pack.len()];
        for segment in &pack.segments {
            let [chosen, rejected] = segment.completions.each_ref().map(ExactSizeIterator::len);
            let length = segment.prompt.len() + chosen.max(rejected);
            let parts = segment.completions.iter().chain([&segment.prompt]);
            for row in parts.cloned().flatten() {
                lengths[row] = length;
            }
        }
        self.turns(&pack.positions, &lengths)
    }

    /// The turns of rows at `positions` in sequences of `lengths` tokens.
    pub(crate) fn turns(&self, positions: &[u32], lengths: &[usize]) -> Tables {
        let table = |frequencies: &Frequencies| {
            RotaryTable::by_row(
                positions,
                frequencies.len(),
                |row| frequencies.of(lengths[row]),
                frequencies.attention,
                self.device(),
            )
        };
        Tables {
            usual: table(&self.frequencies),
            window: self.window_frequencies.as_ref().map(table),
        }
    }

    fn final_norm(&self, x: &Tensor<2>) -> (Tensor<2>, NormSaved) {
        let norm = Norm {
            kind: self.config.norm,
            epsilon: self.config.norm_epsilon,
        };
        self.slots.norm.norm_operand(self.both(), x, norm)
    }

    /// Logits of rows after the final norm.
    fn logits(&self, normed: &Tensor<2>) -> Tensor<2> {
        let logits = linear(normed, &self.head());
        match self.config.logit_cap {
            Some(cap) => soft_cap(&logits, cap),
            None => logits,
        }
    }

    /// Logits of the last block's output.
    pub(crate) fn predict(&self, x: &Tensor<2>) -> Tensor<2> {
        self.logits(&self.final_norm(x).0)
    }

    fn head(&self) -> Tensor<2> {
        self.weights.operand(
            &self.slots.head,
            [self.config.vocabulary, self.config.hidden],
        )
    }
}

/// A text as a pack that attends to all of itself and predicts nothing.
pub(crate) fn text(tokens: &[u32]) -> Pack {
    Pack::new([crate::PairTokens {
        prompt: tokens,
        chosen: &[],
        rejected: &[],
    }])
}

/// What [`Model::run`] found.
struct Run {
    /// Log-probs in the order of the predictions.
    tokens: Vec<f32>,
    predictions: Predictions,
    tape: Option<OpenTape>,
    head_time: Duration,
}

/// The tape before it owns the pack.
struct OpenTape {
    tables: Tables,
    blocks: Vec<Kept>,
    picked: Tensor<2>,
    norm: NormSaved,
    normed: Tensor<2>,
    head: HeadSaved,
}

impl OpenTape {
    fn close(self, pack: Pack, predictions: Predictions) -> Tape {
        let Self {
            tables,
            blocks,
            picked,
            norm,
            normed,
            head,
        } = self;
        Tape {
            pack,
            tables,
            blocks,
            predictions,
            picked,
            norm,
            normed,
            head,
        }
    }
}

fn sums(tokens: &[f32], predictions: &Predictions) -> PackLogps {
    let sum = |tokens: Vec<f32>| tokens.into_iter().map(f64::from).sum::<f64>() as f32;
    PackLogps {
        logps: predictions
            .split(tokens)
            .into_iter()
            .map(|pair| pair.map(sum))
            .collect(),
        counts: predictions.counts.clone(),
    }
}

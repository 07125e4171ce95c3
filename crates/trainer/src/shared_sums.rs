//! The gradients of a step while several packs go backward at once. Every stage of the model has its own sums, and packs add
//! to them in the order of the packs: a pack waits at a stage until the one before it has left that stage. So one pack
//! follows the other at the distance of one stage (of one tile in the head), and the sums have the bits that packs one after
//! another would give them.
//!
//! When the last pack has left a stage, its gradients are complete and `ready` hears so, while the backward goes on.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use model::{EmbeddingRows, Gradients, InputGradient, Layout, Model, Stage, Sums, TileSums};

/// What the packs of a step add to.
pub(crate) struct SharedSums<'a> {
    model: &'a Model,
    packs: usize,
    /// Norm, then the blocks from the last to the first.
    stages: Vec<(Stage, Turns<Gradients>)>,
    /// The head's weight on the host, in tiles.
    tiles: Option<Vec<Turns<&'a mut [f32]>>>,
    /// Elsewhere: the buckets of the head, which only one lane uses.
    head: Mutex<Gradients>,
    /// On the host: the embedding's part.
    rows: Turns<EmbeddingRows>,
    failed: AtomicBool,
    ready: Ready<'a>,
}

/// Hears of every stage in the order of the backward once all packs have left it.
pub(crate) type Ready<'a> = &'a (dyn Fn(Stage, &mut Gradients) + Sync);

/// The stages that are complete before the backward of the last pack has ended, in the order in which they are.
pub(crate) fn early_stages(blocks: usize) -> impl Iterator<Item = Stage> {
    std::iter::once(Stage::Norm).chain((0..blocks).rev().map(Stage::Block))
}

/// The stages that are complete only then, in the order in which they are reduced.
pub(crate) fn late_stages() -> impl Iterator<Item = Stage> {
    [Stage::Head, Stage::Embedding].into_iter()
}

impl<'a> SharedSums<'a> {
    /// Sums for `packs` packs. `gradients` are all gradients, of which the bucket of the head's weight has been taken as `head`
    /// where it is shared in tiles.
    pub fn new(
        model: &'a Model,
        packs: usize,
        gradients: &mut Gradients,
        head: Option<&'a mut [f32]>,
        ready: Ready<'a>,
    ) -> Self {
        let layout: &Layout = model.trained();
        let stages = early_stages(model.config().blocks())
            .map(|stage| (stage, Turns::new(gradients.split(layout.buckets_of(stage)))));
        let stages = stages.collect();
        let tiles = head.map(|mut rest| {
            let width = model.config().hidden;
            let tiles = model::head_tiles(model.config().vocabulary).map(|rows| {
                let (tile, others) = std::mem::take(&mut rest).split_at_mut(rows.len() * width);
                rest = others;
                Turns::new(tile)
            });
            tiles.collect::<Vec<_>>()
        });
        let elsewhere: Vec<usize> = match tiles {
            Some(_) => Vec::new(),
            None => late_stages()
                .flat_map(|stage| layout.buckets_of(stage))
                .collect(),
        };
        Self {
            model,
            packs,
            stages,
            head: Mutex::new(gradients.split(elsewhere)),
            tiles,
            rows: Turns::new(EmbeddingRows::default()),
            failed: AtomicBool::new(false),
            ready,
        }
    }

    /// The turn of pack `pack`.
    pub fn turn(&self, pack: usize) -> Turn<'_, 'a> {
        Turn {
            sums: self,
            pack,
            stages: 0,
            tiles: 0,
            rows: false,
        }
    }

    /// The gradients, less what `ready` took, and the embedding's part.
    pub fn finish(self) -> (Vec<Gradients>, EmbeddingRows) {
        let stages = self.stages.into_iter().map(|(_, turns)| turns.into_inner());
        let head = self
            .head
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        (stages.chain([head]).collect(), self.rows.into_inner())
    }

    fn last(&self, pack: usize) -> bool {
        pack + 1 == self.packs
    }

    /// Wakes everybody who waits for a turn that will not come.
    fn fail(&self) {
        self.failed.store(true, Ordering::Release);
        self.stages.iter().for_each(|(_, turns)| turns.wake());
        self.tiles.iter().flatten().for_each(Turns::wake);
        self.rows.wake();
    }
}

/// Something that packs use one after another, in order.
struct Turns<T> {
    /// The pack whose turn it is, and what it uses.
    state: Mutex<(usize, T)>,
    changed: Condvar,
}

impl<T> Turns<T> {
    fn new(value: T) -> Self {
        Self {
            state: Mutex::new((0, value)),
            changed: Condvar::new(),
        }
    }

    /// Waits for the turn of `pack`, uses it and passes it on. False when a pack before it failed, so that the turn never comes.
    fn take(&self, pack: usize, failed: &AtomicBool, work: impl FnOnce(&mut T)) -> bool {
        let mut state = self.lock();
        while state.0 != pack {
            if failed.load(Ordering::Acquire) {
                return false;
            }
            let woken = self.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        work(&mut state.1);
        state.0 += 1;
        drop(state);
        self.changed.notify_all();
        true
    }

    fn wake(&self) {
        // Whoever is about to wait holds the lock, and sees the failure or this.
        drop(self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, (usize, T)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn into_inner(self) -> T {
        let state = self.state.into_inner();
        state.unwrap_or_else(PoisonError::into_inner).1
    }
}

/// One pack's way through the sums. Stages that it did not need are passed when it is dropped.
pub(crate) struct Turn<'t, 'a> {
    sums: &'t SharedSums<'a>,
    pack: usize,
    stages: usize,
    tiles: usize,
    rows: bool,
}

impl Turn<'_, '_> {
    /// Adds what is left of a backward for the embedding.
    pub fn input(&mut self, input: InputGradient) {
        let Self { sums, pack, .. } = *self;
        if sums.tiles.is_some() {
            self.rows = true;
            let add = |rows: &mut EmbeddingRows| input.add_to(rows);
            came(sums.rows.take(pack, &sums.failed, add));
        } else {
            let mut gradients = sums.head.lock().unwrap_or_else(PoisonError::into_inner);
            sums.model.backward_input(input, &mut gradients);
        }
    }

    fn next_stage(&mut self, add: impl FnOnce(&mut Gradients)) -> bool {
        let Self { sums, pack, .. } = *self;
        let (stage, turns) = &sums.stages[self.stages];
        self.stages += 1;
        turns.take(pack, &sums.failed, |gradients| {
            add(gradients);
            if sums.last(pack) {
                (sums.ready)(*stage, gradients);
            }
        })
    }
}

/// A pack cannot go on without the one before it, whose failure is the one to be told.
fn came(turn: bool) {
    assert!(turn, "another pack failed");
}

impl Sums for Turn<'_, '_> {
    fn stage(&mut self, stage: Stage, add: &mut dyn FnMut(&mut Gradients)) {
        if stage == Stage::Head {
            let head = &self.sums.head;
            add(&mut head.lock().unwrap_or_else(PoisonError::into_inner));
            return;
        }
        assert_eq!(stage, self.sums.stages[self.stages].0, "order of stages");
        came(self.next_stage(add));
    }

    fn head(&mut self) -> Option<&mut dyn TileSums> {
        self.sums.tiles.is_some().then_some(self as _)
    }
}

impl TileSums for Turn<'_, '_> {
    fn tile(&mut self, _rows: Range<usize>, add: &mut dyn FnMut(&mut [f32])) {
        let Self { sums, pack, .. } = *self;
        let tiles = sums.tiles.as_ref().expect("`head` found tiles");
        let tile = &tiles[self.tiles];
        self.tiles += 1;
        came(tile.take(pack, &sums.failed, |sums| add(sums)));
    }
}

impl Drop for Turn<'_, '_> {
    fn drop(&mut self) {
        let sums = self.sums;
        if std::thread::panicking() {
            return sums.fail();
        }
        for tile in sums.tiles.iter().flatten().skip(self.tiles) {
            tile.take(self.pack, &sums.failed, |_| ());
        }
        while self.stages < sums.stages.len() {
            self.next_stage(|_| ());
        }
        if !self.rows {
            sums.rows.take(self.pack, &sums.failed, |_| ());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::Path;
    use std::sync::mpsc;
    use std::time::Duration;

    use model::{Device, ModelConfig};

    use super::*;

    /// What a pack does before it fails, or before it has to wait.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Until {
        Start,
        Tiles,
        Norm,
    }

    fn go(turn: &mut Turn<'_, '_>, until: Until) {
        let tiles = turn.sums.tiles.as_ref().expect("a head in tiles").len();
        if until != Until::Start {
            (0..tiles).for_each(|_| turn.tile(0..1, &mut |_| ()));
        }
        if until == Until::Norm {
            turn.stage(Stage::Norm, &mut |_| ());
        }
    }

    /// Two packs, of which the second waits for the first, which fails; what became of the second. Nothing is joined, so that a
    /// pack that waits for ever is seen.
    fn second(first_until: Until, second: impl FnOnce(Turn<'_, '_>) + Send + 'static) -> String {
        let config = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 600, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
            "max_position_embeddings": 64, "tie_word_embeddings": false}"#;
        let config = ModelConfig::parse(config, Path::new("config.json")).expect("a config");
        let model: &'static Model = Box::leak(Box::new(Model::random(config, 1, &Device::flex())));
        let mut gradients = model.zero_gradients();
        let head = gradients.take(model.head_slot().bucket);
        let sums = SharedSums::new(model, 2, &mut gradients, Some(head.leak()), &|_, _| ());
        let sums: &'static SharedSums<'static> = Box::leak(Box::new(sums));
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let ended = catch_unwind(AssertUnwindSafe(|| second(sums.turn(1))));
            let text = match ended {
                Ok(()) => "it went on".into(),
                Err(panic) => *panic.downcast::<String>().unwrap_or_else(|other| {
                    Box::new(
                        other
                            .downcast_ref::<&str>()
                            .map_or("?", |text| text)
                            .to_string(),
                    )
                }),
            };
            drop(tell.send(text));
        });
        // It shall be waiting by then; if it is not yet, it sees the failure when it comes.
        std::thread::sleep(Duration::from_millis(50));
        let failed = catch_unwind(AssertUnwindSafe(|| {
            let mut turn = sums.turn(0);
            go(&mut turn, first_until);
            panic!("a fault in pack 0");
        }));
        assert!(failed.is_err());
        let ended = told.recv_timeout(Duration::from_secs(20));
        ended.expect("the second pack still waits for one that failed")
    }

    #[test]
    fn a_pack_that_fails_wakes_the_pack_that_waits_for_it() {
        for until in [Until::Start, Until::Tiles, Until::Norm] {
            let ended = second(until, |mut turn| {
                go(&mut turn, Until::Norm);
                turn.stage(Stage::Block(1), &mut |_| ());
            });
            assert_eq!(ended, "another pack failed", "{until:?}");
        }
    }

    #[test]
    fn a_pack_that_needs_no_sums_leaves_after_one_that_failed() {
        for until in [Until::Start, Until::Tiles, Until::Norm] {
            assert_eq!(second(until, |turn| drop(turn)), "it went on", "{until:?}");
        }
    }
}

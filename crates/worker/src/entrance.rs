//! Into a generation: say what this worker holds, hear who is in it, connect with them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use collective::tcp::Rendezvous;
use collective::{Collective, CollectiveError, single};
use protocol::{
    Awaits, CoordinatorMessage, Generation, Held, Layout, Rank, RunFacts, Step, Terms,
    WorkerMessage,
};
use trainer::plan::Peers;
use trainer::{GateClosed, Membership, Past, Reformation, Sharding};

use crate::gate::{REPEAT, closed};
use crate::session::{Session, Voice};
use crate::transport::Transport;
use crate::watched::Watched;

/// How a worker enters the generations of one job.
pub(crate) struct Entrance<'a> {
    pub(crate) rendezvous: &'a Rendezvous,
    pub(crate) transport: &'a Transport,
    /// How this worker's GPU fares, if it has one.
    pub(crate) gpu: &'a Watched,
    pub(crate) checkpoints: PathBuf,
    /// What holds in the job.
    pub(crate) terms: Terms,
    /// Fewest workers among whom this one's GPU has room, once that is known; else 0.
    pub(crate) workers_min: AtomicU32,
}

/// A generation as its members are told of it.
pub(crate) struct Formed {
    pub(crate) generation: Generation,
    pub(crate) rank: u32,
    pub(crate) addresses: Arc<[String]>,
    secret: [u8; 32],
    committed: Step,
    resume: Option<PathBuf>,
    apply: bool,
    base: Option<Arc<Layout>>,
}

impl Entrance<'_> {
    /// Enters the next generation, with whatever this worker has `held` before; `found` is what a worker that has loaded model
    /// and data found, which a spare says. A generation whose ranks do not find each other is reported, and the one after it
    /// entered.
    ///
    /// # Errors
    /// The session is over.
    pub(crate) fn enter(
        &self,
        session: &Session,
        held: &[Held],
        found: Option<&RunFacts>,
    ) -> Result<(Formed, Box<dyn Collective>), GateClosed> {
        let voice = session.voice();
        loop {
            let form = hear_form(session, held, self.workers_min(), found)?;
            voice.enter(form.generation, &self.rendezvous.aborter());
            voice.know(form.committed);
            if !form.can_be_entered(held) {
                // The coordinator believed an old message: it hears what is true.
                continue;
            }
            match self.connect(voice, &form) {
                Ok(collective) => {
                    voice.enter(form.generation, &collective.aborter());
                    return Ok((form, collective));
                }
                Err(error) => {
                    tracing::warn!("generation {} did not connect: {error}", form.generation);
                    accuse(session, &error);
                }
            }
        }
    }

    fn connect(
        &self,
        voice: &Voice,
        form: &Formed,
    ) -> Result<Box<dyn Collective>, CollectiveError> {
        let (rank, generation) = (form.rank as usize, form.generation.0);
        if form.addresses.len() == 1 {
            return Ok(Box::new(single(generation)));
        }
        let deadline = Instant::now() + self.patience();
        let (addresses, secret) = (&form.addresses, form.secret);
        let tcp = self
            .rendezvous
            .connect(rank, addresses, generation, secret, deadline)?;
        // What follows may wait for peers too, and the rendezvous has nothing left to end.
        voice.enter(form.generation, &tcp.aborter());
        self.transport.connect(tcp, deadline)
    }

    /// Among how many workers this one has room, as the next ones hear who wait for a generation.
    pub(crate) fn learn_room(&self, workers_min: usize) {
        self.workers_min
            .store(workers_min as u32, Ordering::Relaxed);
    }

    pub(crate) fn workers_min(&self) -> u32 {
        self.workers_min.load(Ordering::Relaxed)
    }

    /// The job's workers, if there are so many.
    pub(crate) fn peers(&self, workers: usize) -> Peers {
        Peers {
            workers,
            sharding: self.sharding(),
        }
    }

    /// How its workers share out what training keeps.
    fn sharding(&self) -> Sharding {
        Sharding {
            mirror: self.terms.mirror,
            gradients: self.terms.shard_gradients,
            offload: self.terms.offload,
        }
    }

    /// What training is told of its place in a generation.
    pub(crate) fn membership(
        &self,
        session: &Session,
        form: &Formed,
        collective: Box<dyn Collective>,
    ) -> Membership {
        Membership {
            collective,
            step_deadline: self.patience(),
            checkpoints: self.checkpoints.clone(),
            resume: form.resume.clone(),
            sharding: self.sharding(),
            pulse: session.voice().pulse(),
            generation: form.generation.0,
        }
    }

    /// How long this worker waits for its peers.
    fn patience(&self) -> Duration {
        Duration::from_millis(self.terms.collective_timeout_ms)
    }
}

/// Tells that the present generation's collective broke, unless that was the coordinator's wish.
pub(crate) fn accuse(session: &Session, error: &CollectiveError) {
    if matches!(error, CollectiveError::Aborted { .. }) {
        return;
    }
    let suspect = error.suspect().map(|peer| Rank(peer.rank as u32));
    let message = WorkerMessage::CollectiveFailed {
        suspect,
        reason: error.to_string(),
    };
    // A session that ended is noticed where its answer is needed.
    drop(session.voice().say(message));
}

/// Waits for a Form, and says again what the coordinator needs for it when it asks.
fn hear_form(
    session: &Session,
    held: &[Held],
    workers_min: u32,
    found: Option<&RunFacts>,
) -> Result<Formed, GateClosed> {
    let voice = session.voice();
    voice.await_next(Awaits::Form);
    let say = || -> Result<(), GateClosed> {
        let held = held.to_vec();
        let facts = found.filter(|_| voice.is_spare()).cloned();
        let loaded = facts.map(|facts| WorkerMessage::Loaded { facts });
        let held = WorkerMessage::Held { held, workers_min };
        let mut all = std::iter::once(held).chain(loaded);
        all.try_for_each(|it| voice.say(it))
            .map_err(|error| closed(&error))
    };
    if !session.has_put_back() {
        say()?;
    }
    loop {
        let heard = session.hear(REPEAT).map_err(|error| closed(&error))?;
        match heard.map(|heard| (heard.generation, heard.message)) {
            Some((
                generation,
                CoordinatorMessage::Form {
                    rank,
                    addresses,
                    secret,
                    committed,
                    resume,
                    apply,
                    base,
                },
            )) if generation > voice.generation() => {
                voice.await_next(Awaits::Nothing);
                return Ok(Formed {
                    generation,
                    rank: rank.0,
                    addresses,
                    secret,
                    committed,
                    resume: resume.map(PathBuf::from),
                    apply,
                    base,
                });
            }
            Some((_, CoordinatorMessage::Welcome { .. } | CoordinatorMessage::Abort { .. }))
            | None => {
                if voice.is_spare() && found.is_none() {
                    let reason = "a spare is to load first".into();
                    return Err(GateClosed { reason });
                }
                say()?;
            }
            Some(_) => {}
        }
    }
}

impl Formed {
    /// Workers on this one's machine, itself included: those with its IP address. Containers have one each, and memory of
    /// their own.
    pub(crate) fn neighbors(&self) -> usize {
        let host = |address: &str| address.rsplit_once(':').map(|(host, _)| host.to_owned());
        let own = host(&self.addresses[self.rank as usize]);
        let all = self.addresses.iter();
        all.filter(|address| host(address) == own).count()
    }

    /// Whether the state it begins with is neither anybody's nor a checkpoint's: the weights that the run starts with.
    pub(crate) fn starts_over(&self) -> bool {
        self.base.is_none() && self.resume.is_none()
    }

    /// What training needs to know of it.
    pub(crate) fn reformation(self, membership: Membership) -> Reformation {
        let at = |rank: Option<Rank>| rank.map(|rank| rank.0 as usize);
        Reformation {
            membership,
            committed: self.committed.0,
            apply: self.apply,
            past: self.base.map(|base| Past {
                generation: base.generation.0,
                shards: base
                    .shards
                    .iter()
                    .map(|copies| [at(copies.owner), at(copies.mirror)])
                    .collect(),
            }),
        }
    }

    /// Whether this worker, which has `held` these cuts, is named for no other.
    fn can_be_entered(&self, held: &[Held]) -> bool {
        let Some(base) = &self.base else {
            return true;
        };
        let own = Some(Rank(self.rank));
        let mut shards = base.shards.iter();
        let named = shards.any(|it| it.owner == own || it.mirror == own);
        let reaches = |it: &Held| {
            let behind = it.gradient && it.applied.next() == self.committed;
            it.generation == base.generation && (it.applied == self.committed || behind)
        };
        !named || held.iter().any(reaches)
    }
}

//! [`StepGate`] over a [`Session`]: training's questions become messages, the coordinator's answers become what to do next.

use std::time::{Duration, Instant};

use objective::RewardStatistics;
use protocol::{
    Awaits, CoordinatorMessage, Generation, GpuFigures, Held, Rank, RunFacts, Statistics, Step,
    WorkerMessage,
};
use trainer::{
    EvaluationRow, GateClosed, Membership, Next, Reformation, Sample, SavedReporter, SavedShard,
    StepGate, StepReport, TrainError, Verdict,
};

use crate::entrance::{Entrance, Formed, accuse};
use crate::session::{Session, SessionError, Voice};

/// A vote without an answer is cast again after this time; voting twice changes nothing.
pub(crate) const REPEAT: Duration = Duration::from_secs(2);

/// Progress is told at most this often.
const PROGRESS: Duration = Duration::from_millis(250);

/// Utilization is logged at most this often.
const SAY: Duration = Duration::from_mins(1);

/// A rank's door to the coordinator, from Ready to the end, through one generation after another.
pub(crate) struct Gate<'a> {
    session: &'a mut Session,
    entrance: &'a Entrance<'a>,
    generation: Generation,
    rank: u32,
    place: Place,
    /// Said until the generation begins.
    ready: WorkerMessage,
    /// A generation that begins with weights which training has no more.
    anew: Option<(Formed, Membership)>,
    progress: ProgressTeller,
    /// When utilization was last logged.
    said: Option<Instant>,
}

enum Place {
    /// Ready, and nobody has said Go.
    Waiting,
    /// In the middle of the run.
    Running {
        next: u64,
        save: bool,
        evaluate: bool,
        /// No step follows.
        last: bool,
    },
    /// The last step is committed.
    Ended,
    /// All is done.
    Finished,
}

impl<'a> Gate<'a> {
    /// A gate for a member of `generation` that is `ready`.
    pub(crate) fn new(
        session: &'a mut Session,
        entrance: &'a Entrance<'a>,
        generation: Generation,
        rank: u32,
        ready: WorkerMessage,
    ) -> Self {
        Self {
            progress: ProgressTeller::new(session.voice().clone()),
            session,
            entrance,
            generation,
            rank,
            place: Place::Waiting,
            ready,
            anew: None,
            said: None,
        }
    }

    /// Waits until all members are ready.
    ///
    /// # Errors
    /// The generation is over before it began.
    pub(crate) fn begin(&mut self) -> Result<(), GateClosed> {
        let first = self.wait(Awaits::Go, Some(&self.ready), |message| match message {
            CoordinatorMessage::Go {
                step,
                evaluate,
                save,
                last,
            } => Some(Place::Running {
                next: step.0,
                save: *save,
                evaluate: *evaluate,
                last: *last,
            }),
            CoordinatorMessage::Finish => Some(Place::Finished),
            _ => None,
        });
        self.place = first?;
        Ok(())
    }

    /// The generation for which training is to be made anew, if that is why it ended.
    pub(crate) fn anew(&mut self) -> Option<(Formed, Membership)> {
        self.anew.take()
    }

    fn facts(&self) -> Option<&RunFacts> {
        match &self.ready {
            WorkerMessage::Ready { facts, .. } => Some(facts),
            _ => None,
        }
    }

    /// What the coordinator says to this generation, or nothing for [`REPEAT`].
    fn hear(&self) -> Result<Option<CoordinatorMessage>, GateClosed> {
        let heard = self.session.hear(REPEAT).map_err(|error| closed(&error))?;
        let Some(heard) = heard else {
            self.session.voice().check(Some(self.generation))?;
            return Ok(None);
        };
        match heard.message {
            // Others join: the next generation is formed where the present one has nothing left to do.
            CoordinatorMessage::Form { .. } if heard.generation > self.generation => {
                self.session.put_back(heard);
                Err(GateClosed {
                    reason: "the next generation is formed".into(),
                })
            }
            // These end the present generation, whichever they speak of.
            CoordinatorMessage::Abort { reason } if heard.generation >= self.generation => {
                Err(GateClosed { reason })
            }
            CoordinatorMessage::Welcome { .. } => Err(GateClosed {
                reason: "the coordinator gathers its workers again".into(),
            }),
            message if heard.generation == self.generation => Ok(Some(message)),
            _ => Ok(None),
        }
    }

    /// Logs how much of its GPU this worker uses, now and then.
    fn tell_utilization(&mut self, report: &StepReport) {
        let recent = self.said.is_some_and(|said| said.elapsed() < SAY);
        if let Some(mfu) = report.mfu.filter(|_| !recent) {
            self.said = Some(Instant::now());
            let percent = 100.0 * mfu;
            tracing::info!(step = report.step, "model FLOPs utilization {percent:.1} %");
        }
    }

    /// Waits for the first message that `wanted` understands, and says `again` what may have been lost.
    fn wait<T>(
        &self,
        awaits: Awaits,
        again: Option<&WorkerMessage>,
        wanted: impl Fn(&CoordinatorMessage) -> Option<T>,
    ) -> Result<T, GateClosed> {
        let voice = self.session.voice();
        voice.await_next(awaits);
        loop {
            match (self.hear()?, again) {
                (Some(message), _) => {
                    if let Some(answer) = wanted(&message) {
                        voice.await_next(Awaits::Nothing);
                        return Ok(answer);
                    }
                }
                (None, Some(again)) => voice.say(again.clone()).map_err(|error| closed(&error))?,
                (None, None) => {}
            }
        }
    }
}

impl StepGate for Gate<'_> {
    fn next(&mut self) -> Result<Next, GateClosed> {
        loop {
            match &mut self.place {
                Place::Waiting => self.begin()?,
                Place::Running { save, last, .. } if *save => {
                    *save = false;
                    return Ok(Next::Save { last: *last });
                }
                Place::Running { evaluate, .. } if *evaluate => {
                    *evaluate = false;
                    return Ok(Next::Evaluate);
                }
                Place::Running { last: true, .. } => self.place = Place::Ended,
                Place::Running { next, .. } => return Ok(Next::Step(*next)),
                Place::Ended => {
                    let finished = |message: &CoordinatorMessage| {
                        matches!(message, CoordinatorMessage::Finish).then_some(Place::Finished)
                    };
                    self.place = self.wait(Awaits::End, None, finished)?;
                }
                Place::Finished => return Ok(Next::Finish),
            }
        }
    }

    fn prepared(&mut self, report: &StepReport) -> Result<Verdict, GateClosed> {
        self.tell_utilization(report);
        let vote = WorkerMessage::Prepared {
            report: to_protocol(report),
            phases: phases(&report.phases),
            gpu: GpuFigures {
                mfu: report.mfu,
                ..self.entrance.gpu.figures()
            },
        };
        let voice = self.session.voice().clone();
        voice.say(vote.clone()).map_err(|error| closed(&error))?;
        voice.await_next(Awaits::Commit);
        loop {
            match self.hear()? {
                None => voice.say(vote.clone()).map_err(|error| closed(&error))?,
                Some(CoordinatorMessage::Commit {
                    step,
                    apply,
                    save,
                    evaluate,
                    last,
                }) if step.0 == report.step => {
                    voice.know(step);
                    voice.await_next(Awaits::Nothing);
                    self.place = if last {
                        Place::Ended
                    } else {
                        Place::Running {
                            next: report.step + 1,
                            save: false,
                            evaluate: false,
                            last: false,
                        }
                    };
                    return Ok(Verdict {
                        apply,
                        save,
                        evaluate,
                        last,
                    });
                }
                Some(CoordinatorMessage::Stale { committed }) if committed.0 > report.step => {
                    return Err(GateClosed {
                        reason: format!(
                            "step {} was prepared, but the last commit is {committed}",
                            report.step
                        ),
                    });
                }
                // Repetitions of what was heard before.
                Some(_) => {}
            }
        }
    }

    fn reform(
        &mut self,
        why: &TrainError,
        held: &[trainer::Held],
    ) -> Result<Option<Reformation>, GateClosed> {
        let held = held.iter().map(|it| Held {
            generation: Generation(it.generation),
            rank: Rank(it.rank as u32),
            world: it.world as u32,
            applied: Step(it.applied),
            gradient: it.gradient,
        });
        let held: Vec<Held> = held.collect();
        if let TrainError::Collective(error) = why {
            accuse(self.session, error);
        }
        let entered = self.entrance.enter(self.session, &held, self.facts());
        let (form, collective) = entered?;
        let membership = self.entrance.membership(self.session, &form, collective);
        self.generation = form.generation;
        self.rank = form.rank;
        self.place = Place::Waiting;
        if form.starts_over() {
            self.anew = Some((form, membership));
            return Ok(None);
        }
        Ok(Some(form.reformation(membership)))
    }

    fn reformed(&mut self, committed: u64) -> Result<(), GateClosed> {
        if let WorkerMessage::Ready { facts, .. } = &mut self.ready {
            facts.committed = committed;
        }
        let voice = self.session.voice();
        voice.know(Step(committed));
        voice
            .say(self.ready.clone())
            .map_err(|error| closed(&error))
    }

    fn evaluated(&mut self, row: &EvaluationRow, samples: &[Sample]) -> Result<(), GateClosed> {
        if self.rank != 0 {
            return Ok(());
        }
        let samples = samples.iter().map(|sample| protocol::Sample {
            prompt: sample.prompt.clone(),
            text: sample.text.clone(),
        });
        let message = WorkerMessage::Evaluated {
            row: protocol::EvaluationRow {
                step: row.step,
                pairs: row.pairs,
                statistics: statistics(
                    [row.loss, row.loss_pairwise, row.loss_calibration],
                    &row.rewards,
                ),
            },
            samples: samples.collect(),
        };
        self.session
            .voice()
            .say(message)
            .map_err(|error| closed(&error))
    }

    fn saved_reporter(&mut self) -> SavedReporter {
        let (voice, asked) = (self.session.voice().clone(), self.generation);
        Box::new(move |SavedShard { step, file }| {
            let step = Step(step);
            let message = match file {
                Ok(shard) => WorkerMessage::Saved { step, asked, shard },
                Err(reason) => WorkerMessage::SaveFailed {
                    step,
                    asked,
                    reason,
                },
            };
            // Without a session there is nobody to tell; the coordinator already counts this worker as lost.
            drop(voice.say(message));
        })
    }

    fn progress(&mut self, phase: &str, done: u64, total: u64) {
        self.progress.tell(phase, done, total);
    }
}

/// Passes progress on, not more often than anybody reads it.
pub(crate) struct ProgressTeller {
    voice: Voice,
    last: Option<(String, Instant)>,
}

impl ProgressTeller {
    pub(crate) fn new(voice: Voice) -> Self {
        Self { voice, last: None }
    }

    pub(crate) fn tell(&mut self, phase: &str, done: u64, total: u64) {
        let recent = self
            .last
            .as_ref()
            .is_some_and(|(last, at)| last == phase && at.elapsed() < PROGRESS);
        if recent && done < total {
            return;
        }
        self.last = Some((phase.to_owned(), Instant::now()));
        // A session that ended is noticed where its answer is needed.
        drop(self.voice.say(WorkerMessage::Progress {
            phase: phase.to_owned(),
            done,
            total,
        }));
    }
}

pub(crate) fn closed(error: &SessionError) -> GateClosed {
    GateClosed {
        reason: error.to_string(),
    }
}

fn to_protocol(report: &StepReport) -> protocol::StepReport {
    protocol::StepReport {
        step: report.step,
        epoch: report.epoch,
        finite: report.finite,
        statistics: statistics(
            [report.loss, report.loss_pairwise, report.loss_calibration],
            &report.rewards,
        ),
        grad_norm: report.grad_norm,
        learning_rate: report.learning_rate,
        tokens: report.tokens,
        pairs: report.pairs,
    }
}

fn phases(it: &trainer::Phases) -> protocol::Phases {
    protocol::Phases {
        data: it.data,
        forward: it.forward,
        head: it.head,
        backward: it.backward,
        reduce: it.reduce,
        update: it.update,
        evaluate: it.evaluate,
        checkpoint: it.checkpoint,
        wait: it.wait,
    }
}

fn statistics(
    [loss, loss_pairwise, loss_calibration]: [f64; 3],
    rewards: &RewardStatistics,
) -> Statistics {
    Statistics {
        loss,
        loss_pairwise,
        loss_calibration,
        rewards_chosen: rewards.rewards_chosen,
        rewards_rejected: rewards.rewards_rejected,
        rewards_margins: rewards.rewards_margins,
        rewards_accuracies: rewards.rewards_accuracies,
        log_ratios_chosen: rewards.log_ratios_chosen,
        log_ratios_rejected: rewards.log_ratios_rejected,
        logps_chosen: rewards.logps_chosen,
        logps_rejected: rewards.logps_rejected,
    }
}

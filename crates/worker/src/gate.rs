//! [`StepGate`] over a [`Session`]: training's questions become messages, the coordinator's answers become what to do next.

use std::time::{Duration, Instant};

use objective::RewardStatistics;
use protocol::{Awaits, CoordinatorMessage, Generation, Statistics, Step, WorkerMessage};
use trainer::{
    EvaluationRow, GateClosed, Next, Sample, SavedReporter, SavedShard, StepGate, StepReport,
    Verdict,
};

use crate::session::{Session, SessionError, Voice};

/// A vote without an answer is cast again after this time; voting twice changes nothing.
const REPEAT: Duration = Duration::from_secs(2);

/// Progress is told at most this often.
const PROGRESS: Duration = Duration::from_millis(250);

/// Utilization is logged at most this often.
const SAY: Duration = Duration::from_mins(1);

/// A rank's door to the coordinator, from Ready to the end.
pub(crate) struct Gate<'a> {
    session: &'a mut Session,
    rank: u32,
    place: Place,
    progress: ProgressTeller,
    /// When utilization was last logged.
    said: Option<Instant>,
}

enum Place {
    /// Ready, and nobody has said Go.
    Waiting,
    /// In the middle of the run.
    Running { next: u64, evaluate: bool },
    /// The last step is committed.
    Ended,
}

impl<'a> Gate<'a> {
    pub(crate) fn new(session: &'a mut Session, rank: u32) -> Self {
        Self {
            progress: ProgressTeller::new(session.voice().clone()),
            session,
            rank,
            place: Place::Waiting,
            said: None,
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

    /// Waits for the first message that `wanted` understands.
    fn wait<T>(
        &self,
        awaits: Awaits,
        wanted: impl Fn(&CoordinatorMessage) -> Option<T>,
    ) -> Result<T, GateClosed> {
        let voice = self.session.voice();
        voice.await_next(awaits);
        loop {
            let heard = self.session.hear(REPEAT).map_err(|error| closed(&error))?;
            if let Some(answer) = heard.and_then(|heard| wanted(&heard.message)) {
                voice.await_next(Awaits::Nothing);
                return Ok(answer);
            }
        }
    }
}

impl StepGate for Gate<'_> {
    fn next(&mut self) -> Result<Next, GateClosed> {
        match self.place {
            Place::Waiting => {
                let first = self.wait(Awaits::Go, |message| match message {
                    CoordinatorMessage::Go { step, evaluate, .. } => {
                        Some(Some((step.0, *evaluate)))
                    }
                    CoordinatorMessage::Finish => Some(None),
                    _ => None,
                })?;
                let Some((next, evaluate)) = first else {
                    return Ok(Next::Finish);
                };
                self.place = Place::Running { next, evaluate };
                self.next()
            }
            Place::Running {
                next,
                evaluate: true,
            } => {
                self.place = Place::Running {
                    next,
                    evaluate: false,
                };
                Ok(Next::Evaluate)
            }
            Place::Running { next, .. } => Ok(Next::Step(next)),
            Place::Ended => self.wait(Awaits::End, |message| {
                matches!(message, CoordinatorMessage::Finish).then_some(Next::Finish)
            }),
        }
    }

    fn prepared(&mut self, report: &StepReport) -> Result<Verdict, GateClosed> {
        self.tell_utilization(report);
        let vote = WorkerMessage::Prepared {
            report: to_protocol(report),
            phases: phases(&report.phases),
        };
        let voice = self.session.voice();
        voice.say(vote.clone()).map_err(|error| closed(&error))?;
        voice.await_next(Awaits::Commit);
        loop {
            let heard = self.session.hear(REPEAT).map_err(|error| closed(&error))?;
            match heard.map(|heard| heard.message) {
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
                            evaluate: false,
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
        let voice = self.session.voice().clone();
        Box::new(move |SavedShard { step, file }| {
            let step = Step(step);
            // There is one generation in a session.
            let asked = Generation(0);
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

fn closed(error: &SessionError) -> GateClosed {
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

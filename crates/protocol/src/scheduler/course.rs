//! What becomes of jobs once they are submitted: they are paused and resumed, cancelled, stopped, tried again, and end.

use super::{
    ENDED_MAX, Ending, Entry, JobRecord, Scheduler, SchedulerAction, State, Stopping, note, view,
};
use crate::{Cause, JobId, Outcome, Step};

impl Scheduler {
    pub(super) fn cancel(
        &mut self,
        id: &JobId,
        reason: String,
        actions: &mut Vec<SchedulerAction>,
    ) {
        let Some((number, entry)) = self.unended(id) else {
            return;
        };
        match &entry.state {
            State::Running { .. } => {
                let told = format!("cancelled: {reason}");
                actions.push(note("cancel", format!("job {id} is to stop, {told}")));
                self.stop(number, Stopping::Cancel { reason }, told, actions);
            }
            State::Queued { .. } => self.end(number, Ending::Cancelled { reason }, actions),
            State::Ended(_) => {}
        }
    }

    /// A job does not start until it is resumed; one that runs saves and stops.
    pub(super) fn pause(&mut self, id: &JobId, reason: &str, actions: &mut Vec<SchedulerAction>) {
        let Some((number, _)) = self.unended(id) else {
            return;
        };
        let entry = self.jobs.get_mut(&number).expect("it was just found");
        let (runs, ends) = match &entry.state {
            State::Running { stopping, .. } => (
                true,
                matches!(
                    stopping,
                    Some(Stopping::Cancel { .. } | Stopping::Limit { .. })
                ),
            ),
            _ => (false, false),
        };
        if entry.paused.is_some() || ends {
            return;
        }
        entry.paused = Some(reason.to_owned());
        actions.push(SchedulerAction::Journal(JobRecord::Paused {
            id: id.clone(),
            reason: reason.to_owned(),
        }));
        let told = format!("paused: {reason}");
        if runs {
            let text = format!("job {id} saves and stops, {told}");
            actions.push(note("pause", text));
            let reason = told.clone();
            self.stop(number, Stopping::Later { reason }, told, actions);
        } else {
            actions.push(note("pause", format!("job {id} is {told}")));
            actions.push(SchedulerAction::Changed(id.clone()));
        }
    }

    /// A paused job may start again, at its place in the queue.
    pub(super) fn resume(&mut self, id: &JobId, reason: &str, actions: &mut Vec<SchedulerAction>) {
        let Some((number, _)) = self.unended(id) else {
            return;
        };
        let entry = self.jobs.get_mut(&number).expect("it was just found");
        if entry.paused.take().is_none() {
            return;
        }
        actions.push(SchedulerAction::Journal(JobRecord::Resumed {
            id: id.clone(),
            reason: reason.to_owned(),
        }));
        let text = match entry.state {
            State::Running { .. } => format!("job {id} goes on once it has stopped: {reason}"),
            _ => format!("job {id} waits for its turn again: {reason}"),
        };
        actions.push(note("resume", text));
        actions.push(SchedulerAction::Changed(id.clone()));
    }

    /// Jobs that ran as long as they may save and stop.
    pub(super) fn stop_at_limits(&mut self, now_ms: u64, actions: &mut Vec<SchedulerAction>) {
        let due = self.jobs.iter();
        let due = due.filter(|(_, it)| it.limit_at_ms().is_some_and(|at_ms| now_ms >= at_ms));
        let due: Vec<u64> = due.map(|(number, _)| *number).collect();
        for number in due {
            let job = &self.jobs[&number].job;
            let reason = format!("it ran for {}", limit(job.run_ms_max));
            let text = format!("job {} saves and stops: {reason}", job.id);
            actions.push(note("limit", text));
            let why = Stopping::Limit {
                reason: reason.clone(),
            };
            self.stop(number, why, reason, actions);
        }
    }

    pub(super) fn shut_down(&mut self, reason: &str, actions: &mut Vec<SchedulerAction>) {
        self.shutting_down = true;
        let running = |it: &State| matches!(it, State::Running { stopping: None, .. });
        let reason = format!("the coordinator leaves ({reason})");
        for number in self.numbers(running) {
            let id = &self.jobs[&number].job.id;
            actions.push(note("stop", format!("job {id} saves and stops: {reason}")));
            let why = Stopping::Later {
                reason: reason.clone(),
            };
            self.stop(number, why, reason.clone(), actions);
        }
    }

    /// Asks a running job to save and stop, unless it was asked before. A cancellation outweighs what is said after it.
    pub(super) fn stop(
        &mut self,
        number: u64,
        why: Stopping,
        told: String,
        actions: &mut Vec<SchedulerAction>,
    ) {
        let entry = self.jobs.get_mut(&number).expect("a job that runs");
        let State::Running { stopping, .. } = &mut entry.state else {
            return;
        };
        let asked = stopping.is_some();
        if !matches!(stopping, Some(Stopping::Cancel { .. })) {
            *stopping = Some(why);
        }
        if !asked {
            let id = entry.job.id.clone();
            actions.push(SchedulerAction::StopJob { id, reason: told });
        }
    }

    /// An attempt needs no workers any more.
    pub(super) fn released(&mut self, now_ms: u64, id: &JobId) {
        let expected_ms = now_ms + self.policy.heartbeat_timeout_ms;
        self.pool.forget_job(id, expected_ms);
        let number = self.unended(id).map(|(number, _)| number);
        let entry = number.and_then(|number| self.jobs.get_mut(&number));
        if let Some(State::Running { works, .. }) = entry.map(|it| &mut it.state) {
            *works = false;
        }
    }

    /// An attempt ended: the job has, or goes back into the queue at its place.
    pub(super) fn ended(
        &mut self,
        now_ms: u64,
        id: &JobId,
        outcome: Outcome,
        committed: Step,
        actions: &mut Vec<SchedulerAction>,
    ) {
        let Some((number, entry)) = self.unended(id) else {
            return;
        };
        let State::Running {
            since_ms, stopping, ..
        } = entry.state.clone()
        else {
            return;
        };
        let expected_ms = now_ms + self.policy.heartbeat_timeout_ms;
        self.pool.forget_job(id, expected_ms);
        let entry = self.jobs.get_mut(&number).expect("it was just found");
        entry.committed = committed;
        let ran_ms = now_ms.saturating_sub(since_ms);
        entry.ran_ms = entry.ran_ms.saturating_add(ran_ms);
        let (wait_ms, told) = match entry.after(outcome, stopping, self.policy.retry_pause_ms) {
            Fate::End(ending) => return self.end(number, ending, actions),
            Fate::Queue { wait_ms, told } => (wait_ms, told),
        };
        entry.state = State::Queued {
            not_before_ms: now_ms + wait_ms,
        };
        let id = id.clone();
        actions.push(SchedulerAction::Journal(JobRecord::Stopped {
            id: id.clone(),
            committed,
            ran_ms,
        }));
        actions.push(told);
        actions.push(SchedulerAction::Changed(id));
    }

    pub(super) fn end(&mut self, number: u64, ending: Ending, actions: &mut Vec<SchedulerAction>) {
        let Some(entry) = self.jobs.get_mut(&number) else {
            return;
        };
        let id = entry.job.id.clone();
        let text = format!("job {id} {}", view::ending(&ending));
        actions.push(SchedulerAction::Journal(JobRecord::Ended {
            id: id.clone(),
            committed: entry.committed,
            ending: ending.clone(),
        }));
        entry.state = State::Ended(ending);
        actions.push(note("done", text));
        actions.push(SchedulerAction::Changed(id));
        let ended: Vec<u64> = self
            .jobs
            .iter()
            .filter(|(_, it)| it.has_ended())
            .map(|(number, _)| *number)
            .collect();
        for number in ended.iter().rev().skip(ENDED_MAX) {
            self.jobs.remove(number);
        }
    }
}

/// What follows from the end of an attempt.
enum Fate {
    End(Ending),
    Queue { wait_ms: u64, told: SchedulerAction },
}

impl Entry {
    /// What follows from `outcome`, where the attempt was asked to stop or was not.
    fn after(&mut self, outcome: Outcome, stopping: Option<Stopping>, retry_pause_ms: u64) -> Fate {
        let (id, committed) = (&self.job.id, self.committed);
        let failed = |cause, reason| Fate::End(Ending::Failed { cause, reason });
        let lost = match (outcome, &stopping) {
            (Outcome::Completed, _) => return Fate::End(Ending::Completed),
            (Outcome::Interrupted { .. }, Some(Stopping::Cancel { reason })) => {
                let reason = reason.clone();
                return Fate::End(Ending::Cancelled { reason });
            }
            (Outcome::Failed { reason, .. }, Some(Stopping::Cancel { .. })) => {
                let reason = format!("cancelled, and its state could not be saved: {reason}");
                return Fate::End(Ending::Cancelled { reason });
            }
            (Outcome::Interrupted { .. }, _) => None,
            (Outcome::Failed { cause, reason }, _) => match cause {
                Cause::Temporary => Some(reason),
                // What failed for its input, or for what nobody foresaw, fails again.
                Cause::Config | Cause::Fatal => return failed(cause, reason),
            },
        };
        if self.job.run_ms_max.is_some_and(|max| self.ran_ms >= max) {
            let reason = format!(
                "its attempts ran for {}, and it stands at step {committed}; submit it again with a larger one to go on \
                 from its last checkpoint",
                limit(self.job.run_ms_max)
            );
            return failed(Cause::Config, reason);
        }
        match (lost, stopping) {
            (None, stopping) => {
                let mut text = format!("job {id} waits to go on from step {committed}");
                if let Some(Stopping::Later { reason }) = stopping {
                    text = format!("{text}, where it stopped: {reason}");
                }
                let told = note("queue", text);
                Fate::Queue { wait_ms: 0, told }
            }
            // It was to stop, so that this is no failure of its own.
            (Some(reason), Some(_)) => {
                let text = format!(
                    "job {id} will go on from its last checkpoint, since its state could not be saved: {reason}"
                );
                let told = note("retry", text);
                Fate::Queue { wait_ms: 0, told }
            }
            (Some(reason), None) => {
                let (failures, most) = (self.attempts.failed_at(committed), self.job.attempts_max);
                if failures >= most {
                    let ended = match failures {
                        1 => format!("an attempt ended after step {committed},"),
                        _ => format!(
                            "{failures} attempts in a row ended after step {committed}, the last"
                        ),
                    };
                    let reason = format!(
                        "{ended} because {reason}; look into the workers' logs, and submit it again to go on from its last \
                         checkpoint"
                    );
                    return failed(Cause::Temporary, reason);
                }
                let wait_ms = retry_pause_ms << (failures - 1).min(5);
                let text = format!(
                    "job {id} goes on from its last checkpoint in {} s (attempt {failures} of {most} at step {committed} \
                     failed): {reason}",
                    wait_ms as f64 / 1000.0
                );
                let told = note("retry", text);
                Fate::Queue { wait_ms, told }
            }
        }
    }
}

/// `job.max_hours` as a person wrote it.
fn limit(run_ms_max: Option<u64>) -> String {
    let hours = run_ms_max.unwrap_or_default() as f64 / 3_600_000.0;
    format!("job.max_hours, which is {hours}")
}

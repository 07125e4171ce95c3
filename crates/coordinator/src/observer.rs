//! Who watches a job without a say in it: trackers and metrics. The driver shows it every action; nothing that happens here
//! comes back.

use std::time::{Duration, Instant, SystemTime};

use protocol::{Action, Outcome, Record, RunFacts, Step};

use crate::{
    config::Config,
    metrics::{JobMetrics, Metrics},
    run_directory::RunDirectory,
    trackers::{Entry, Past, Trackers},
};

/// A job's trackers and metrics, where it has any.
pub struct Observer {
    trackers: Option<Trackers>,
    metrics: Option<JobMetrics>,
}

impl Observer {
    /// Begins to observe the run in `directory`, which goes on from `committed`. Its trackers get what they lack of the rows
    /// up to there.
    pub fn open(
        config: &Config,
        directory: &RunDirectory,
        committed: Step,
        metrics: Option<&Metrics>,
    ) -> Self {
        let rows = directory.metrics();
        let evaluations = directory.evaluations();
        let last = rows
            .iter()
            .take_while(|row| row.report.step <= committed.0)
            .last();
        let evaluated = evaluations
            .iter()
            .take_while(|row| row.step <= committed.0)
            .last();
        let name = &config.job.name;
        Self {
            trackers: Trackers::start(config, past(directory, committed), committed.0),
            metrics: metrics.map(|metrics| metrics.job(Instant::now(), name, last, evaluated)),
        }
    }

    /// Takes notice of what the driver is about to do. A step's commit is journaled before its row is shown.
    pub fn observe(&mut self, action: &Action, facts: Option<&RunFacts>) {
        let now = SystemTime::now();
        if let Some(metrics) = &self.metrics {
            if let Some(facts) = facts {
                metrics.steps_planned(facts.steps_total);
            }
            match action {
                Action::Journal(record) => metrics.record(record),
                Action::RecordStep(row) => metrics.step(now, row),
                Action::RecordEvaluation { row, .. } => metrics.evaluation(row),
                Action::Note(note) => metrics.note(note),
                _ => {}
            }
        }
        let Some(trackers) = &mut self.trackers else {
            return;
        };
        match action {
            Action::Journal(Record::Rewind { to, .. }) => trackers.rewind(now, to.0),
            Action::RecordStep(row) => trackers.record(now, Entry::Step(Box::new(*row))),
            Action::RecordEvaluation { row, samples } => {
                let (row, samples) = (*row, samples.clone());
                trackers.record(now, Entry::Evaluation { row, samples });
            }
            _ => {}
        }
    }

    /// The run ended, for now. Returns when the trackers have written all they know, or gave up.
    pub fn finish(&mut self, outcome: &Outcome) {
        self.metrics = None;
        if let Some(trackers) = self.trackers.take() {
            trackers.finish(SystemTime::now(), outcome);
        }
    }
}

/// What a run holds up to `committed`, each at about its time: rows do not say when they were committed, so the times are
/// counted back from now by their durations.
fn past(directory: &RunDirectory, committed: Step) -> Past {
    let rows = directory.metrics().iter();
    let steps = rows.map(|row| Entry::Step(Box::new(*row)));
    let evaluations = directory.evaluations().iter().map(|row| {
        let samples = directory.samples().iter().find(|it| it.step == row.step);
        let samples = samples.map(|it| it.samples.clone()).unwrap_or_default();
        Entry::Evaluation { row: *row, samples }
    });
    let mut entries: Vec<Entry> = steps.chain(evaluations).collect();
    entries.retain(|entry| entry.position().step <= committed.0);
    entries.sort_by_key(Entry::position);
    let mut at = SystemTime::now();
    let mut past: Past = Vec::with_capacity(entries.len());
    for entry in entries.into_iter().rev() {
        let seconds = match &entry {
            Entry::Step(row) => row.seconds,
            Entry::Evaluation { .. } => 0.0,
        };
        past.push((at, entry));
        let before = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        at = at.checked_sub(before).unwrap_or(at);
    }
    past.reverse();
    past
}

//! Random events: nothing is given twice, and every job ends.

use std::collections::BTreeMap;

use protocol::{JobId, JobSummaryState, NewJob, Outcome, SchedulerEvent};

use crate::play::{Play, interrupted, lost, new_job};

/// Random events for a thousand seeds: no worker has two jobs, no job runs twice (both asserted in `take`), deadlines do not
/// spin, what makes room has a lower priority than what it makes room for (in `take`, too), the journal tells a restarted
/// coordinator the same, and once enough workers wait and nothing is paused, every job ends.
#[test]
fn whatever_happens_every_job_ends_once_workers_stay() {
    for seed in 1..=1_000_u64 {
        let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut draw = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut play = Play::new();
        let mut worker = 0;
        let mut committed: BTreeMap<JobId, u64> = BTreeMap::new();
        for _ in 0..60 {
            match draw(11) {
                0 => {
                    let job = NewJob {
                        priority: draw(3) as i32 - 1,
                        run_ms_max: (draw(4) == 0).then(|| 1 + draw(20_000)),
                        ..new_job(&format!("j{}", draw(5)), draw(3) as u32 + 1)
                    };
                    drop(play.submit(job));
                }
                1 | 2 => {
                    worker += 1;
                    play.join(worker);
                }
                3 => {
                    play.gone(draw(worker + 1));
                }
                4 => drop(play.pass(draw(9_000))),
                5 => {
                    let name = format!("w{}", draw(worker + 1));
                    play.event(SchedulerEvent::DrainRequested { name });
                }
                6 => drop(play.pause(&format!("j{}", draw(5)))),
                7 => drop(play.resume(&format!("j{}", draw(5)))),
                8 if draw(4) == 0 => {
                    let id = JobId(format!("j{}", draw(5)));
                    let reason = String::new();
                    play.event(SchedulerEvent::CancelRequested { id, reason });
                }
                _ => {
                    let running: Vec<_> = play.running.keys().cloned().collect();
                    if let Some(id) = running.get(draw(running.len().max(1) as u64) as usize) {
                        let at = committed.entry(id.clone()).or_default();
                        *at += draw(3);
                        let at = *at;
                        let outcome = match draw(3) {
                            0 => lost(),
                            1 => interrupted(at),
                            _ => Outcome::Completed,
                        };
                        for member in play.running[id].clone() {
                            play.gone(member);
                        }
                        play.end(&id.0, outcome, at);
                    }
                }
            }
        }
        check_journal(&play, seed);
        for job in 0..5 {
            play.resume(&format!("j{job}"));
        }
        for _ in 0..60 {
            for _ in 0..3 {
                worker += 1;
                play.join(worker);
            }
            let running: Vec<_> = play.running.keys().cloned().collect();
            for id in running {
                play.end(&id.0, Outcome::Completed, 99);
            }
            play.pass(40_000);
        }
        let unended = play
            .scheduler
            .jobs()
            .into_iter()
            .find(|it| !it.state.has_ended());
        assert_eq!(unended, None, "seed {seed}");
    }
}

/// A coordinator that starts again knows the same of the jobs that do not run.
fn check_journal(play: &Play, seed: u64) {
    let again = Play::with(&play.journal);
    for job in play.scheduler.jobs() {
        if job.state == JobSummaryState::Running {
            continue;
        }
        let found = again.scheduler.job(&job.id).expect("a job of the journal");
        let known = (found.state, found.committed, found.attempts);
        let expected = (job.state, job.committed, job.attempts);
        assert_eq!(known, expected, "{} of seed {seed}", job.id);
    }
}

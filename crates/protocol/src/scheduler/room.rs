//! Which running jobs make room for one with a higher priority.
//!
//! They save before they stop, and their workers come back one by one. Until then these count as coming, so that no more jobs
//! are stopped than it takes.

use std::cmp::Reverse;

use super::{Scheduler, SchedulerAction, State, Stopping, note};

/// A job that could make room.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    number: u64,
    priority: i32,
    workers: usize,
}

impl Scheduler {
    /// Asks running jobs with a lower priority to give their workers to `number`, if it can start with these and with those that
    /// are idle or come. Whether it can.
    pub(super) fn make_room(&mut self, number: u64, actions: &mut Vec<SchedulerAction>) -> bool {
        let head = &self.jobs[&number].job;
        let (id, priority) = (head.id.clone(), head.priority);
        let have = self.pool.idle_count() + self.coming();
        let missing = (head.workers as usize).saturating_sub(have);
        if missing == 0 {
            return true;
        }
        let lower = self.numbers(State::takes_workers).into_iter();
        let lower = lower.filter(|it| self.jobs[it].job.priority < priority);
        let candidates = lower.map(|number| {
            let job = &self.jobs[&number].job;
            Candidate {
                number,
                priority: job.priority,
                workers: self.pool.staying_count_of(&job.id),
            }
        });
        let Some(chosen) = choose(candidates.collect(), missing) else {
            return false;
        };
        for it in chosen {
            let reason = format!(
                "makes room for job {id}, whose priority is {priority} and not {}",
                it.priority
            );
            let other = &self.jobs[&it.number].job.id;
            let text = format!("job {other} saves, stops and {reason}");
            actions.push(note("preempt", text));
            let why = Stopping::Later {
                reason: reason.clone(),
            };
            self.stop(it.number, why, reason, actions);
        }
        true
    }

    /// Workers that will be idle soon: of jobs that stop, and those that jobs have let go.
    pub(super) fn coming(&self) -> usize {
        let stops = |it: &State| {
            matches!(
                it,
                State::Running {
                    stopping: Some(_),
                    ..
                }
            )
        };
        let stopping = self.jobs.values().filter(|it| stops(&it.state));
        let workers = stopping.map(|it| self.pool.staying_count_of(&it.job.id));
        workers.sum::<usize>() + self.pool.returning_count()
    }
}

/// The fewest that have `missing` workers together; of such sets that with the lowest priorities, and then with the newest jobs.
/// `None` if all of them have too few.
fn choose(mut candidates: Vec<Candidate>, missing: usize) -> Option<Vec<Candidate>> {
    candidates.sort_by_key(|it| (it.priority, Reverse(it.number)));
    let count = (1..=candidates.len()).find(|count| most(&candidates, *count) >= missing)?;
    let (mut chosen, mut missing) = (Vec::new(), missing);
    for (index, candidate) in candidates.iter().enumerate() {
        if chosen.len() == count {
            break;
        }
        let others = count - chosen.len() - 1;
        // Whether a set of so many can begin with it.
        if candidate.workers + most(&candidates[index + 1..], others) >= missing {
            missing = missing.saturating_sub(candidate.workers);
            chosen.push(*candidate);
        }
    }
    Some(chosen)
}

/// The most workers that `count` of these have together.
fn most(candidates: &[Candidate], count: usize) -> usize {
    let mut workers: Vec<usize> = candidates.iter().map(|it| it.workers).collect();
    workers.sort_unstable_by_key(|it| Reverse(*it));
    workers.iter().take(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Jobs as (priority, workers) in the order of their submission; which are chosen, by index.
    fn check(jobs: &[(i32, usize)], missing: usize, expected: Option<&[u64]>) {
        let candidates = (0..)
            .zip(jobs)
            .map(|(number, (priority, workers))| Candidate {
                number,
                priority: *priority,
                workers: *workers,
            });
        let chosen = choose(candidates.collect(), missing);
        let chosen = chosen.map(|it| it.iter().map(|it| it.number).collect::<Vec<_>>());
        assert_eq!(chosen.as_deref(), expected, "{jobs:?}, {missing} missing");
    }

    #[test]
    fn the_fewest_then_the_lowest_then_the_newest_make_room() {
        check(&[], 1, None);
        check(&[(0, 1), (0, 1)], 3, None);
        // One job is enough, though two have a lower priority.
        check(&[(5, 2), (0, 1), (0, 1)], 2, Some(&[0]));
        check(&[(0, 2), (-1, 2), (3, 2)], 2, Some(&[1]));
        check(&[(0, 2), (0, 2), (0, 1)], 2, Some(&[1]));
        // Not the largest, if a lower one is enough beside another.
        check(&[(4, 4), (2, 1), (3, 3)], 5, Some(&[1, 0]));
        check(&[(0, 0), (0, 1)], 1, Some(&[1]));
    }

    /// Against all subsets.
    #[test]
    fn no_smaller_and_no_lower_set_is_enough() {
        let mut random = 7_u64;
        let mut draw = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        for _ in 0..2_000 {
            let candidates: Vec<Candidate> = (0..draw(7))
                .map(|number| Candidate {
                    number,
                    priority: draw(3) as i32,
                    workers: draw(4) as usize,
                })
                .collect();
            let missing = 1 + draw(6) as usize;
            let subset = |bits: u32| {
                let chosen = candidates.iter().filter(|it| bits >> it.number & 1 == 1);
                let mut chosen: Vec<Candidate> = chosen.copied().collect();
                chosen.sort_by_key(|it| (it.priority, Reverse(it.number)));
                chosen
            };
            let enough = (0..1_u32 << candidates.len())
                .map(subset)
                .filter(|set| set.iter().map(|it| it.workers).sum::<usize>() >= missing);
            let key = |set: &Vec<Candidate>| {
                let order = set.iter().map(|it| (it.priority, Reverse(it.number)));
                (set.len(), order.collect::<Vec<_>>())
            };
            let best = enough.min_by_key(key).map(|set| key(&set));
            let chosen = choose(candidates.clone(), missing).map(|set| key(&set));
            assert_eq!(chosen, best, "{candidates:?}, {missing} missing");
        }
    }
}

//! Before most of a run's memory is allocated: what it will take, and whether this machine has it. A worker that would be
//! killed by the system in the middle of a step says so at the start instead, with the settings that fit.

use trainer::plan::{Cure, Program, Workload};
use trainer::{Setup, Sharding, TrainError};

use crate::machine::{LimitBy, MachineMemory};

/// A run that this machine cannot hold.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// Nothing can be said.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Too large.
    #[error("{0}")]
    TooLarge(String),
}

/// Logs the memory of this worker, one of `world` of which `here` share its machine.
///
/// # Errors
/// If the machine cannot hold them, even without a checkpoint on the way. One that can hold them but for the copy that such
/// a checkpoint takes is warned about: whether one comes is the coordinator's to say.
pub(crate) fn check(
    setup: &Setup,
    world: usize,
    here: usize,
    sharding: Sharding,
) -> Result<(), MemoryError> {
    let (workload, program) = setup.workload()?;
    let machine = MachineMemory::here();
    let share = Share {
        workload: &workload,
        program,
        world,
        here,
        sharding,
    };
    match share.check(machine.as_ref()) {
        Ok(None) => Ok(()),
        Ok(Some(warning)) => {
            tracing::warn!("{warning}");
            Ok(())
        }
        Err(refusal) => Err(MemoryError::TooLarge(refusal)),
    }
}

/// The workers of a run on one machine.
struct Share<'a> {
    workload: &'a Workload,
    program: Program,
    world: usize,
    here: usize,
    sharding: Sharding,
}

impl Share<'_> {
    /// A warning, or why not.
    fn check(&self, machine: Option<&MachineMemory>) -> Result<Option<String>, String> {
        let knobs = self
            .workload
            .knobs(self.world, rayon::current_num_threads(), self.sharding);
        let saving = self.workload.memory(&knobs, self.program, true);
        tracing::info!("memory with a checkpoint on the way: {saving}");
        let Some(machine) = machine else {
            return Ok(None);
        };
        let least = self.workload.memory(&knobs, self.program, false);
        let [needed, saving] = [&least, &saving].map(|memory| memory.peak_bytes * self.here as u64);
        if needed > machine.limit_bytes {
            // A cure counts the memory of all workers.
            let limit = machine.limit_bytes / self.here as u64 * self.world as u64;
            let cures = self.workload.cures(&knobs, self.program, false, limit);
            return Err(refusal(self.here, needed, machine, &cures));
        }
        Ok((saving > machine.limit_bytes).then(|| {
            format!(
                "{}; a checkpoint before the last step does not fit: set checkpoint.every_steps to 0 or take a larger machine",
                need(self.here, saving, machine)
            )
        }))
    }
}

fn need(here: usize, needed: u64, machine: &MachineMemory) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    format!(
        "{here} worker{} here need{} {:.2} GiB of memory, {} {:.2} GiB",
        if here == 1 { "" } else { "s" },
        if here == 1 { "s" } else { "" },
        gib(needed),
        match machine.limit_by {
            LimitBy::Machine => "this machine has",
            LimitBy::Cgroup => "the control group allows",
        },
        gib(machine.limit_bytes)
    )
}

fn refusal(here: usize, needed: u64, machine: &MachineMemory, cures: &[Cure]) -> String {
    let need = need(here, needed, machine);
    if cures.is_empty() {
        return format!(
            "{need}; no setting makes it fit: take a larger machine, or a smaller model"
        );
    }
    let cures: Vec<String> = cures.iter().map(ToString::to_string).collect();
    format!("{need}; it fits with {}", cures.join(", or with "))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::plan::Job;

    fn machine(limit_bytes: u64) -> MachineMemory {
        MachineMemory {
            limit_bytes,
            limit_by: LimitBy::Machine,
            available_bytes: limit_bytes,
        }
    }

    #[test]
    fn a_run_is_refused_below_what_its_workers_need_and_warned_about_below_what_a_checkpoint_adds()
    {
        let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let sections = format!(
            "model.path = {:?}\ndata.train = [{:?}]\ndata.cache = {:?}\nreference.store = {:?}\ntrain.steps = 40\n",
            quickstart.join("reference"),
            quickstart.join("train.jsonl"),
            folder.path().join("tokens"),
            folder.path().join("store"),
        );
        let sections = sections.parse().expect("TOML");
        let job = Job::load(&sections, "cpu", 1).expect("a job");
        // A program that is small, so that what a run adds decides.
        let program = Program {
            resident: 1 << 20,
            peak: 1 << 20,
        };
        let workload = job.workload();
        let sharding = Sharding {
            mirror: true,
            ..Sharding::default()
        };
        let share = Share {
            workload,
            program,
            world: 4,
            here: 2,
            sharding,
        };
        let knobs = workload.knobs(4, rayon::current_num_threads(), sharding);
        let [least, saving] =
            [false, true].map(|saves| 2 * workload.memory(&knobs, program, saves).peak_bytes);
        assert!(least < saving);

        assert_eq!(share.check(None), Ok(None), "nothing is known");
        assert_eq!(share.check(Some(&machine(saving))), Ok(None));
        let warning = share.check(Some(&machine(saving - 1))).expect("it fits");
        let warning = warning.expect("a warning");
        assert!(warning.contains("2 workers here need"), "{warning}");
        assert!(warning.contains("checkpoint.every_steps"), "{warning}");
        assert!(matches!(share.check(Some(&machine(least))), Ok(Some(_))));
        let refusal = share
            .check(Some(&machine(least - 1)))
            .expect_err("too large");
        assert!(
            refusal.contains("--set train.micro_batch_tokens="),
            "{refusal}"
        );
        let refusal = share.check(Some(&machine(1 << 20))).expect_err("too large");
        assert!(refusal.contains("no setting makes it fit"), "{refusal}");
    }
}

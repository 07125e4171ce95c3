//! A plan as a person reads it.

use std::fmt;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use worker::machine::LimitBy;
use worker::plan::{Cure, HostMemory, Moment, WorkerMemory};

use super::{Disk, GpuMemory, Memory, Plan, Time};
use crate::numbers::{bytes, counted, duration, grouped, plain};

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let run = &self.run;
        writeln!(
            f,
            "{}: {}, {} held out; {}{} of {}, {} {}, {}; {}",
            self.name,
            counted(run.pairs, "pair"),
            grouped(run.held_out_pairs),
            if self.may_stop_early { "at most " } else { "" },
            counted(run.steps, "step"),
            counted(run.batch_pairs, "pair"),
            plain(run.epochs),
            if plain(run.epochs) == "1" {
                "epoch"
            } else {
                "epochs"
            },
            counted(run.tokens, "token"),
            counted(run.parameters, "parameter"),
        )?;
        match (&self.memory, &self.gpu) {
            (Some(memory), _) => write_memory(f, memory)?,
            (None, Some(gpu)) => write_gpu(f, gpu)?,
            (None, None) => writeln!(f, "\nmemory: not planned on this backend")?,
        }
        match (&self.time, &self.no_probe_because) {
            (Some(time), _) => write_time(f, time, run.reference.values)?,
            (None, Some(reason)) => writeln!(f, "\ntime: not measured, because {reason}")?,
            (None, None) => {}
        }
        for disk in &self.disk {
            write_disk(f, disk)?;
        }
        Ok(())
    }
}

impl Plan {
    /// Why the job cannot run here, and what would make it; `None` if it can.
    pub fn refusal(&self) -> Option<String> {
        let memory = self.memory.as_ref().filter(|memory| !memory.fits);
        let gpu = self.gpu.as_ref();
        let gpu = gpu.filter(|gpu| !(gpu.fits && gpu.host.fits));
        let disk = self.disk.iter().find(|disk| !disk.fits);
        match (memory, gpu, disk) {
            (Some(memory), _, _) => Some(memory_refusal(memory)),
            (None, Some(gpu), _) => Some(gpu_refusal(gpu)),
            (None, None, Some(disk)) => Some(disk_refusal(disk)),
            (None, None, None) => None,
        }
    }
}

fn write_memory(f: &mut fmt::Formatter<'_>, memory: &Memory) -> fmt::Result {
    let worker = &memory.worker;
    writeln!(f, "\nmemory of each worker, by what is there at once")?;
    write_worker(f, worker)?;
    write!(
        f,
        "{} × {} + {} of the coordinator = {}",
        workers(memory),
        bytes(worker.peak_bytes),
        bytes(memory.coordinator_bytes),
        bytes(memory.total_bytes)
    )?;
    match &memory.machine {
        None => writeln!(f, "; this system does not tell how much it has"),
        Some(machine) => writeln!(
            f,
            " of {}{}, {} of it free now: {}",
            bytes(machine.limit_bytes),
            match machine.limit_by {
                LimitBy::Machine => "",
                LimitBy::Cgroup => " that the control group allows",
            },
            bytes(machine.available_bytes),
            match (memory.fits, memory.is_free) {
                (true, true) => "it fits",
                (true, false) => "it fits only when other programs give some back",
                (false, _) => "it does not fit",
            }
        ),
    }
}

fn write_worker(f: &mut fmt::Formatter<'_>, worker: &WorkerMemory) -> fmt::Result {
    writeln!(f, "{}", table(&worker.moments))?;
    writeln!(
        f,
        "largest micro-batch: {} tokens; the log-prob head's logits take {} of the workspace at most",
        grouped(worker.largest_micro_batch_tokens as u64),
        bytes(worker.head_chunk_bytes)
    )
}

fn write_gpu(f: &mut fmt::Formatter<'_>, gpu: &GpuMemory) -> fmt::Result {
    let worker = &gpu.worker;
    writeln!(f, "\nmemory of each GPU, by what is there at once")?;
    write_worker(f, worker)?;
    let (peak, available) = (worker.peak_bytes, gpu.available_bytes);
    writeln!(
        f,
        "each worker needs {} of a GPU with {}, {} of it {}: {}",
        bytes(peak),
        bytes(gpu.total_bytes),
        bytes(available),
        if gpu.is_here {
            "free now"
        } else {
            "beside what the driver takes"
        },
        match gpu.fits {
            true if peak <= available => "it fits",
            true => "it fits only without any gaps",
            false => "it does not fit",
        }
    )?;
    let host = &gpu.host;
    writeln!(
        f,
        "beside its GPU each worker takes up to {} of its machine's memory: {}{}",
        bytes(host.worker_bytes),
        beside(&host.worker),
        if host.fits {
            ""
        } else {
            "; this machine has too little"
        }
    )
}

/// What a worker has on the host when it has most there.
fn beside(host: &HostMemory) -> String {
    if host.loading == host.peak_bytes() {
        return format!("{} while weights are read", bytes(host.loading));
    }
    // Not at once.
    let passing = [
        (host.regrouping, "while a generation forms"),
        (host.snapshot, "of a snapshot for checkpoints"),
    ];
    let lasting = (host.optimizer, "of offloaded masters and moments");
    let parts = [lasting].into_iter().chain(passing.into_iter().max());
    let parts = parts.filter(|(size, _)| *size > 0);
    let parts: Vec<String> = parts
        .map(|(size, name)| format!("{} {name}", bytes(size)))
        .collect();
    parts.join(" and ")
}

/// A column a moment, a row a part.
fn table(moments: &[Moment]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let names = moments.iter().map(|moment| moment.name.to_owned());
    table.set_header(std::iter::once("MiB".to_owned()).chain(names));
    let mib = |bytes: u64| match bytes {
        0 => String::new(),
        bytes => format!("{:.1}", bytes as f64 / f64::from(1 << 20)),
    };
    let parts: Vec<_> = moments.iter().map(|moment| moment.parts.named()).collect();
    let rows = parts.first().map_or(0, |named| named.len());
    for row in 0..rows {
        let values = parts.iter().map(|named| named[row].1);
        if values.clone().any(|value| value > 0) {
            let name = parts[0][row].0.to_owned();
            table.add_row(std::iter::once(name).chain(values.map(mib)));
        }
    }
    let sums = moments.iter().map(|moment| mib(moment.bytes));
    table.add_row(std::iter::once("together".to_owned()).chain(sums));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn write_time(f: &mut fmt::Formatter<'_>, time: &Time, reference_values: u64) -> fmt::Result {
    let line =
        |f: &mut fmt::Formatter<'_>, name: &str, text: String| writeln!(f, "  {name:<15} {text}");
    writeln!(f, "\ntime: about {}", seconds(time.total_seconds))?;
    line(f, "load", seconds(time.load_seconds))?;
    if reference_values > 0 {
        let missing = time.probe.reference.values;
        let text = match missing {
            0 => "none: reference.store has all values".into(),
            missing if missing == reference_values => format!(
                "{} for {} values",
                seconds(time.reference_seconds),
                grouped(missing)
            ),
            missing => format!(
                "{} for {} of {} values, the others are in reference.store",
                seconds(time.reference_seconds),
                grouped(missing),
                grouped(reference_values)
            ),
        };
        line(f, "reference pass", text)?;
    }
    line(
        f,
        "training",
        format!(
            "{}, {} a step",
            seconds(time.steps_seconds),
            seconds(time.step_seconds)
        ),
    )?;
    if time.evaluations > 0 {
        let samples = match time.samples_seconds {
            0.0 => String::new(),
            time => format!(", continuations {}", seconds(time)),
        };
        line(
            f,
            "evaluation",
            format!(
                "{} × {}{samples}",
                time.evaluations,
                seconds(time.evaluation_seconds)
            ),
        )?;
    }
    if let Some(each) = time.checkpoint_seconds {
        let background = if time.checkpoints > 1 {
            ", all but the last while training goes on"
        } else {
            ""
        };
        let text = format!("{} × {}{background}", time.checkpoints, seconds(each));
        line(f, "checkpoints", text)?;
    }
    if let Some(export) = time.export_seconds {
        line(f, "export", seconds(export))?;
    }
    let probe = &time.probe;
    writeln!(
        f,
        "  measured on this machine, with all workers in this process: {} step{}{} of the job's own, {} tokens, after one that \
         was not timed",
        probe.steps,
        if probe.steps == 1 { "" } else { "s" },
        if probe.partial { ", only begun," } else { "" },
        grouped(probe.packed_tokens)
    )
}

fn write_disk(f: &mut fmt::Formatter<'_>, disk: &Disk) -> fmt::Result {
    write!(f, "\ndisk: {}", bytes(disk.needed_bytes))?;
    match disk.free_bytes {
        Some(free) => writeln!(f, " at most, {} are free", bytes(free))?,
        None => writeln!(f, " at most")?,
    }
    for item in &disk.items {
        writeln!(
            f,
            "  {:<20} {:>10}  {}",
            item.what,
            bytes(item.bytes),
            item.path.display()
        )?;
    }
    Ok(())
}

fn memory_refusal(memory: &Memory) -> String {
    let limit = memory
        .machine
        .as_ref()
        .map_or(0, |machine| machine.limit_bytes);
    let mut text = format!(
        "{} need {} together, this machine has {}",
        workers(memory),
        bytes(memory.total_bytes),
        bytes(limit)
    );
    if memory.cures.is_empty() {
        let least = memory.least_bytes.unwrap_or(0);
        text = format!(
            "{text}; no setting makes it fit: one worker needs at least {} beside the coordinator; take a larger machine, or a \
             smaller model",
            bytes(least)
        );
    } else {
        text = format!("{text}; it fits with {}", cures(&memory.cures));
    }
    text
}

fn gpu_refusal(gpu: &GpuMemory) -> String {
    if gpu.fits {
        let host = &gpu.host;
        return format!(
            "{} workers take {} of this machine's memory beside their GPUs, which is more than it has: each {}, {}; take fewer \
             workers, or a larger machine{}",
            gpu.workers,
            bytes(host.total_bytes),
            bytes(host.worker_bytes),
            beside(&host.worker),
            if host.worker.optimizer > 0 {
                ", or leave cluster.offload out"
            } else {
                ""
            }
        );
    }
    let text = format!(
        "a worker needs {} of a GPU that has {} left of {}",
        bytes(gpu.worker.certain_bytes()),
        bytes(gpu.available_bytes),
        bytes(gpu.total_bytes)
    );
    if gpu.cures.is_empty() {
        let least = bytes(gpu.least_bytes.unwrap_or(0));
        format!(
            "{text}; no setting makes it fit: it needs at least {least}; take a larger GPU, or a smaller model"
        )
    } else {
        format!("{text}; it fits with {}", cures(&gpu.cures))
    }
}

fn cures(cures: &[Cure]) -> String {
    let cures: Vec<String> = cures.iter().map(ToString::to_string).collect();
    cures.join(", or with ")
}

fn disk_refusal(disk: &Disk) -> String {
    let paths: Vec<String> = disk
        .items
        .iter()
        .map(|item| {
            format!(
                "{} {} in {}",
                item.what,
                bytes(item.bytes),
                item.path.display()
            )
        })
        .collect();
    format!(
        "{} are needed on disk and {} are free: {}; free some, lower checkpoint.keep_last, or name folders on another disk \
         with checkpoint.path and job.output",
        bytes(disk.needed_bytes),
        bytes(disk.free_bytes.unwrap_or(0)),
        paths.join(", ")
    )
}

fn workers(memory: &Memory) -> String {
    format!(
        "{} of {}",
        count(memory.workers, "worker"),
        count(memory.threads, "thread")
    )
}

fn count(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn seconds(seconds: f64) -> String {
    duration(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

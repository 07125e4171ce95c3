//! The program: what is measured in which order, each in a process of its own under a time limit.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::device::guarded;
use crate::report::Report;
use crate::{attention, events, matmul, overheads};

const USAGE: &str = "usage: gpu_probe versions|matmul|events|overheads|attention|all [--json FILE]";
/// The word by which the program calls itself for one measurement.
const CHILD: &str = "measure";
/// Seconds for everything.
const WHOLE: f64 = 145.0;
/// Seconds for one part, and for one measurement within it.
const LIMITS: [(&str, f64, f64); 5] = [
    ("versions", 15.0, 15.0),
    ("overheads", 20.0, 20.0),
    ("events", 30.0, 30.0),
    ("matmul", 60.0, 20.0),
    ("attention", 45.0, 30.0),
];

/// Runs the program.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        [CHILD, part, which, rows] => {
            // One line each: where a panic reaches `guarded` it is reported in full.
            std::panic::set_hook(Box::new(|panic| {
                let text: String = panic.to_string().chars().take(200).collect();
                eprintln!("   {}", text.replace('\n', " "));
            }));
            measure(part, which, Path::new(rows))
        }
        [part] => parts(part, None),
        [part, "--json", file] => parts(part, Some(Path::new(file))),
        _ => Err(anyhow::anyhow!(USAGE)),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpu_probe: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// One measurement, in this process; says whether it got to its end.
fn measure(part: &str, which: &str, rows: &Path) -> Result<bool> {
    let mut report = Report::append(rows)?;
    let outcome = guarded(|| match part {
        "versions" => versions(&mut report),
        "overheads" => overheads::run(&mut report),
        "events" => events::run(&mut report),
        "matmul" => matmul::run(which, &mut report),
        "attention" => attention::run(which, &mut report),
        _ => bail!(USAGE),
    });
    if let Err(error) = &outcome {
        report.error("   ", json!({"part": part, "process": which}), error)?;
    }
    Ok(outcome.is_ok())
}

/// Runs the measurements of `wanted`, each in a process of its own, and writes all rows to `json`. Says whether every
/// process ended well.
fn parts(wanted: &str, json: Option<&Path>) -> Result<bool> {
    if wanted != "all" && LIMITS.iter().all(|(part, ..)| *part != wanted) {
        bail!(USAGE);
    }
    let rows = std::env::temp_dir().join(format!("gpu_probe-{}.jsonl", std::process::id()));
    let mut report = Report::append(&rows)?;
    let whole = Instant::now();
    let mut well = true;
    for (part, part_limit, limit) in LIMITS {
        if part != "versions" && part != wanted && wanted != "all" {
            continue;
        }
        println!("\n== {part}");
        let measurements: Vec<&str> = match part {
            "matmul" => std::iter::once("cublaslt")
                .chain(matmul::STRATEGIES)
                .collect(),
            "attention" => vec!["forward", "backward"],
            _ => vec!["-"],
        };
        match part {
            "matmul" => println!("{}", matmul::HEADING),
            "attention" => println!("{}", attention::HEADING),
            _ => {}
        }
        let started = Instant::now();
        for which in measurements {
            let left = (part_limit - started.elapsed().as_secs_f64())
                .min(WHOLE - whole.elapsed().as_secs_f64());
            let start = Instant::now();
            let end = if left < 2.0 {
                Err("no time left".into())
            } else {
                child(part, which, &rows, limit.min(left))
            };
            let seconds = start.elapsed().as_secs_f64();
            let mut row = json!({"part": part, "process": which, "seconds": seconds});
            let mut line = format!("   ({part} {which}: {seconds:.1} s)");
            if let Err(reason) = end {
                well = false;
                line = format!("   ({part} {which}: {seconds:.1} s, {reason})");
                row["ended"] = reason.into();
            }
            report.push(&line, &row)?;
        }
    }
    println!("\n{:.1} s in all", whole.elapsed().as_secs_f64());
    let text = std::fs::read_to_string(&rows).context("cannot read the rows back")?;
    std::fs::remove_file(&rows)?;
    if let Some(json) = json {
        let rows: Vec<Value> = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        std::fs::write(json, serde_json::to_string_pretty(&rows)?)
            .with_context(|| format!("cannot write {}", json.display()))?;
    }
    Ok(well)
}

/// Runs one measurement in a process that is killed after `limit` seconds.
fn child(part: &str, which: &str, rows: &PathBuf, limit: f64) -> Result<(), String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut child = Command::new(program)
        .args([CHILD, part, which])
        .arg(rows)
        .spawn()
        .map_err(|error| error.to_string())?;
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < limit {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(status.to_string()),
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(error.to_string()),
        }
    }
    // Not waited for without end: a process with a hung kernel may take long to die.
    let _ = child.kill();
    for _ in 0..300 {
        if matches!(child.try_wait(), Ok(Some(_))) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(format!("killed after {limit:.0} s"))
}

/// What the numbers were measured on.
fn versions(report: &mut Report) -> Result<()> {
    use cudarc::driver::{result, sys};
    result::init().context("no CUDA driver")?;
    let device = result::device::get(0)?;
    let (mut driver, mut major, mut minor) = (0, 0, 0);
    let (lt, total) = unsafe {
        sys::cuDriverGetVersion(&raw mut driver).result()?;
        cudarc::nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor);
        (
            cudarc::cublaslt::sys::cublasLtGetVersion(),
            result::device::total_mem(device)?,
        )
    };
    // cubecl's kernels include these; where they are missing, nothing of burn's compiles.
    let headers = cubecl::cuda::install::cuda_path().map(|path| path.join("include/cuda_bf16.h"));
    let found = headers.as_ref().is_some_and(|path| path.exists());
    let name = result::device::get_name(device)?;
    let row = json!({
        "part": "versions", "device": name, "memory": total, "driver": driver, "cublaslt": lt,
        "nvrtc": [major, minor], "cuda_bf16.h": found,
    });
    let line = format!(
        "{name}, {:.1} GiB; driver CUDA {}.{}; cuBLASLt {lt}; NVRTC {major}.{minor}; cuda_bf16.h {}",
        total as f64 / (1u64 << 30) as f64,
        driver / 1000,
        driver % 1000 / 10,
        headers
            .filter(|_| found)
            .map_or_else(|| "NOT FOUND".into(), |path| path.display().to_string()),
    );
    report.push(&line, &row)
}

//! The real programs, built once, and runs of them in folders of their own.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::workspace_root;

/// Longer than anything here takes on two busy cores; only a hang exceeds it.
const PATIENCE: Duration = Duration::from_mins(2);

/// Path of a program of this workspace: `coordinator`, `worker` or `checkpoint`.
///
/// # Panics
/// If it does not build.
pub fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<Vec<PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        // What cargo tells a test of its own package makes build scripts of others run again, and half of all crates with them.
        for (name, _) in std::env::vars_os() {
            let told = [
                "CARGO_PKG_",
                "CARGO_MANIFEST_",
                "CARGO_BIN_",
                "CARGO_CRATE_",
            ];
            if told.iter().any(|it| name.to_string_lossy().starts_with(it)) {
                cargo.env_remove(&name);
            }
        }
        let output = cargo
            .args(["build", "--release", "--message-format", "json"])
            .args(["-p", "coordinator", "-p", "worker", "-p", "checkpoint"])
            .current_dir(workspace_root())
            .stderr(Stdio::inherit())
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "the programs do not build");
        let text = String::from_utf8(output.stdout).expect("cargo writes UTF-8");
        let messages = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("cargo writes JSON"));
        let paths =
            messages.filter_map(|message: Value| message["executable"].as_str().map(PathBuf::from));
        paths.collect()
    });
    let found = built
        .iter()
        .find(|path| path.file_stem().is_some_and(|stem| stem == name));
    found
        .unwrap_or_else(|| panic!("no program `{name}`"))
        .clone()
}

/// Everything that a program wrote.
pub fn text(output: &Output) -> String {
    let streams = [&output.stdout, &output.stderr];
    streams
        .map(|stream| String::from_utf8_lossy(stream))
        .concat()
}

/// The folder of given models and data beside the workspace; says so aloud when it is absent.
pub fn shared() -> Option<PathBuf> {
    let shared = workspace_root().join("../shared");
    if shared.is_dir() {
        return Some(shared);
    }
    eprintln!("skipped: ../shared is absent");
    None
}

/// A configuration and the folder that it runs in.
pub struct Run {
    folder: tempfile::TempDir,
    set: Vec<String>,
    variables: Vec<(String, String)>,
}

impl Run {
    /// `config` is a whole configuration file; its output is a fresh folder.
    ///
    /// # Panics
    /// If the folder cannot be made.
    pub fn new(config: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join("config.toml"), config).expect("write a configuration");
        let set = vec![
            format!("job.output={}", folder.path().join("run").display()),
            format!("reference.store={}", folder.path().join("store").display()),
        ];
        Self {
            folder,
            set,
            variables: Vec::new(),
        }
    }

    /// One more `--set`.
    #[must_use]
    pub fn set(mut self, assignment: &str) -> Self {
        self.set.push(assignment.to_owned());
        self
    }

    /// One more environment variable of its programs.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs `checkpoint verify` on the checkpoint of `step`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn verify(&self, step: usize) -> Output {
        let mut command = Command::new(program("checkpoint"));
        command.arg("verify").arg(self.checkpoint(step));
        command.output().expect("it starts")
    }

    /// The folder that holds configuration, run directory (`run`) and reference store (`store`).
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A file of the run directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("run").join(name)
    }

    /// The command that runs it, with the workspace root as its working directory.
    pub fn command(&self) -> Command {
        let mut command = Command::new(program("coordinator"));
        command
            .arg(self.folder.path().join("config.toml"))
            .current_dir(workspace_root())
            .stdin(Stdio::null())
            .envs(self.variables.iter().map(|(name, value)| (name, value)));
        for assignment in &self.set {
            command.args(["--set", assignment]);
        }
        command
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn output(&self) -> Output {
        self.command().output().expect("the coordinator starts")
    }

    /// Runs it to its end, which must be good.
    ///
    /// # Panics
    /// If it fails.
    pub fn complete(&self) -> Output {
        let output = self.output();
        assert!(
            output.status.success(),
            "{}: {}",
            output.status,
            text(&output)
        );
        output
    }

    /// Starts it as the leader of a process group of its own, so that everything of it can be killed at once.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(&self) -> Running {
        self.start_as(self.command())
    }

    /// The same with its command changed.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_as(&self, mut command: Command) -> Running {
        let said = self.folder.path().join("said.txt");
        let file = fs::File::create(&said).expect("a file for what it says");
        command
            .process_group(0)
            .stdout(file.try_clone().expect("one more handle"))
            .stderr(file);
        let child = command.spawn().expect("the coordinator starts");
        Running { child, said }
    }

    /// The same on pipes, which [`Running::hang_up`] closes as a terminal is closed.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_on_pipes(&self, mut command: Command) -> Running {
        command
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().expect("the coordinator starts");
        let said = self.folder.path().join("said.txt");
        Running { child, said }
    }

    /// Rows of `metrics.jsonl`.
    pub fn metrics(&self) -> Vec<Value> {
        self.rows("metrics.jsonl")
    }

    /// Rows of a file of the run directory; none while it is absent. A last line without its end is left out.
    ///
    /// # Panics
    /// If a line is not JSON.
    pub fn rows(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(name)).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).expect("a row is JSON"))
            .collect()
    }

    /// Rows of `metrics.jsonl` without what depends on the clock and on who computed them: equal for equal training.
    pub fn training(&self) -> Vec<Value> {
        let mut rows = self.metrics();
        for row in &mut rows {
            let row = row.as_object_mut().expect("a row is an object");
            row.retain(|name, _| !name.starts_with("seconds"));
            for name in ["tokens_per_second", "generation", "world_size"] {
                row.remove(name);
            }
        }
        rows
    }

    /// `summary.json`.
    ///
    /// # Panics
    /// If there is none.
    pub fn summary(&self) -> Value {
        let text = fs::read_to_string(self.path("summary.json")).expect("a summary");
        serde_json::from_str(&text).expect("a summary is JSON")
    }

    /// Steps of the visible checkpoints, the oldest first.
    pub fn checkpoints(&self) -> Vec<usize> {
        let Ok(entries) = fs::read_dir(self.path("checkpoints")) else {
            return Vec::new();
        };
        let steps = entries.filter_map(|entry| {
            // Retention may take it away meanwhile.
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok()?;
            let step = name.strip_prefix("step-")?.parse().ok()?;
            entry.path().join("manifest.json").exists().then_some(step)
        });
        let mut steps: Vec<usize> = steps.collect();
        steps.sort_unstable();
        steps
    }

    /// The folder of the checkpoint of `step`.
    pub fn checkpoint(&self, step: usize) -> PathBuf {
        self.path(&format!("checkpoints/step-{step:08}"))
    }

    /// Bytes of the exported weights.
    ///
    /// # Panics
    /// If there is no export.
    pub fn exported(&self) -> Vec<u8> {
        fs::read(self.path("export/model.safetensors")).expect("an export")
    }
}

/// A coordinator in the background. Dropping it kills it and its workers, so that a test that fails leaves nothing behind.
pub struct Running {
    child: Child,
    said: PathBuf,
}

impl Running {
    /// The coordinator's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Process ids of its workers.
    pub fn workers(&self) -> Vec<u32> {
        // Each was started by some thread.
        let threads = fs::read_dir(format!("/proc/{}/task", self.id()));
        let threads = threads.into_iter().flatten().flatten();
        let children = threads.map(|it| fs::read_to_string(it.path().join("children")));
        let children: String = children.map(Result::unwrap_or_default).collect();
        let ids = children.split_whitespace();
        let mut ids: Vec<u32> = ids.map(|id| id.parse().expect("a process id")).collect();
        ids.sort_unstable();
        ids
    }

    /// How the coordinator ended, if it did.
    ///
    /// # Panics
    /// If it cannot be asked.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child")
    }

    /// Waits until `ready`.
    ///
    /// # Panics
    /// If the coordinator ends before, or after a time that only a hang takes.
    pub fn wait_until(&mut self, what: &str, mut ready: impl FnMut() -> bool) {
        let start = Instant::now();
        while !ready() {
            let ended = self.child.try_wait().expect("a child");
            assert!(ended.is_none(), "no {what}: it ended: {}", self.said());
            assert!(start.elapsed() < PATIENCE, "no {what} yet: {}", self.said());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for the coordinator's end.
    ///
    /// # Panics
    /// If it takes a time that only a hang takes.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "no end: {}", self.said());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends a signal to the coordinator alone.
    pub fn signal(&self, name: &str) {
        signal(&self.id().to_string(), name);
    }

    /// What a closed terminal does: nobody reads any more, and the kernel and then the shell tell all processes.
    pub fn hang_up(&mut self) {
        drop((self.child.stdout.take(), self.child.stderr.take()));
        for _ in 0..2 {
            signal(&format!("-{}", self.id()), "HUP");
        }
    }

    /// kill -9 of the coordinator and its workers at once.
    pub fn kill_everything(mut self) {
        signal(&format!("-{}", self.id()), "KILL");
        self.wait();
    }

    /// What it wrote to its standard output and error so far.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let group = format!("-{}", self.id());
        let mut kill = Command::new("kill");
        // The group may be gone already; there is nothing to tell about it.
        kill.args(["-s", "KILL", "--", &group])
            .stderr(Stdio::null());
        drop(kill.status());
        drop(self.child.wait());
    }
}

/// Sends a signal to a process, or to a process group when `id` begins with `-`.
///
/// # Panics
/// If there is no such process.
pub fn signal(id: &str, name: &str) {
    let status = Command::new("kill").args(["-s", name, "--", id]).status();
    assert!(status.expect("kill runs").success(), "kill -{name} {id}");
}

/// Panics with the first line that differs, not with all of them.
///
/// # Panics
/// If the rows are not the same.
pub fn assert_same_rows(what: &str, found: &[Value], expected: &[Value]) {
    for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found, expected, "{what}: row {}", row + 1);
    }
    assert_eq!(found.len(), expected.len(), "{what}: rows");
}

/// A run of 24 steps on the quickstart's model and pairs: enough for a fault to find it anywhere.
pub const SMALL: &str = r#"
[job]
name = "small"
seed = 3
[model]
path = "configs/quickstart/reference"
[data]
train = ["configs/quickstart/train.jsonl"]
eval = ["configs/quickstart/eval.jsonl"]
max_length = 128
[objective]
kind = "cal_dpo"
beta = 0.1
[optimizer]
learning_rate = 1e-3
[schedule]
kind = "cosine"
warmup_steps = 4
[train]
steps = 24
batch_pairs = 24
micro_batch_tokens = 2048
[evaluate]
every_steps = 8
batch_pairs = 32
samples = 1
sample_tokens = 16
[checkpoint]
every_steps = 5
[cluster]
workers = 2
"#;

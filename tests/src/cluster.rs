//! A real `coordinator --cluster` on a free loopback port, with real workers, in a folder of its own.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::network::Network;
use crate::programs::{program, signal};
use crate::workspace_root;

/// Longer than anything here takes on two busy cores; only a hang exceeds it.
const PATIENCE: Duration = Duration::from_mins(2);

/// A coordinator and its workers. Dropping it kills them all.
pub struct Cluster {
    folder: tempfile::TempDir,
    url: String,
    token: Option<PathBuf>,
    coordinator: Child,
    workers: BTreeMap<String, Child>,
}

/// Writes a job of 24 steps on the quickstart's model and pairs, whose output is `folder/name`; `more` replaces sections or
/// adds some.
///
/// # Panics
/// If it cannot be written.
pub fn job(name: &str, folder: &Path, more: &str) -> PathBuf {
    let mut config: toml::Table = crate::programs::SMALL.parse().expect("TOML");
    let set = |config: &mut toml::Table, section: &str, key: &str, value: toml::Value| {
        let section = config[section].as_table_mut().expect("a section");
        section.insert(key.into(), value);
    };
    set(&mut config, "job", "name", name.into());
    let output = folder.join(name).display().to_string();
    set(&mut config, "job", "output", output.into());
    let more: toml::Table = more.parse().expect("TOML");
    for (section, values) in &more {
        for (key, value) in values.as_table().expect("a section") {
            set(&mut config, section, key, value.clone());
        }
    }
    let store = toml::Table::from_iter([(
        "store".into(),
        folder.join("store").display().to_string().into(),
    )]);
    config.insert("reference".into(), store.into());
    let path = folder.join(format!("{name}.toml"));
    fs::write(&path, config.to_string()).expect("write a configuration");
    path
}

impl Cluster {
    /// A coordinator without workers.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start() -> Self {
        Self::begin("127.0.0.1", None)
    }

    /// The same on all addresses of this machine, which asks for a token.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_on_all_addresses() -> Self {
        Self::begin("0.0.0.0", Some("a-token-of-a-test"))
    }

    /// The same on the host's address of a network, which asks for a token.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_on(network: &Network) -> Self {
        Self::begin(&network.host(), Some("a-token-of-a-test"))
    }

    /// The same, asking for a token, which is in the file `token` of its folder.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_with_token(token: &str) -> Self {
        Self::begin("127.0.0.1", Some(token))
    }

    fn begin(host: &str, token: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a free port")
            .port();
        let token = token.map(|token| {
            let path = folder.path().join("token");
            fs::write(&path, format!("{token}\n")).expect("write a token");
            path
        });
        let url = format!("http://{host}:{port}");
        let coordinator = coordinator(folder.path(), &url, token.as_deref());
        let mut cluster = Self {
            folder,
            url,
            token,
            coordinator,
            workers: BTreeMap::new(),
        };
        cluster.wait_for("an answer", |_| true);
        cluster
    }

    /// Its folder: state, runs, logs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Starts a serving worker of that name.
    ///
    /// # Panics
    /// If it does not start.
    pub fn worker(&mut self, name: &str) {
        let command = Command::new(program("worker"));
        let url = self.url.clone();
        self.start_worker(name, command, &url);
    }

    /// The same, which finds the coordinator at another URL.
    ///
    /// # Panics
    /// If it does not start.
    pub fn worker_at(&mut self, name: &str, url: &str) {
        let command = Command::new(program("worker"));
        self.start_worker(name, command, url);
    }

    /// The same in a namespace of a network.
    ///
    /// # Panics
    /// If it does not start.
    pub fn worker_on(&mut self, name: &str, network: &Network, index: usize) {
        let mut command = network.inside(index, &program("worker"));
        command.args(["--listen", &network.address(index)]);
        let url = self.url.clone();
        self.start_worker(name, command, &url);
    }

    /// The same in a mount namespace of its own, after `mount` was run there. False where this user may not make one.
    ///
    /// # Panics
    /// If it does not start.
    pub fn worker_behind(&mut self, name: &str, mount: &str) -> bool {
        let namespace = ["--mount", "--map-root-user", "sh", "-c"];
        let allowed = Command::new("unshare").args(namespace).arg(mount).output();
        if !allowed.is_ok_and(|it| it.status.success()) {
            return false;
        }
        let mut command = Command::new("unshare");
        let script = format!("{mount} && exec \"$0\" \"$@\"");
        command.args(namespace).arg(script).arg(program("worker"));
        let url = self.url.clone();
        self.start_worker(name, command, &url);
        true
    }

    fn start_worker(&mut self, name: &str, mut command: Command, url: &str) {
        let log = self.log(name);
        command
            .args(["--coordinator", url, "--name", name, "--threads", "1"])
            .current_dir(workspace_root())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("one more handle"))
            .stderr(log);
        if let Some(token) = &self.token {
            command.arg("--token-file").arg(token);
        }
        let child = command.spawn().expect("a worker starts");
        self.workers.insert(name.to_owned(), child);
    }

    /// kill -9 of a worker.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn kill_worker(&mut self, name: &str) {
        let mut worker = self.workers.remove(name).expect("a worker");
        worker.kill().expect("kill");
        worker.wait().expect("wait");
    }

    /// Sends a signal to a worker.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn signal_worker(&self, name: &str, kind: &str) {
        signal(&self.workers[name].id().to_string(), kind);
    }

    /// Waits for a worker to leave; its exit code.
    ///
    /// # Panics
    /// If it stays.
    pub fn worker_left(&mut self, name: &str) -> Option<i32> {
        let mut worker = self.workers.remove(name).expect("a worker");
        let start = Instant::now();
        loop {
            if let Some(status) = worker.try_wait().expect("a child") {
                return status.code();
            }
            assert!(
                start.elapsed() < PATIENCE,
                "worker {name} stays: {}",
                self.said()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// kill -9 of the coordinator alone.
    ///
    /// # Panics
    /// If it cannot be killed.
    pub fn kill_coordinator(&mut self) {
        self.coordinator.kill().expect("kill");
        self.coordinator.wait().expect("wait");
    }

    /// SIGTERM to the coordinator; its exit code.
    ///
    /// # Panics
    /// If it stays.
    pub fn stop_coordinator(&mut self) -> Option<i32> {
        signal(&self.coordinator.id().to_string(), "TERM");
        let start = Instant::now();
        loop {
            if let Some(status) = self.coordinator.try_wait().expect("a child") {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "it stays: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts a coordinator on the same folder and port.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_again(&mut self) {
        self.coordinator = coordinator(self.folder.path(), &self.url, self.token.as_deref());
    }

    /// The file with its token, where it asks for one.
    pub fn token_file(&self) -> Option<&Path> {
        self.token.as_deref()
    }

    /// Runs `coordinator ARGUMENTS --coordinator URL`.
    ///
    /// # Panics
    /// If it does not start.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.ask(arguments, Path::new(""))
    }

    /// The same with a configuration.
    ///
    /// # Panics
    /// If it does not start.
    pub fn ask(&self, arguments: &[&str], config: &Path) -> Output {
        let mut command = Command::new(program("coordinator"));
        command.args(arguments).args(["--coordinator", &self.url]);
        if config != Path::new("") {
            command.arg(config);
        }
        command
            .current_dir(workspace_root())
            .env_remove("CALDPO__SECURITY__TOKEN_FILE")
            .output()
            .expect("it starts")
    }

    /// The status as JSON; null while nobody answers.
    pub fn status(&self) -> Value {
        let token = self.token.as_ref().map(|it| it.display().to_string());
        let mut arguments = vec!["status", "--json"];
        if let Some(token) = &token {
            arguments.extend(["--token-file", token]);
        }
        serde_json::from_slice(&self.run(&arguments).stdout).unwrap_or_default()
    }

    /// Waits for a status that is `ready`.
    ///
    /// # Panics
    /// If it does not come, or the coordinator is gone.
    pub fn wait_for(&mut self, what: &str, ready: impl Fn(&Value) -> bool) {
        let start = Instant::now();
        loop {
            let status = self.status();
            if !status.is_null() && ready(&status) {
                return;
            }
            let ended = self.coordinator.try_wait().expect("a child");
            assert!(
                ended.is_none(),
                "no {what}: the coordinator ended: {}",
                self.said()
            );
            assert!(
                start.elapsed() < PATIENCE,
                "no {what}: {status:#}\n{}",
                self.said()
            );
        }
    }

    /// Waits until a job has committed `step`.
    ///
    /// # Panics
    /// If it does not.
    pub fn wait_for_step(&mut self, name: &str, step: u64) {
        self.wait_for(&format!("step {step} of {name}"), |status| {
            let mut jobs = status["jobs"].as_array().expect("jobs").iter();
            let job = jobs.find(|job| job["job"] == name);
            job.is_some_and(|job| job["committed_step"].as_u64() >= Some(step))
        });
    }

    /// What all processes logged.
    ///
    /// # Panics
    /// If a log cannot be read.
    pub fn said(&self) -> String {
        let entries = fs::read_dir(self.folder()).expect("a folder").flatten();
        let logs = entries
            .map(|it| it.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"));
        let said = logs.map(|path| {
            let text = fs::read_to_string(&path).unwrap_or_default();
            format!("-- {}\n{text}", path.display())
        });
        said.collect()
    }

    fn log(&self, name: &str) -> File {
        log(self.folder.path(), name)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in self.workers.values_mut().chain([&mut self.coordinator]) {
            // One that is gone needs no kill.
            drop(process.kill());
            drop(process.wait());
        }
    }
}

fn log(folder: &Path, name: &str) -> File {
    let path = folder.join(format!("{name}.log"));
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .expect("a log")
}

fn coordinator(folder: &Path, url: &str, token: Option<&Path>) -> Child {
    let listen = url.trim_start_matches("http://");
    let state = folder.join("state");
    let log = log(folder, "coordinator");
    let mut command = Command::new(program("coordinator"));
    command
        .arg("--cluster")
        .args(["--set", &format!("cluster.listen={listen}")])
        .args(["--set", &format!("cluster.state={}", state.display())])
        .current_dir(workspace_root())
        .stdout(log.try_clone().expect("one more handle"))
        .stderr(log);
    if let Some(token) = token {
        let set = format!("security.token_file={}", token.display());
        command.args(["--set", &set]);
    }
    command.spawn().expect("the coordinator starts")
}

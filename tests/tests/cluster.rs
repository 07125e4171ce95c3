//! `coordinator --cluster` with real workers and clients: jobs are queued, trained, watched, paused, cancelled; workers and the
//! coordinator are killed and drained, and nothing is lost.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tests::cluster::{Cluster, job};
use tests::network::Network;
use tests::programs::{assert_same_rows, program, text};

fn training(folder: &Path) -> Vec<Value> {
    let rows = fs::read_to_string(folder.join("metrics.jsonl")).expect("rows of metrics");
    let rows = rows.lines().map(|line| {
        let mut row: Value = serde_json::from_str(line).expect("a row is JSON");
        let values = row.as_object_mut().expect("an object");
        values.retain(|name, _| !name.starts_with("seconds"));
        for name in ["tokens_per_second", "generation", "world_size"] {
            values.remove(name);
        }
        row
    });
    rows.collect()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(output)))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

#[test]
fn jobs_are_queued_trained_and_found_in_their_folders() {
    let mut cluster = Cluster::start();
    // Before any worker is there, the queue says what it waits for.
    let first = job("first", cluster.folder(), "");
    let submitted = cluster.ask(&["submit", "--key", "one"], &first);
    assert!(submitted.status.success(), "{}", text(&submitted));
    assert!(
        text(&submitted).contains("waits for 2 workers: 0 idle"),
        "{}",
        text(&submitted)
    );
    let again = cluster.ask(&["submit", "--key", "one", "--json"], &first);
    assert_eq!(json(&again)["created"], false);
    let taken = cluster.ask(&["submit"], &first);
    assert_eq!(taken.status.code(), Some(2), "{}", text(&taken));
    assert!(
        text(&taken).contains("there is a job first already")
            && text(&taken).contains("coordinator cancel first")
            && text(&taken).contains("--key KEY"),
        "{}",
        text(&taken)
    );
    let second = job("second", cluster.folder(), "[train]\nsteps = 3");
    assert!(cluster.ask(&["submit"], &second).status.success());

    cluster.worker("a");
    cluster.worker("b");
    let watched = cluster.run(&["watch", "second", "--json"]);
    assert_eq!(watched.status.code(), Some(0), "{}", text(&watched));
    let events = String::from_utf8_lossy(&watched.stdout).into_owned();
    let steps = events
        .lines()
        .filter(|line| line.starts_with("{\"event\":\"step\""))
        .count();
    assert_eq!(steps, 3, "{events}");
    let jobs = json(&cluster.run(&["jobs", "--json"]));
    for job in jobs["jobs"].as_array().expect("jobs") {
        assert_eq!(job["state"], "completed", "{job}");
    }
    // Any client reads the rows of an ended job.
    let request = wire::proto::GetMetricsRequest {
        job: "first".into(),
        from_step: 20,
        limit: 3,
    };
    let rows = runtime().block_on(async {
        let url = cluster.url().to_owned();
        let client = wire::proto::cluster_client::ClusterClient::connect(url).await;
        let answer = client.expect("a connection").get_metrics(request).await;
        answer.expect("rows").into_inner()
    });
    let steps = rows
        .rows
        .iter()
        .map(|row| row.report.expect("a report").step);
    assert_eq!(steps.collect::<Vec<_>>(), [20, 21, 22]);
    assert_eq!(rows.evaluations[0].step, 24);
    for name in ["first", "second"] {
        let run = cluster.folder().join(name);
        assert!(run.join("export/model.safetensors").exists(), "{name}");
        assert!(run.join("summary.json").exists(), "{name}");
    }
    // A worker serves job after job under one name; it joins anew for the next.
    cluster.wait_for("both workers", |status| {
        status["workers"].as_array().expect("workers").len() == 2
    });
    let workers = json(&cluster.run(&["workers", "--json"]));
    assert_eq!(workers["workers"].as_array().expect("workers").len(), 2);
}

/// Values of `events.jsonl` of a run.
fn kinds(folder: &Path) -> Vec<String> {
    let events = fs::read_to_string(folder.join("events.jsonl")).expect("events");
    let kinds = events.lines().map(|line| {
        let event: Value = serde_json::from_str(line).expect("an event is JSON");
        event["kind"].as_str().expect("a kind").to_owned()
    });
    kinds.collect()
}

/// With `min_workers` at the number of workers every step is made in the same world, so that whatever is lost and comes back, the
/// run has the bits of one without faults.
#[test]
fn a_killed_worker_and_a_killed_coordinator_cost_no_committed_row_and_no_bit() {
    let more = "[train]\nsteps = 300\n[checkpoint]\nevery_steps = 0\n[cluster]\nmin_workers = 2";
    let whole = {
        let mut cluster = Cluster::start();
        let config = job("run", cluster.folder(), more);
        cluster.worker("a");
        cluster.worker("b");
        let done = cluster.ask(&["submit", "--watch"], &config);
        assert_eq!(done.status.code(), Some(0), "{}", text(&done));
        training(&cluster.folder().join("run"))
    };

    let mut cluster = Cluster::start();
    let config = job("run", cluster.folder(), more);
    cluster.worker("a");
    cluster.worker("b");
    assert!(cluster.ask(&["submit"], &config).status.success());
    cluster.wait_for_step("run", 3);
    cluster.kill_worker("a");
    cluster.wait_for("a job that waits for a worker", |status| {
        let waiting = status["jobs"][0]["waiting"].as_str().expect("a sentence");
        waiting.contains("waiting for a worker to join (1 here, 2 train)")
    });
    let held = cluster.status()["jobs"][0]["committed_step"].as_u64();
    let held = held.expect("a step");
    cluster.worker("a");
    cluster.wait_for_step("run", held + 3);
    cluster.kill_coordinator();
    cluster.start_again();
    // Nobody submits again, and the workers find the coordinator by themselves, with what they hold.
    cluster.wait_for("the end", |status| {
        status["jobs"][0]["state"] == "completed"
    });
    let run = cluster.folder().join("run");
    let kinds = kinds(&run);
    assert!(!kinds.contains(&"rewind".to_owned()), "{}", cluster.said());
    let formed = kinds.iter().filter(|kind| *kind == "form").count();
    assert!(formed >= 3, "{kinds:?}");
    assert_same_rows("run", &training(&run), &whole);
}

#[test]
fn a_drained_worker_leaves_with_its_code_and_its_job_goes_on_without_it() {
    let mut cluster = Cluster::start();
    let config = job("run", cluster.folder(), "[train]\nsteps = 20000");
    cluster.worker("a");
    cluster.worker("b");
    assert!(cluster.ask(&["submit"], &config).status.success());
    cluster.wait_for_step("run", 2);
    let nobody = cluster.run(&["drain", "nobody"]);
    assert_eq!(nobody.status.code(), Some(2));
    assert!(
        text(&nobody).contains("there is no worker nobody"),
        "{}",
        text(&nobody)
    );
    let drained = cluster.run(&["drain", "b"]);
    assert!(drained.status.success(), "{}", text(&drained));
    assert_eq!(cluster.worker_left("b"), Some(143));
    let world_is = |world: u64| move |status: &Value| status["jobs"][0]["world_size"] == world;
    cluster.wait_for("one worker left", world_is(1));
    let held = cluster.status()["jobs"][0]["committed_step"].as_u64();
    cluster.wait_for_step("run", held.expect("a step") + 1);
    // Another takes its place, with what the first one sends it.
    cluster.worker("c");
    cluster.wait_for("a second worker", world_is(2));

    // SIGHUP of a worker does the same; a terminal that is closed sends it twice.
    cluster.signal_worker("c", "HUP");
    cluster.signal_worker("c", "HUP");
    assert_eq!(cluster.worker_left("c"), Some(143));
    cluster.wait_for("one worker left", world_is(1));
    // So does SIGTERM. The last one's job saves before it lets it go, and waits for others.
    cluster.signal_worker("a", "TERM");
    assert_eq!(cluster.worker_left("a"), Some(143));
    cluster.wait_for("the queue", |status| status["jobs"][0]["state"] == "queued");
    let kinds = kinds(&cluster.folder().join("run"));
    assert!(!kinds.contains(&"rewind".to_owned()), "{}", cluster.said());
    // Cancelling keeps what was done.
    let cancelled = cluster.run(&["cancel", "", "--reason", "enough"]);
    assert!(cancelled.status.success(), "{}", text(&cancelled));
    cluster.wait_for("the end", |status| {
        status["jobs"][0]["state"] == "cancelled"
    });
    assert!(
        cluster.status()["jobs"][0]["waiting"]
            .as_str()
            .expect("a sentence")
            .contains("enough")
    );
    assert!(
        cluster
            .folder()
            .join("run/checkpoints")
            .read_dir()
            .expect("checkpoints")
            .count()
            > 0
    );
}

#[test]
fn a_job_of_a_service_tells_its_rewards_and_events_while_it_runs_waits_and_after_its_end() {
    let mut cluster = Cluster::start();
    cluster.worker("a");
    let config = job(
        "run",
        cluster.folder(),
        "[train]\nsteps = 20000\n[cluster]\nworkers = 1",
    );
    assert!(cluster.ask(&["submit"], &config).status.success());
    cluster.wait_for_step("run", 3);
    let screen = text(&cluster.run(&["status"]));
    for words in [
        "run  training  step ",
        "  loss ",
        " · chosen ",
        "last events of the job",
        "training begins with step 1",
        "last events of the service",
        "job run starts on a",
    ] {
        assert!(screen.contains(words), "no `{words}` in: {screen}");
    }
    let tells = |state: &'static str| {
        move |status: &Value| {
            let job = of(status, "run");
            let events = job["events"].as_array().expect("events");
            job["state"] == state
                && job["last_row"]["step"].as_u64() == job["committed_step"].as_u64()
                && job["steps_total"] == 20000
                && events.iter().any(|event| event["kind"] == "go")
        }
    };
    assert!(cluster.run(&["pause", "run"]).status.success());
    cluster.wait_for("the rewards of a paused job", tells("paused"));
    let screen = text(&cluster.run(&["status"]));
    assert!(
        screen.contains("  loss ") && screen.contains("last events of the job"),
        "{screen}"
    );
    assert!(cluster.run(&["resume", "run"]).status.success());
    cluster.wait_for("training", |status| {
        of(status, "run")["state"] == "training"
    });
    assert!(cluster.run(&["cancel", "run"]).status.success());
    cluster.wait_for("the rewards of a cancelled job", tells("cancelled"));
    let screen = text(&cluster.run(&["status"]));
    assert!(screen.contains("  loss "), "{screen}");
    let jobs = text(&cluster.run(&["jobs"]));
    assert!(jobs.contains("cancelled"), "{jobs}");
}

/// `outcome` and `reason` of the summary in a run directory.
fn outcome(folder: &Path) -> [String; 2] {
    let summary = fs::read(folder.join("summary.json")).expect("a summary");
    let summary: Value = serde_json::from_slice(&summary).expect("a summary is JSON");
    ["outcome", "reason"].map(|key| summary[key].as_str().unwrap_or_default().to_owned())
}

#[test]
fn a_cancelled_job_is_recorded_as_such_and_one_that_has_ended_is_not_steered() {
    let mut cluster = Cluster::start();
    cluster.worker("a");
    let endless = "[train]\nsteps = 20000\n[cluster]\nworkers = 1";
    let config = job("run", cluster.folder(), endless);
    let run = cluster.folder().join("run");
    let cancelled = ["cancelled", "was cancelled: enough"];
    // While it runs, and while it waits with a part of it done.
    for pause in [false, true] {
        assert!(cluster.ask(&["submit"], &config).status.success());
        cluster.wait_for("training", |status| {
            of(status, "run")["state"] == "training"
        });
        if pause {
            assert!(cluster.run(&["pause", "run"]).status.success());
            cluster.wait_for("the pause", |status| of(status, "run")["state"] == "paused");
            assert_eq!(outcome(&run), ["interrupted", ""]);
        }
        let asked = cluster.run(&["cancel", "run", "--reason", "enough"]);
        assert!(asked.status.success(), "{}", text(&asked));
        cluster.wait_for("the end", |status| {
            of(status, "run")["state"] == "cancelled"
        });
        assert_eq!(outcome(&run), cancelled);
    }
    let small = job(
        "small",
        cluster.folder(),
        "[train]\nsteps = 2\n[cluster]\nworkers = 1",
    );
    let done = cluster.ask(&["submit", "--watch"], &small);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done));
    for (name, state, cure) in [("run", "cancelled", true), ("small", "completed", false)] {
        for (command, done) in [
            ("cancel", "cancelled"),
            ("pause", "paused"),
            ("resume", "resumed"),
        ] {
            let refused = cluster.run(&[command, name]);
            let said = text(&refused);
            assert_eq!(refused.status.code(), Some(2), "{command} {name}: {said}");
            let words = format!("job {name} has ended: it is {state}, and cannot be {done}");
            assert!(said.contains(&words), "no `{words}` in: {said}");
            assert_eq!(said.contains("submit it again"), cure, "{said}");
        }
    }
}

#[test]
fn a_service_on_all_addresses_tells_one_that_can_be_connected_to() {
    let mut cluster = Cluster::start_on_all_addresses();
    cluster.wait_for("an answer", |_| true);
    let said = cluster.said();
    let told = said.split_once("worker --coordinator ").expect(&said).1;
    let url = told.split_once('`').expect(&said).0;
    assert!(!url.contains("0.0.0.0"), "{said}");
    let token = cluster.token_file().expect("a token");
    let answer = Command::new(program("coordinator"))
        .args(["status", url, "--token-file"])
        .arg(token)
        .output()
        .expect("it starts");
    assert!(answer.status.success(), "{url}: {}", text(&answer));
}

/// It tries for a minute, and a person wants to know at once why nothing happens.
#[test]
fn a_worker_without_a_coordinator_says_at_once_where_it_looks_and_until_when() {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr());
    let url = format!("http://{}", free.expect("a free port"));
    for (once, then) in [(true, "then this worker leaves"), (false, "and then anew")] {
        let mut command = Command::new(program("worker"));
        command
            .args(["--coordinator", &url, "--threads", "1"])
            .stdout(Stdio::null());
        command.args(once.then_some("--once"));
        let mut worker = command.stderr(Stdio::piped()).spawn().expect("it starts");
        let mut line = String::new();
        let stderr = worker.stderr.take().expect("a pipe");
        let read = BufReader::new(stderr).read_line(&mut line);
        worker.kill().expect("kill");
        worker.wait().expect("wait");
        read.expect("a line");
        for words in [
            &*format!("connect to the coordinator at {url}: "),
            "Connection refused",
            "trying again for 60 s",
            then,
        ] {
            assert!(line.contains(words), "no `{words}` in: {line}");
        }
    }
}

/// A worker that is cut off from the coordinator and from its peers, and comes back: no connection is closed, only silence tells.
#[test]
fn m4_a_partitioned_worker_is_left_behind_and_comes_back_when_the_network_heals() {
    let Some(network) = Network::new(3) else {
        return;
    };
    let mut cluster = Cluster::start_on(&network);
    let more = "[train]\nsteps = 20000\n[cluster]\nworkers = 3\nheartbeat_timeout_seconds = 1.0";
    let config = job("run", cluster.folder(), more);
    for (index, name) in ["a", "b", "c"].into_iter().enumerate() {
        cluster.worker_on(name, &network, index);
    }
    let token = cluster.token_file().expect("a token").display().to_string();
    let submitted = cluster.ask(&["submit", "--token-file", &token], &config);
    assert!(submitted.status.success(), "{}", text(&submitted));
    cluster.wait_for_step("run", 5);
    let world_is = |world: u64| move |status: &Value| status["jobs"][0]["world_size"] == world;
    for _ in 0..2 {
        network.cut(1);
        cluster.wait_for("two workers that go on", world_is(2));
        let held = cluster.status()["jobs"][0]["committed_step"].as_u64();
        cluster.wait_for_step("run", held.expect("a step") + 3);
        network.heal(1);
        cluster.wait_for("all three again", world_is(3));
    }
    let cancelled = cluster.run(&["cancel", "run", "--token-file", &token]);
    assert!(cancelled.status.success(), "{}", text(&cancelled));
    cluster.wait_for("the end", |status| {
        status["jobs"][0]["state"] == "cancelled"
    });
    let run = cluster.folder().join("run");
    let kinds = kinds(&run);
    assert!(!kinds.contains(&"rewind".to_owned()), "{}", cluster.said());
    let steps: Vec<u64> = training(&run)
        .iter()
        .map(|row| row["step"].as_u64().expect("a step"))
        .collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
}

#[test]
fn sigterm_saves_running_jobs_and_the_same_folder_goes_on_with_them() {
    let mut cluster = Cluster::start();
    let config = job("run", cluster.folder(), "[train]\nsteps = 60");
    cluster.worker("a");
    cluster.worker("b");
    assert!(cluster.ask(&["submit"], &config).status.success());
    cluster.wait_for_step("run", 3);
    assert_eq!(cluster.stop_coordinator(), Some(143));
    let events = fs::read_to_string(cluster.folder().join("run/events.jsonl")).expect("events");
    assert!(events.contains("interrupted after step"), "{events}");
    let rows = training(&cluster.folder().join("run")).len();
    cluster.start_again();
    cluster.wait_for("the end", |status| {
        status["jobs"][0]["state"] == "completed"
    });
    let all = training(&cluster.folder().join("run"));
    assert!(rows >= 3 && all.len() == 60, "{rows} and {}", all.len());
}

/// What the status says of a job.
fn of<'a>(status: &'a Value, name: &str) -> &'a Value {
    let mut jobs = status["jobs"].as_array().expect("jobs").iter();
    jobs.find(|job| job["job"] == name).expect(name)
}

/// Every step has one row, none is missing and none is double.
fn assert_all_steps(folder: &Path, steps: u64) {
    let rows = training(folder);
    let found: Vec<u64> = rows
        .iter()
        .map(|row| row["step"].as_u64().expect("a step"))
        .collect();
    assert_eq!(found, (1..=steps).collect::<Vec<_>>());
}

#[test]
fn a_job_with_a_higher_priority_takes_the_workers_of_a_running_one_which_goes_on_after_it() {
    const STEPS: u64 = 400;
    let mut cluster = Cluster::start();
    cluster.worker("a");
    cluster.worker("b");
    let more = format!("[train]\nsteps = {STEPS}\n[evaluate]\nevery_steps = 200");
    let low = job("low", cluster.folder(), &more);
    assert!(cluster.ask(&["submit"], &low).status.success());
    cluster.wait_for_step("low", 3);
    let high = job("high", cluster.folder(), "[job]\npriority = 10");
    let submitted = cluster.ask(&["submit"], &high);
    assert!(submitted.status.success(), "{}", text(&submitted));
    let said = text(&submitted);
    assert!(said.contains("waits for 2 workers: 0 idle"), "{said}");
    cluster.wait_for("room for high", |status| {
        of(status, "low")["state"] == "queued"
    });
    // With its state saved, where no attempt has failed.
    let status = cluster.status();
    let saved = of(&status, "low")["committed_step"].as_u64();
    assert!((Some(3)..Some(STEPS)).contains(&saved), "{status:#}");
    let jobs = text(&cluster.run(&["jobs"]));
    assert!(jobs.contains("priority"), "{jobs}");
    cluster.wait_for("the end of high", |status| {
        of(status, "high")["state"] == "completed"
    });
    assert_all_steps(&cluster.folder().join("high"), 24);
    cluster.wait_for("the end of low", |status| {
        of(status, "low")["state"] == "completed"
    });
    assert_all_steps(&cluster.folder().join("low"), STEPS);

    let status = cluster.status();
    assert_eq!(of(&status, "high")["priority"], 10);
    assert_eq!(of(&status, "low")["attempts"], 2, "{status:#}");
    assert_eq!(of(&status, "high")["attempts"], 1, "{status:#}");
    let events = status["events"].as_array().expect("events");
    let told = |kind: &str| -> Vec<String> {
        let found = events.iter().filter(|it| it["kind"] == kind);
        let texts = found.map(|it| it["text"].as_str().expect("a sentence"));
        texts.map(str::to_owned).collect()
    };
    assert!(told("retry").is_empty(), "it was no failure");
    let why = "makes room for job high, whose priority is 10 and not 0";
    assert_eq!(told("preempt"), [format!("job low saves, stops and {why}")]);
    let run = fs::read_to_string(cluster.folder().join("low/events.jsonl")).expect("events");
    assert!(run.contains(why), "{run}");
}

#[test]
fn a_paused_job_saves_stays_paused_over_a_restart_and_goes_on_when_it_is_resumed() {
    const STEPS: u64 = 400;
    let mut cluster = Cluster::start();
    cluster.worker("a");
    cluster.worker("b");
    let more = format!("[train]\nsteps = {STEPS}\n[evaluate]\nevery_steps = 200");
    let config = job("run", cluster.folder(), &more);
    assert!(cluster.ask(&["submit"], &config).status.success());
    cluster.wait_for_step("run", 3);
    for _ in 0..2 {
        let paused = cluster.run(&["pause", "run", "--reason", "for the night"]);
        assert!(paused.status.success(), "{}", text(&paused));
        assert!(
            text(&paused).contains("coordinator resume run"),
            "{}",
            text(&paused)
        );
    }
    cluster.wait_for("a paused job and idle workers", |status| {
        let workers = status["workers"].as_array().expect("workers");
        of(status, "run")["state"] == "paused" && workers.len() == 2
    });
    let status = cluster.status();
    let saved = of(&status, "run")["committed_step"].as_u64();
    assert!((Some(3)..Some(STEPS)).contains(&saved), "{status:#}");
    let unknown = cluster.run(&["pause", "nobody"]);
    assert_eq!(unknown.status.code(), Some(2), "{}", text(&unknown));

    assert_eq!(cluster.stop_coordinator(), Some(143));
    cluster.start_again();
    cluster.wait_for("the workers again", |status| {
        status["workers"].as_array().expect("workers").len() == 2
    });
    let status = cluster.status();
    let run = of(&status, "run");
    assert_eq!(run["state"], "paused", "{status:#}");
    assert_eq!(run["committed_step"].as_u64(), saved, "{status:#}");
    let waiting = run["waiting"].as_str().expect("a sentence");
    assert!(waiting.contains("for the night"), "{waiting}");
    for _ in 0..2 {
        let resumed = cluster.run(&["resume", "run"]);
        assert!(resumed.status.success(), "{}", text(&resumed));
    }
    cluster.wait_for("the end", |status| {
        of(status, "run")["state"] == "completed"
    });
    assert_all_steps(&cluster.folder().join("run"), STEPS);
    // Of a job that has ended there is nothing to pause.
    let late = cluster.run(&["pause", "run"]);
    assert_eq!(late.status.code(), Some(2), "{}", text(&late));
    assert!(text(&late).contains("completed"), "{}", text(&late));
}

#[test]
fn s1_without_the_token_nobody_but_a_health_probe_gets_in() {
    let mut cluster = Cluster::start_with_token("s3cret-and-long");
    let token = cluster.folder().join("token").display().to_string();
    let closed = cluster.run(&["status"]);
    assert_eq!(closed.status.code(), Some(2), "{}", text(&closed));
    assert!(text(&closed).contains("--token-file"), "{}", text(&closed));
    let other = cluster.folder().join("other");
    fs::write(&other, "guess\n").expect("write");
    let wrong = cluster.run(&["status", "--token-file", &other.display().to_string()]);
    assert_eq!(wrong.status.code(), Some(2), "{}", text(&wrong));
    assert!(
        cluster
            .run(&["status", "--token-file", &token])
            .status
            .success()
    );

    let worker = |more: &[&str]| {
        Command::new(program("worker"))
            .args(["--coordinator", cluster.url(), "--once", "--threads", "1"])
            .args(more)
            .output()
            .expect("it starts")
    };
    let stranger = worker(&[]);
    assert_eq!(stranger.status.code(), Some(2), "{}", text(&stranger));
    assert!(
        text(&stranger).contains("does not let this worker in"),
        "{}",
        text(&stranger)
    );
    cluster.worker("a");
    cluster.worker("b");
    let config = job("run", cluster.folder(), "[train]\nsteps = 2");
    let done = cluster.ask(&["submit", "--watch", "--token-file", &token], &config);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done));
    let said = cluster.said();
    assert!(!said.contains("s3cret"), "the token is in the log: {said}");
}

/// A worker of another build, played by the generated client.
#[test]
fn a_worker_of_another_build_is_told_what_both_run_and_to_stay_away() {
    let cluster = Cluster::start();
    let join = wire::proto::FromWorker {
        incarnation: 7,
        message: Some(wire::proto::from_worker::Message::Join(wire::proto::Join {
            build: "9.9.9".into(),
            wire_version: wire::WIRE_VERSION,
            address: "127.0.0.1:4000".into(),
            name: "old".into(),
            device: String::new(),
        })),
        ..wire::proto::FromWorker::default()
    };
    let told = runtime().block_on(async {
        let url = cluster.url().to_owned();
        let mut client = wire::proto::workers_client::WorkersClient::connect(url)
            .await
            .expect("a connection");
        let open =
            tokio_stream::StreamExt::chain(tokio_stream::once(join), tokio_stream::pending());
        let mut answers = client.session(open).await.expect("a session").into_inner();
        answers
            .message()
            .await
            .expect("an answer")
            .expect("a message")
    });
    let Some(wire::proto::to_worker::Message::Stop(stop)) = told.message else {
        panic!("{told:?}");
    };
    assert!(
        stop.reason.contains("it runs build 9.9.9, the coordinator"),
        "{}",
        stop.reason
    );
    assert_eq!(stop.afterwards(), wire::proto::Afterwards::Refused);
    assert!(
        cluster.said().contains("worker old may not join"),
        "{}",
        cluster.said()
    );
}

#[test]
fn a_second_coordinator_on_one_state_folder_is_refused_with_the_first_ones_process() {
    let cluster = Cluster::start();
    let state = cluster.folder().join("state");
    let second = Command::new(program("coordinator"))
        .args(["--cluster", "--set", "cluster.listen=127.0.0.1:0"])
        .args(["--set", &format!("cluster.state={}", state.display())])
        .output()
        .expect("it starts");
    assert_eq!(second.status.code(), Some(1), "{}", text(&second));
    for word in ["cluster.state", "another coordinator", "is held by process"] {
        assert!(
            text(&second).contains(word),
            "no `{word}` in {}",
            text(&second)
        );
    }
}

#[test]
fn without_workers_for_a_minute_the_queue_says_again_what_it_waits_for() {
    let mut cluster = Cluster::start();
    let config = job("run", cluster.folder(), "");
    assert!(cluster.ask(&["submit"], &config).status.success());
    cluster.wait_for("a reminder", |status| {
        let mut events = status["events"].as_array().expect("events").iter();
        let wait = events.find(|event| event["kind"] == "wait");
        wait.is_some_and(|event| {
            let text = event["text"].as_str().expect("a sentence");
            text.contains("job run waits for 2 workers: 0 idle; start 2 workers more")
        })
    });
}

#[test]
fn a_checkpoint_folder_that_a_worker_sees_differently_is_refused_before_a_step_runs() {
    let mut cluster = Cluster::start();
    let config = job("run", cluster.folder(), "[cluster]\nworkers = 1");
    // A worker whose view of the folder is another disk: a mount namespace of its own.
    let run = cluster.folder().join("run");
    fs::create_dir_all(&run).expect("a folder");
    let mount = format!("mount -t tmpfs tmpfs {}", run.display());
    if !cluster.worker_behind("a", &mount) {
        return eprintln!("skipped: this user may not make a mount namespace");
    }
    let done = cluster.ask(&["submit", "--watch"], &config);
    assert_eq!(done.status.code(), Some(1), "{}", text(&done));
    for word in [
        "checkpoint.path",
        "on a is not the coordinator's folder",
        "must see one folder",
    ] {
        assert!(text(&done).contains(word), "no `{word}` in {}", text(&done));
    }
    assert!(training(&run).is_empty());
}

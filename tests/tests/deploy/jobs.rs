//! Kubernetes Jobs: rules that a server has and schemas have not, and the job that they run.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};
use tests::programs::{program, text};
use tests::workspace_root;

use crate::manifest::{Overlay, array, command, container, labels, name, overlays, pod};

/// Bad usage or configuration: do not try again.
const USAGE: u64 = 2;

/// `job.toml` of an overlay that runs one job.
fn job_file(overlay: &Overlay) -> Option<&str> {
    let submit = overlay.find("Job", "caldpo-submit")?;
    let path = command(container(submit))[2];
    let text = overlay.mounted_text(submit, path);
    Some(text.unwrap_or_else(|| panic!("{}: nothing at {path}", overlay.name)))
}

#[test]
fn failure_policies_hold_only_where_a_server_accepts_them() {
    for overlay in overlays() {
        for job in overlay.kind("Job") {
            let what = format!("{}: {}", overlay.name, name(job));
            let spec = &job["spec"];
            let policies = [&spec["podFailurePolicy"], &spec["backoffLimitPerIndex"]];
            if policies.iter().any(|policy| !policy.is_null()) {
                assert_eq!(pod(job)["restartPolicy"], "Never", "{what}");
            }
            if !spec["backoffLimitPerIndex"].is_null() {
                assert_eq!(spec["completionMode"], "Indexed", "{what}");
                // The two limits exclude each other's default.
                assert!(spec["backoffLimit"].is_null(), "{what}");
            }
            // With a failure policy no other value is valid.
            assert_eq!(spec["podReplacementPolicy"], "Failed", "{what}");
            assert!(
                spec["selector"].is_null(),
                "{what}: a Job makes its selector itself"
            );
        }
    }
}

#[test]
fn a_disruption_costs_no_try_and_bad_usage_ends_the_job() {
    for overlay in overlays() {
        for job in overlay.kind("Job") {
            let what = format!("{}: {}", overlay.name, name(job));
            let rules = array(&job["spec"]["podFailurePolicy"]["rules"]);
            // The first rule that matches counts: a drained pod must not be judged by its exit code.
            let expected = [
                json!({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}),
                json!({"action": "FailJob", "onExitCodes": {
                    "containerName": container(job)["name"], "operator": "In", "values": [USAGE],
                }}),
            ];
            assert_eq!(rules, expected, "{what}");
        }
    }
}

#[test]
fn all_workers_of_a_job_run_at_once_and_are_as_many_as_it_asks_for() {
    for overlay in overlays() {
        let Some(text) = job_file(overlay) else {
            continue;
        };
        let job: toml::Table = text.parse().expect("TOML");
        let workers = &overlay
            .find("Job", "caldpo-once")
            .expect("the job's workers")["spec"];
        let asked = job["cluster"]["workers"].as_integer();
        assert_eq!(
            workers["completions"].as_i64(),
            asked,
            "{}: cluster.workers",
            overlay.name
        );
        assert_eq!(
            workers["parallelism"], workers["completions"],
            "{}",
            overlay.name
        );
        assert!(
            overlay.find("StatefulSet", "caldpo-worker").is_none(),
            "{}: serving workers would take the job",
            overlay.name
        );
    }
}

#[test]
fn the_program_accepts_every_job_file() {
    let mut checked = 0;
    for entry in
        fs::read_dir(workspace_root().join("deploy/kubernetes/overlays")).expect("overlays")
    {
        let file = entry.expect("an entry").path().join("job.toml");
        if !file.exists() {
            continue;
        }
        let output = Command::new(program("coordinator"))
            .arg("config")
            .arg(&file)
            .output()
            .expect("it starts");
        assert!(
            output.status.success(),
            "{}: {}",
            file.display(),
            text(&output)
        );
        checked += 1;
    }
    assert!(checked > 0, "no job.toml in any overlay");
}

#[test]
fn a_worker_for_one_job_is_a_serving_worker_with_once() {
    let pods = |overlay: &str, kind: &str, workload: &str| {
        let overlay = overlays().iter().find(|found| found.name == overlay)?;
        let workload = overlay.find(kind, workload);
        let workload = workload.unwrap_or_else(|| panic!("{}: no workers", overlay.name));
        Some((pod(workload).clone(), labels(workload).clone()))
    };
    for hardware in ["cpu", "h100x8"] {
        let serving = pods(hardware, "StatefulSet", "caldpo-worker");
        let once = pods(&format!("{hardware}-once"), "Job", "caldpo-once");
        let (Some((mut serving, mut serving_labels)), Some((once, once_labels))) = (serving, once)
        else {
            return;
        };
        serving["restartPolicy"] = json!("Never");
        serving["subdomain"] = json!("caldpo-worker");
        let arguments = serving["containers"][0]["args"].as_array_mut();
        arguments.expect("arguments").insert(1, json!("--once"));
        assert_eq!(once, serving, "{hardware}");
        // Apart, so that the StatefulSet does not take the Job's pods for its own.
        assert_eq!(serving_labels["mode"], "serve", "{hardware}");
        serving_labels["mode"] = Value::from("once");
        assert_eq!(once_labels, serving_labels, "{hardware}");
    }
}

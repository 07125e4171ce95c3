//! What every pod must be: unprivileged, with all that it mounts, and with time to leave.

use serde_json::{Value, json};

use crate::image::Dockerfile;
use crate::manifest::{array, command, container, flag, matches, name, overlays, pod, ports};

/// What a step may take between SIGTERM and the snapshot, in seconds.
const STEP_SECONDS: u64 = 300;

/// The shortest time in which a worker leaves in good order: the step that runs, then a job's limit for its last checkpoint.
pub fn leaving_seconds() -> u64 {
    let defaults = include_str!("../../../crates/coordinator/src/config/defaults.toml");
    let defaults: toml::Table = defaults.parse().expect("TOML");
    let save = defaults["cluster"]["save_timeout_seconds"].as_integer();
    STEP_SECONDS + u64::try_from(save.expect("seconds")).expect("seconds")
}

#[test]
fn images_are_those_of_the_dockerfile_in_this_version_and_hold_the_program() {
    let dockerfile = Dockerfile::read();
    for overlay in overlays() {
        for workload in overlay.workloads() {
            let container = container(workload);
            let what = format!("{}: {}", overlay.name, name(workload));
            let image = container["image"].as_str().expect("an image");
            let (image, tag) = image.split_once(':').expect("a tag");
            let target = image.strip_prefix("caldpo-").expect("one of ours");
            let holds = dockerfile.programs(target);
            let program = command(container)[0];
            assert!(
                holds.iter().any(|held| held == program),
                "{what}: {image} holds {holds:?}, not {program}"
            );
            let version = env!("CARGO_PKG_VERSION");
            let (tagged, variant) = tag.split_once('-').unwrap_or((tag, ""));
            assert_eq!(tagged, version, "{what}: tag of {image}");
            let on_cpu = target == "worker" && overlay.name.starts_with("cpu");
            assert_eq!(
                variant == "cpu",
                on_cpu,
                "{what}: {image}:{tag} in {}",
                overlay.name
            );
            for port in ports(container).values() {
                assert!(
                    dockerfile.exposed(target).contains(port),
                    "{what}: {image} does not expose {port}"
                );
            }
        }
    }
}

#[test]
fn pods_are_unprivileged() {
    let user = Dockerfile::read().user();
    for overlay in overlays() {
        for workload in overlay.workloads() {
            let what = format!("{}: {}", overlay.name, name(workload));
            let pod = pod(workload);
            let context = json!({
                "runAsNonRoot": true, "runAsUser": user, "runAsGroup": user, "fsGroup": user,
                "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
            });
            assert_eq!(pod["securityContext"], context, "{what}");
            assert_eq!(pod["automountServiceAccountToken"], false, "{what}");
            let context = json!({
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]},
            });
            assert_eq!(container(workload)["securityContext"], context, "{what}");
        }
    }
}

#[test]
fn whatever_is_mounted_exists() {
    for overlay in overlays() {
        for workload in overlay.workloads() {
            let what = format!("{}: {}", overlay.name, name(workload));
            let claims = array(&workload["spec"]["volumeClaimTemplates"]);
            let volumes = array(&pod(workload)["volumes"]);
            for mount in array(&container(workload)["volumeMounts"]) {
                let mounted = &mount["name"];
                let claimed = claims
                    .iter()
                    .any(|claim| claim["metadata"]["name"] == *mounted);
                let declared = volumes.iter().any(|volume| volume["name"] == *mounted);
                assert!(claimed || declared, "{what}: no volume {mounted}");
            }
            for volume in volumes {
                let sources = [
                    ("ConfigMap", &volume["configMap"]["name"]),
                    ("Secret", &volume["secret"]["secretName"]),
                    (
                        "PersistentVolumeClaim",
                        &volume["persistentVolumeClaim"]["claimName"],
                    ),
                ];
                let named = sources.into_iter().filter(|(_, name)| !name.is_null());
                for (kind, source) in named {
                    let source = source.as_str().expect("a name");
                    assert!(
                        overlay.find(kind, source).is_some(),
                        "{what}: no {kind} {source}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_token_is_read_where_the_secret_is_mounted() {
    for overlay in overlays() {
        for workload in overlay.workloads() {
            let what = format!("{}: {}", overlay.name, name(workload));
            let mounts = array(&container(workload)["volumeMounts"]);
            let mount = mounts.iter().find(|mount| mount["name"] == "token");
            let mount = mount.unwrap_or_else(|| panic!("{what}: no token"));
            let volumes = array(&pod(workload)["volumes"]);
            let volume = volumes
                .iter()
                .find(|volume| volume["name"] == "token")
                .expect("a volume");
            let secret = volume["secret"]["secretName"].as_str().expect("a secret");
            let secret = overlay.find("Secret", secret).expect("the secret");
            assert!(secret["data"]["token"].is_string(), "{what}: its key");
            let Some(read) = flag(container(workload), "--token-file") else {
                continue;
            };
            let folder = mount["mountPath"].as_str().expect("a path");
            assert_eq!(read, format!("{folder}/token"), "{what}");
        }
    }
}

#[test]
fn the_shared_folder_is_one_claim_under_one_path_and_the_working_directory() {
    for overlay in overlays() {
        let shared = overlay.workloads().filter(|workload| {
            let mounts = array(&container(workload)["volumeMounts"]);
            mounts.iter().any(|mount| mount["name"] == "shared")
        });
        let places: Vec<_> = shared
            .map(|workload| {
                let mounts = array(&container(workload)["volumeMounts"]);
                let mount = mounts
                    .iter()
                    .find(|mount| mount["name"] == "shared")
                    .expect("it is");
                let volumes = array(&pod(workload)["volumes"]);
                let volume = volumes
                    .iter()
                    .find(|volume| volume["name"] == "shared")
                    .expect("a volume");
                let folder = &container(workload)["workingDir"];
                assert_eq!(folder, &mount["mountPath"], "{}", name(workload));
                (folder, &volume["persistentVolumeClaim"]["claimName"])
            })
            .collect();
        assert!(
            places.len() >= 2,
            "{}: coordinator and workers",
            overlay.name
        );
        assert!(
            places.iter().all(|place| *place == places[0]),
            "{}: {places:?}",
            overlay.name
        );
        let claim = places[0].1.as_str().expect("a claim");
        let claim = overlay
            .find("PersistentVolumeClaim", claim)
            .expect("the claim");
        assert_eq!(claim["spec"]["accessModes"], json!(["ReadWriteMany"]));
    }
}

#[test]
fn pods_get_the_time_to_save_before_they_are_killed() {
    for overlay in overlays() {
        for workload in overlay.workloads() {
            // What submits has nothing to save.
            if container(workload)["name"] == "submit" {
                continue;
            }
            let grace = pod(workload)["terminationGracePeriodSeconds"].as_u64();
            assert!(
                grace >= Some(leaving_seconds()),
                "{}: {}: {grace:?} seconds",
                overlay.name,
                name(workload)
            );
        }
    }
}

#[test]
fn no_disruption_budget_holds_the_coordinator_on_its_node() {
    for overlay in overlays() {
        let coordinator = overlay
            .find("StatefulSet", "caldpo-coordinator")
            .expect("a coordinator");
        assert_eq!(coordinator["spec"]["replicas"], 1, "{}", overlay.name);
        for budget in overlay.kind("PodDisruptionBudget") {
            let selector = &budget["spec"]["selector"]["matchLabels"];
            assert!(
                !matches(selector, crate::manifest::labels(coordinator)),
                "{}: {} blocks every drain",
                overlay.name,
                name(budget)
            );
        }
    }
}

#[test]
fn each_worker_of_a_gpu_overlay_has_one_gpu_and_shared_memory_and_no_other_overlay_asks_for_gpus() {
    for overlay in overlays() {
        let on_gpus = overlay.name.starts_with("h100x8");
        let mut workers = 0;
        for workload in overlay.workloads() {
            let container = container(workload);
            let what = format!("{}: {}", overlay.name, name(workload));
            let is_worker = container["name"] == "worker";
            let limits = &container["resources"]["limits"];
            let gpus = limits["nvidia.com/gpu"].as_u64().unwrap_or(0);
            assert_eq!(gpus, u64::from(on_gpus && is_worker), "{what}");
            if !is_worker {
                continue;
            }
            let backend = if on_gpus { "cuda" } else { "cpu" };
            assert_eq!(flag(container, "--backend"), Some(backend), "{what}");
            let tolerations = array(&pod(workload)["tolerations"]);
            let tolerates = tolerations
                .iter()
                .any(|toleration| toleration["key"] == "nvidia.com/gpu");
            assert_eq!(tolerates, on_gpus, "{what}");
            let mounts = array(&container["volumeMounts"]);
            let memory = mounts.iter().find(|mount| mount["mountPath"] == "/dev/shm");
            let memory = &memory.expect("/dev/shm")["name"];
            let volumes = array(&pod(workload)["volumes"]);
            let memory = volumes.iter().find(|volume| volume["name"] == *memory);
            let size = if on_gpus { "16Gi" } else { "1Gi" };
            assert_eq!(
                memory.expect("a volume")["emptyDir"],
                json!({"medium": "Memory", "sizeLimit": size}),
                "{what}"
            );
            let spec = &workload["spec"];
            let count = [&spec["replicas"], &spec["completions"]]
                .into_iter()
                .find_map(Value::as_u64);
            workers += count.expect("a number of workers");
        }
        assert_eq!(workers, if on_gpus { 8 } else { 2 }, "{}", overlay.name);
    }
}

#[test]
fn no_token_is_in_the_tree() {
    let root = tests::workspace_root();
    let ignored = std::fs::read_to_string(root.join(".gitignore")).expect("read .gitignore");
    let token = "/deploy/kubernetes/base/token";
    assert!(
        ignored.lines().any(|line| line == token),
        ".gitignore lacks {token}"
    );
}

//! The service's configuration: its addresses and paths are what the manifests serve and mount, and the program takes it.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::programs::{program, signal};
use tests::workspace_root;

use crate::manifest::{array, container, flag, name, overlays, port, ports};
use crate::units;

/// Longer than a start takes on two busy cores; only a hang exceeds it.
const PATIENCE: Duration = Duration::from_mins(1);
/// 128 + SIGTERM: it left in good order because it was asked to.
const EXIT_TERMINATED: i32 = 143;

fn parse(text: &str) -> toml::Table {
    text.parse().expect("TOML")
}

fn text<'a>(config: &'a toml::Table, section: &str, key: &str) -> &'a str {
    let value = config[section][key].as_str();
    value.unwrap_or_else(|| panic!("{section}.{key} is not a text"))
}

#[test]
fn listeners_are_container_ports_and_paths_are_mounts() {
    for overlay in overlays() {
        let coordinator = overlay
            .find("StatefulSet", "caldpo-coordinator")
            .expect("a coordinator");
        let container = container(coordinator);
        let path = flag(container, "--config").expect("a configuration");
        let config = overlay.mounted_text(coordinator, path);
        let config = parse(config.unwrap_or_else(|| panic!("{}: no {path}", overlay.name)));
        let ports = ports(container);
        let what = format!("{}: {}", overlay.name, name(coordinator));

        let listen = text(&config, "cluster", "listen");
        assert_eq!(ports["grpc"], port(listen), "{what}: cluster.listen");
        let metrics = text(&config, "telemetry", "metrics_listen");
        assert_eq!(ports["metrics"], port(metrics), "{what}: metrics_listen");
        for address in [listen, metrics] {
            assert!(
                address.starts_with("0.0.0.0:"),
                "{what}: {address} is not reached from other pods"
            );
        }

        // The queue outlives the pod, on a volume of its own.
        let state = text(&config, "cluster", "state");
        let claims = array(&coordinator["spec"]["volumeClaimTemplates"]);
        let mounts = array(&container["volumeMounts"]);
        let kept = mounts.iter().any(|mount| {
            let folder = mount["mountPath"].as_str().expect("a path");
            let own = |claim: &Value| claim["metadata"]["name"] == mount["name"];
            state.starts_with(&format!("{folder}/")) && claims.iter().any(own)
        });
        assert!(kept, "{what}: {state} is lost with the pod");
        let token = text(&config, "security", "token_file");
        let mounted = mounts.iter().any(|mount| {
            let folder = mount["mountPath"].as_str().expect("a path");
            mount["name"] == "token" && token == format!("{folder}/token")
        });
        assert!(mounted, "{what}: no token at {token}");
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// Starts the service with the configuration, on ports and paths of this machine, and stops it once it serves. The hosts it
/// listens on stay: whoever listens beyond loopback must have a token.
fn check(file: &str) {
    let path = workspace_root().join("deploy").join(file);
    let config = parse(&fs::read_to_string(&path).expect("a configuration"));
    let elsewhere = |section: &str, key: &str| {
        let (host, _) = text(&config, section, key)
            .rsplit_once(':')
            .expect("a port");
        format!("{host}:{}", free_port())
    };
    let listen = elsewhere("cluster", "listen");
    let metrics = elsewhere("telemetry", "metrics_listen");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let token = folder.path().join("token");
    fs::write(&token, "0123456789abcdef0123456789abcdef\n").expect("write a token");
    let said = folder.path().join("said.txt");
    let said_file = fs::File::create(&said).expect("a file for what it says");
    let said = || fs::read_to_string(&said).unwrap_or_default();
    let served = format!("127.0.0.1:{}", port(&listen));
    let mut child = Command::new(program("coordinator"))
        .args(["--cluster", "--log=json", "--config"])
        .arg(path)
        .env("CALDPO__CLUSTER__LISTEN", &listen)
        .env("CALDPO__CLUSTER__STATE", folder.path().join("state"))
        .env("CALDPO__SECURITY__TOKEN_FILE", token)
        .env("CALDPO__TELEMETRY__METRICS_LISTEN", metrics)
        .stdin(Stdio::null())
        .stdout(said_file.try_clone().expect("one more handle"))
        .stderr(said_file)
        .spawn()
        .expect("the coordinator starts");
    let start = Instant::now();
    let mut asked = false;
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        if start.elapsed() > PATIENCE {
            child.kill().expect("kill it");
            child.wait().expect("a child");
            panic!("{file}: it hangs: {}", said());
        }
        if !asked && TcpStream::connect(&served).is_ok() {
            signal(&child.id().to_string(), "TERM");
            asked = true;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(asked, "{file} is refused: {}", said());
    assert_eq!(status.code(), Some(EXIT_TERMINATED), "{file}: {}", said());
}

#[test]
fn the_program_serves_with_the_configuration_of_the_manifests_and_leaves_on_sigterm() {
    check("kubernetes/base/service.toml");
}

#[test]
fn the_program_serves_with_the_configuration_of_the_units_and_leaves_on_sigterm() {
    check("systemd/service.toml");
}

#[test]
fn the_unit_keeps_the_state_where_it_may_write() {
    let unit = units::read("caldpo-coordinator.service");
    let config = units::read("service.toml");
    let folder = format!("/var/lib/{}/", units::value(&unit, "StateDirectory"));
    let config = parse(&config);
    let state = text(&config, "cluster", "state");
    assert!(state.starts_with(&folder), "{state} is not below {folder}");
    let start = units::value(&unit, "ExecStart");
    assert!(
        start.contains("--config /etc/caldpo/service.toml"),
        "{start}"
    );
}

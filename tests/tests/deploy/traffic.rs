//! Who reaches whom: selectors, services, ports, probes, network policies.

use serde_json::{Value, json};

use crate::manifest::{
    Overlay, array, container, flag, labels, matches, name, overlays, pod, port, ports,
};

#[test]
fn selectors_pick_the_pods_of_their_own_workload_and_of_no_other() {
    for overlay in overlays() {
        for workload in overlay.kind("StatefulSet") {
            let selector = &workload["spec"]["selector"]["matchLabels"];
            let picked: Vec<_> = overlay.selected(selector).map(name).collect();
            assert_eq!(picked, [name(workload)], "{}", overlay.name);
        }
    }
}

#[test]
fn every_service_picks_pods_and_its_ports_are_theirs() {
    for overlay in overlays() {
        for service in overlay.kind("Service") {
            let what = format!("{}: service {}", overlay.name, name(service));
            let picked: Vec<_> = overlay.selected(&service["spec"]["selector"]).collect();
            assert!(!picked.is_empty(), "{what} picks no pod");
            for workload in picked {
                let ports = ports(container(workload));
                for port in array(&service["spec"]["ports"]) {
                    let target = port["targetPort"].as_str().expect("a named port");
                    assert_eq!(
                        ports.get(target),
                        port["port"].as_u64().as_ref(),
                        "{what}: port {target} of {}",
                        name(workload)
                    );
                }
            }
        }
    }
}

#[test]
fn pods_have_the_service_that_gives_them_names() {
    for overlay in overlays() {
        for workload in overlay.workloads() {
            let what = format!("{}: {}", overlay.name, name(workload));
            let governing = [
                &workload["spec"]["serviceName"],
                &pod(workload)["subdomain"],
            ];
            for governing in governing.into_iter().filter_map(Value::as_str) {
                let service = overlay.find("Service", governing);
                let service = service.unwrap_or_else(|| panic!("{what}: no service {governing}"));
                assert!(
                    matches(&service["spec"]["selector"], labels(workload)),
                    "{what}: service {governing} does not pick its pods"
                );
            }
        }
        // Workers find each other before they are ready, and come up together.
        let service = overlay
            .find("Service", "caldpo-worker")
            .expect("the workers' service");
        assert_eq!(service["spec"]["clusterIP"], "None", "{}", overlay.name);
        assert_eq!(
            service["spec"]["publishNotReadyAddresses"], true,
            "{}",
            overlay.name
        );
        if let Some(workers) = overlay.find("StatefulSet", "caldpo-worker") {
            assert_eq!(
                workers["spec"]["podManagementPolicy"], "Parallel",
                "{}",
                overlay.name
            );
        }
    }
}

#[test]
fn probes_ask_ports_that_the_container_serves() {
    for overlay in overlays() {
        for workload in overlay.workloads() {
            let what = format!("{}: {}", overlay.name, name(workload));
            let container = container(workload);
            let ports = ports(container);
            // A port number that nothing declares is legal, and never answers. gRPC probes take no port names.
            for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
                let probed = [
                    &container[probe]["grpc"]["port"],
                    &container[probe]["tcpSocket"]["port"],
                ];
                let served = |port: &Value| match port.as_str() {
                    Some(name) => ports.contains_key(name),
                    None => ports.values().any(|served| port == *served),
                };
                let asked: Vec<_> = probed.into_iter().filter(|port| !port.is_null()).collect();
                assert!(
                    asked.iter().all(|port| served(port)),
                    "{what}: {probe} asks {asked:?}, served are {ports:?}"
                );
                let serves = !ports.is_empty();
                assert_eq!(asked.len(), usize::from(serves), "{what}: {probe}");
            }
            if let Some(health) = flag(container, "--health") {
                assert_eq!(ports.get("health"), Some(&port(health)), "{what}");
                assert_eq!(
                    container["readinessProbe"]["grpc"]["port"],
                    port(health),
                    "{what}"
                );
                // Its health says whether the coordinator is there, for whose absence no worker should be killed.
                assert!(container["livenessProbe"]["grpc"].is_null(), "{what}");
            }
        }
    }
}

#[test]
fn addresses_in_arguments_are_services_of_the_overlay() {
    for overlay in overlays() {
        let mut asked = 0;
        for workload in overlay.workloads() {
            let Some(url) = flag(container(workload), "--coordinator") else {
                continue;
            };
            let what = format!("{}: {}: {url}", overlay.name, name(workload));
            let host = url.strip_prefix("http://").expect("a URL");
            let (host, _) = host.rsplit_once(':').expect("a port");
            let service = overlay.find("Service", host);
            let service = service.unwrap_or_else(|| panic!("{what}: no such service"));
            let served = array(&service["spec"]["ports"])
                .iter()
                .find(|served| served["name"] == "grpc");
            assert_eq!(served.expect("a gRPC port")["port"], port(url), "{what}");
            asked += 1;
        }
        assert!(asked > 0, "{}: nobody asks a coordinator", overlay.name);
    }
}

/// Whether policies let the pods of `from` open a connection to `port` of the pods of `to`; no policy forbids nothing.
fn allowed(overlay: &Overlay, from: &Value, to: &Value, port: u64) -> bool {
    let side = |workload: &Value, other: &Value, direction: &str, peers: &str| {
        let kind = if direction == "ingress" {
            "Ingress"
        } else {
            "Egress"
        };
        let mut policies = overlay
            .kind("NetworkPolicy")
            .filter(|policy| {
                matches(
                    &policy["spec"]["podSelector"]["matchLabels"],
                    labels(workload),
                ) && array(&policy["spec"]["policyTypes"]).contains(&json!(kind))
            })
            .peekable();
        if policies.peek().is_none() {
            return true;
        }
        policies.any(|policy| {
            array(&policy["spec"][direction]).iter().any(|rule| {
                let peer = rule[peers].is_null()
                    || array(&rule[peers]).iter().any(|peer| {
                        peer["namespaceSelector"].is_null()
                            && matches(&peer["podSelector"]["matchLabels"], labels(other))
                    });
                let ports = rule["ports"].is_null()
                    || array(&rule["ports"])
                        .iter()
                        .any(|allowed| allowed["port"] == port && allowed["protocol"] == "TCP");
                peer && ports
            })
        })
    };
    side(from, to, "egress", "to") && side(to, from, "ingress", "from")
}

#[test]
fn policies_allow_what_is_needed_and_no_more() {
    const EPHEMERAL: u64 = 40123;
    for overlay in overlays() {
        let coordinator = overlay
            .find("StatefulSet", "caldpo-coordinator")
            .expect("a coordinator");
        let grpc = ports(container(coordinator))["grpc"];
        for workload in overlay.workloads() {
            let what = format!("{}: {}", overlay.name, name(workload));
            if flag(container(workload), "--coordinator").is_some() {
                assert!(allowed(overlay, workload, coordinator, grpc), "{what}");
                assert!(
                    !allowed(overlay, workload, coordinator, EPHEMERAL),
                    "{what}"
                );
            }
            let is_worker = container(workload)["name"] == "worker";
            assert_eq!(
                allowed(overlay, workload, workload, EPHEMERAL),
                is_worker,
                "{what}: collectives among its pods"
            );
        }
        for policy in overlay.kind("NetworkPolicy") {
            let metrics = array(&policy["spec"]["ingress"])
                .iter()
                .flat_map(|rule| array(&rule["ports"]))
                .filter(|port| port["port"] != grpc);
            for port in metrics {
                assert_eq!(port["port"], ports(container(coordinator))["metrics"]);
            }
        }
    }
}

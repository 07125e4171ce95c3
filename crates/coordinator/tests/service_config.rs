//! Which keys are a service's and which a job's, and who may come in.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use coordinator::config::{Config, ServiceConfig, Sources};

fn sources(text: &str, environment: &[(&str, &str)]) -> Sources {
    let pairs = environment.iter();
    Sources {
        texts: vec![("here".into(), text.into())],
        environment: pairs.map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        ..Sources::default()
    }
}

fn service(text: &str) -> Result<ServiceConfig, String> {
    ServiceConfig::load(&sources(text, &[])).map_err(|error| error.to_string())
}

const JOB: &str = "job.name = \"j\"\nmodel.path = \"m\"\ndata.train = [\"a.jsonl\"]\n";

fn job(more: &str) -> Result<Config, String> {
    let text = format!("{JOB}{more}\n");
    Config::load_job(&sources(&text, &[])).map_err(|error| error.to_string())
}

fn check(refused: Result<impl Sized, String>, parts: &[&str]) {
    let error = refused.err().expect("refused");
    for part in parts {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
}

#[test]
fn a_service_has_an_address_a_folder_and_nothing_of_a_job() {
    let plain = service("").unwrap();
    assert_eq!(plain.listen.to_string(), "127.0.0.1:7070");
    assert_eq!(plain.state.display().to_string(), "cluster");
    let named = service("[cluster]\nlisten = \"127.0.0.1:0\"\nstate = \"s\"").unwrap();
    assert_eq!(named.listen.to_string(), "127.0.0.1:0");
    for key in [
        "objective.beta = 0.1",
        "cluster.workers = 2",
        "job.name = \"j\"",
    ] {
        let name = key.split(' ').next().unwrap();
        check(
            service(key),
            &[name, "here:1", "belongs to a job", "coordinator submit"],
        );
    }
    check(
        service("security.tokn_file = \"t\""),
        &["security.tokn_file", "token_file"],
    );
}

#[test]
fn a_job_has_nothing_of_a_service_and_its_text_says_all_of_it() {
    for key in [
        "cluster.listen = \"127.0.0.1:1\"",
        "cluster.state = \"s\"",
        "security.insecure = true",
    ] {
        let name = key.split(' ').next().unwrap();
        check(job(key), &[name, "here:4", "belongs to the service"]);
    }
    let config = job("cluster.workers = 3").unwrap();
    let text = config.to_job_toml();
    let again = Config::load_job(&sources(&text, &[])).unwrap();
    assert_eq!(again.to_job_toml(), text);
    assert_eq!(
        (again.cluster.workers, again.identity),
        (3, config.identity)
    );
    check(
        Config::load_job(&sources("model.path = \"m\"", &[])).map_err(|it| it.to_string()),
        &["job.name", "is missing"],
    );
}

#[test]
fn whoever_submits_may_have_a_services_variables_around() {
    let environment = [
        ("CALDPO__SECURITY__TOKEN_FILE", "t"),
        ("CALDPO__CLUSTER__LISTEN", "127.0.0.1:1"),
        ("CALDPO__OBJECTIVE__KIND", "cal_dpo"),
        ("CALDPO__OBJECTIVE__BETA", "0.3"),
    ];
    let all = sources(JOB, &environment);
    assert!(Config::load_job(&all).is_err());
    let config = Config::load_job(&all.without_service_variables()).unwrap();
    assert_eq!(config.training["objective"]["beta"].as_float(), Some(0.3));
}

#[test]
fn s1_a_door_to_the_network_needs_a_token_or_a_word() {
    let open = "cluster.listen = \"0.0.0.0:7070\"\n";
    check(
        service(open),
        &[
            "cluster.listen",
            "not loopback",
            "security.token_file",
            "security.insecure = true",
        ],
    );
    assert!(service(&format!("{open}security.token_file = \"t\"")).is_ok());
    assert!(service(&format!("{open}security.insecure = true")).is_ok());
}

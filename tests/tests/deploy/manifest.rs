//! The overlays as `kubectl kustomize` renders them, and ways to look into their objects.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;
use tests::programs::text;
use tests::workspace_root;

/// One overlay.
pub struct Overlay {
    /// Its folder's name.
    pub name: String,
    /// What `kubectl apply -k` would send.
    pub objects: Vec<Value>,
}

/// Every overlay of `deploy/kubernetes`; none, and it says so, where `kubectl` is absent.
pub fn overlays() -> &'static [Overlay] {
    static RENDERED: OnceLock<Vec<Overlay>> = OnceLock::new();
    let overlays = RENDERED.get_or_init(|| render().unwrap_or_default());
    if overlays.is_empty() {
        eprintln!("skipped: kubectl is absent");
    }
    overlays
}

/// Renders a copy with a token in it, which the tree must not have.
fn render() -> Option<Vec<Overlay>> {
    let copy = tempfile::tempdir().expect("a temporary folder");
    copy_folder(&workspace_root().join("deploy/kubernetes"), copy.path());
    fs::write(copy.path().join("base/token"), "a token\n").expect("write a token");
    let mut folders: Vec<PathBuf> = fs::read_dir(copy.path().join("overlays"))
        .expect("overlays")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    folders.sort();
    assert!(!folders.is_empty(), "no overlay");
    let mut overlays = Vec::new();
    for folder in folders {
        let kubectl = std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into());
        let output = Command::new(kubectl).arg("kustomize").arg(&folder).output();
        let output = match output {
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            output => output.expect("kubectl starts"),
        };
        let shown = text(&output);
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{}: {shown}",
            folder.display()
        );
        let name = folder.file_name().expect("a name").to_string_lossy();
        overlays.push(Overlay {
            name: name.into_owned(),
            objects: serde_saphyr::from_multiple(&shown).expect("YAML"),
        });
    }
    Some(overlays)
}

fn copy_folder(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir(&to).expect("create a folder");
            copy_folder(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).expect("copy a file");
        }
    }
}

impl Overlay {
    /// Objects of a kind.
    pub fn kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects
            .iter()
            .filter(move |object| object["kind"] == kind)
    }

    /// The object of a kind and a name.
    pub fn find(&self, kind: &str, wanted: &str) -> Option<&Value> {
        self.objects
            .iter()
            .find(|object| object["kind"] == kind && name(object) == wanted)
    }

    /// Objects that make pods.
    pub fn workloads(&self) -> impl Iterator<Item = &Value> {
        self.objects
            .iter()
            .filter(|object| object["spec"]["template"]["spec"].is_object())
    }

    /// Workloads whose pods a selector picks.
    pub fn selected<'a>(&'a self, selector: &'a Value) -> impl Iterator<Item = &'a Value> {
        self.workloads()
            .filter(move |workload| matches(selector, labels(workload)))
    }

    /// What a container of `workload` reads at `path`, if a `ConfigMap` is mounted there.
    pub fn mounted_text(&self, workload: &Value, path: &str) -> Option<&str> {
        let (folder, file) = path.rsplit_once('/')?;
        let mounts = array(&container(workload)["volumeMounts"]);
        let mount = mounts.iter().find(|mount| mount["mountPath"] == folder)?;
        let volumes = array(&pod(workload)["volumes"]);
        let volume = volumes
            .iter()
            .find(|volume| volume["name"] == mount["name"])?;
        let map = self.find("ConfigMap", volume["configMap"]["name"].as_str()?)?;
        map["data"][file].as_str()
    }
}

/// `metadata.name`.
pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().expect("a name")
}

/// The pod spec of a workload.
pub fn pod(workload: &Value) -> &Value {
    &workload["spec"]["template"]["spec"]
}

/// Labels of a workload's pods.
pub fn labels(workload: &Value) -> &Value {
    &workload["spec"]["template"]["metadata"]["labels"]
}

/// The only container of a workload's pods.
pub fn container(workload: &Value) -> &Value {
    let containers = array(&pod(workload)["containers"]);
    assert_eq!(
        containers.len(),
        1,
        "containers of {}: every rule here is about one",
        name(workload)
    );
    &containers[0]
}

/// Command and arguments of a container.
pub fn command(container: &Value) -> Vec<&str> {
    let words = array(&container["command"])
        .iter()
        .chain(array(&container["args"]));
    words.map(|word| word.as_str().expect("a word")).collect()
}

/// The value of `--flag=value` among a container's arguments.
pub fn flag<'a>(container: &'a Value, flag: &str) -> Option<&'a str> {
    let mut words = command(container).into_iter();
    words.find_map(|word| word.strip_prefix(flag)?.strip_prefix('='))
}

/// Named ports of a container.
pub fn ports(container: &Value) -> BTreeMap<&str, u64> {
    let ports = array(&container["ports"]).iter().map(|port| {
        let name = port["name"].as_str().expect("ports have names");
        (name, port["containerPort"].as_u64().expect("a port"))
    });
    ports.collect()
}

/// Whether labels have everything that a selector (`matchLabels`, or a Service's) asks for.
pub fn matches(selector: &Value, labels: &Value) -> bool {
    let selector = selector.as_object().expect("a selector");
    assert!(
        !selector.is_empty(),
        "an empty selector picks everything in the namespace"
    );
    selector.iter().all(|(key, value)| labels[key] == *value)
}

/// Elements of a list; none where the field is absent.
pub fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The port of `host:port` or of a URL.
pub fn port(address: &str) -> u64 {
    let (_, port) = address.rsplit_once(':').expect("an address with a port");
    port.parse().expect("a port")
}

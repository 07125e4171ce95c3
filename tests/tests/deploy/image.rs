//! The Dockerfile, as far as manifests rely on it.

use std::collections::BTreeMap;
use std::fs;

use tests::workspace_root;

/// Its instructions by target; lines that go on are one.
pub struct Dockerfile {
    stages: BTreeMap<String, Vec<String>>,
    /// `ARG name=value` before the first stage.
    arguments: Vec<String>,
}

impl Dockerfile {
    pub fn read() -> Self {
        let text = fs::read_to_string(workspace_root().join("Dockerfile")).expect("a Dockerfile");
        let text = text.replace("\\\n", " ");
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let mut dockerfile = Self {
            stages: BTreeMap::new(),
            arguments: Vec::new(),
        };
        let mut stage = None;
        for line in lines {
            if let Some((_, name)) = line
                .strip_prefix("FROM ")
                .and_then(|from| from.split_once(" AS "))
            {
                stage = Some(name.to_owned());
            }
            let lines = match &stage {
                Some(stage) => dockerfile.stages.entry(stage.clone()).or_default(),
                None => &mut dockerfile.arguments,
            };
            lines.push(line.to_owned());
        }
        dockerfile
    }

    fn values<'a>(
        &'a self,
        target: &'a str,
        instruction: &'a str,
    ) -> impl Iterator<Item = &'a str> {
        let lines = self.stages.get(target);
        let lines = lines.unwrap_or_else(|| panic!("the Dockerfile has no target {target}"));
        lines
            .iter()
            .filter_map(move |line| line.strip_prefix(instruction)?.strip_prefix(' '))
    }

    fn value<'a>(&'a self, target: &'a str, instruction: &'a str) -> &'a str {
        let found: Vec<_> = self.values(target, instruction).collect();
        assert_eq!(found.len(), 1, "{instruction} of {target}");
        found[0]
    }

    /// Programs that a target carries.
    pub fn programs(&self, target: &str) -> Vec<String> {
        let build = format!("build-{target}");
        let installs = self
            .values(&build, "RUN")
            .filter_map(|run| run.split_once("install -D -t /out "));
        let programs = installs.flat_map(|(_, files)| files.split_whitespace());
        programs
            .map(|file| file.replace("target/release/", ""))
            .collect()
    }

    /// The number of the user that both images run as.
    pub fn user(&self) -> u64 {
        let users = ["coordinator", "worker"].map(|target| self.value(target, "USER"));
        assert_eq!(users[0], users[1], "the images share folders");
        let (user, group) = users[0].split_once(':').expect("user and group");
        assert_eq!(user, group);
        user.parse()
            .expect("a number: Kubernetes cannot tell whether a name is root")
    }

    pub fn exposed(&self, target: &str) -> Vec<u64> {
        let ports = self.value(target, "EXPOSE").split_whitespace();
        ports.map(|port| port.parse().expect("a port")).collect()
    }
}

#[test]
fn programs_are_process_one_and_get_the_signals() {
    let dockerfile = Dockerfile::read();
    for target in ["coordinator", "worker"] {
        // A shell form would make a shell process 1, which passes no signal on.
        assert_eq!(
            dockerfile.value(target, "ENTRYPOINT"),
            format!("[\"{target}\"]")
        );
        assert_eq!(dockerfile.value(target, "CMD"), "[\"--help\"]");
        assert_eq!(dockerfile.value(target, "STOPSIGNAL"), "SIGTERM");
    }
}

#[test]
fn the_coordinator_image_is_built_without_the_ml_stack() {
    let dockerfile = Dockerfile::read();
    let build = dockerfile.value("build-coordinator", "RUN");
    assert!(build.contains("--no-default-features"), "{build}");
    assert!(!build.contains("-p worker"), "{build}");
    assert_eq!(
        dockerfile.programs("coordinator"),
        ["coordinator", "checkpoint"]
    );
    assert_eq!(
        dockerfile.programs("worker"),
        ["coordinator", "worker", "checkpoint"]
    );
}

#[test]
fn versions_are_the_workspaces() {
    let manifest = fs::read_to_string(workspace_root().join("Cargo.toml")).expect("a manifest");
    let manifest: toml::Table = manifest.parse().expect("TOML");
    let package = &manifest["workspace"]["package"];
    let version = package["version"].as_str().expect("a version");
    let rust = package["rust-version"].as_str().expect("a version");
    let dockerfile = Dockerfile::read();
    for target in ["coordinator", "worker"] {
        let labelled = dockerfile
            .values(target, "ARG")
            .find_map(|argument| argument.strip_prefix("VERSION="));
        assert_eq!(labelled, Some(version), "{target}");
    }
    let image = format!("/rust:{rust}-");
    let arguments = &dockerfile.arguments;
    assert!(
        arguments
            .iter()
            .any(|argument| argument.starts_with("ARG RUST_IMAGE=") && argument.contains(&image)),
        "no {image} in {arguments:?}"
    );
}

/// Cargo reads the manifests of all members, also of those that are not built.
#[test]
fn every_member_of_the_workspace_is_in_the_build_context() {
    let read = |name: &str| fs::read_to_string(workspace_root().join(name)).expect(name);
    let workspace: toml::Table = read("Cargo.toml").parse().expect("TOML");
    let members = workspace["workspace"]["members"].as_array();
    let ignored = read(".dockerignore");
    for member in members.expect("members") {
        let member = member.as_str().expect("a path");
        let folder = member.split_once("/*").map_or(member, |(folder, _)| folder);
        let taken = [format!("!{folder}"), format!("!{folder}/Cargo.toml")];
        let found = ignored
            .lines()
            .any(|line| taken.iter().any(|it| it == line));
        assert!(
            found,
            "{member} is not in the build context of .dockerignore"
        );
    }
}

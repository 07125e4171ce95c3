//! How the configuration names a data set of the Hugging Face hub, and how a person downloads it. Nothing here goes to the network.

/// `hf://datasets/OWNER/NAME[@REVISION][/FILE, FOLDER or PATTERN]`.
pub(crate) struct HubEntry {
    /// `None` if the entry does not have both.
    pub owner_and_name: Option<[String; 2]>,
    /// A `/` in it is written as `%2F`.
    pub revision: Option<String>,
    /// What of it is meant; all that trains by default.
    pub inside: Option<String>,
}

impl HubEntry {
    /// Reads an entry of the configuration; `None` if it does not name a hub's data set.
    pub fn parse(entry: &str) -> Option<Self> {
        let path = entry.strip_prefix("hf://")?.trim_start_matches("datasets/");
        let mut parts = path.splitn(3, '/').filter(|part| !part.is_empty());
        let (owner, name) = (parts.next(), parts.next());
        let (name, revision) = match name.and_then(|name| name.split_once('@')) {
            Some((name, revision)) => (Some(name), Some(revision.replace("%2F", "/"))),
            None => (name, None),
        };
        let owner_and_name = owner
            .zip(name)
            .map(|(owner, name)| [owner.into(), name.into()]);
        Some(Self {
            owner_and_name,
            revision,
            inside: parts.next().map(Into::into),
        })
    }

    /// The command that downloads it, and what to name then.
    pub fn cure(&self) -> String {
        let [owner, name] = match &self.owner_and_name {
            Some([owner, name]) => [owner.as_str(), name],
            None => ["OWNER", "NAME"],
        };
        let revision = match &self.revision {
            Some(revision) => format!(" --revision {revision}"),
            None => String::new(),
        };
        let inside = self.inside.as_deref().unwrap_or("**/*.parquet");
        format!(
            "download it with `hf download {owner}/{name} --repo-type dataset{revision} --local-dir data/{name}` and name \
             \"data/{name}/{inside}\""
        )
    }
}

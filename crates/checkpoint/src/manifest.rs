//! The manifest: what a checkpoint is and which bytes it consists of; its presence is what makes a checkpoint. Drawn in the
//! crate's documentation.

use serde::{Deserialize, Serialize};

use crate::{
    coverage::{Coverage, CoverageError},
    folder,
    parts::{TensorSpec, TrainState},
    rank_file::FileEntry,
};

/// Version of manifest and rank files that this build reads and writes.
pub const FORMAT_VERSION: u32 = 1;

const OPENING: &[u8] = b"{\"blake3\":\"";
const HEX_BYTES: usize = 64;
const MIDDLE: &[u8] = b"\",\"manifest\":\n";
const CLOSING: &[u8] = b"\n}\n";

/// What the manifest says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format of this manifest and of the files.
    pub version: u32,
    /// Where the training stands.
    pub state: TrainState,
    /// The generation that wrote it.
    pub generation: u64,
    /// Number of ranks that wrote it.
    pub world: u32,
    /// What it belongs to.
    pub info: ManifestInfo,
    /// All tensors of the model, in its order.
    pub tensors: Vec<TensorSpec>,
    /// The files, by rank.
    pub files: Vec<FileEntry>,
}

/// What a checkpoint belongs to, so that it is not resumed with another model or other data. Digests are compared by whoever
/// resumes; to this crate they are texts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestInfo {
    /// Digest of the weights that the run began with.
    pub model_digest: String,
    /// Digest of tokenizer and chat template.
    pub tokenizer_digest: String,
    /// Digest of the training data as ids.
    pub data_digest: String,
    /// Digest of what else defines the run.
    pub run_digest: String,
    /// Version of the program that wrote it.
    pub tool_version: String,
}

/// Why bytes are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Cut, or not a manifest at all.
    #[error("not a manifest, or cut short: {0} is missing")]
    Envelope(&'static str),
    /// Some byte differs from what was written.
    #[error("its checksum does not hold: it says {said}, its content gives {found}")]
    Checksum {
        /// What the file says.
        said: String,
        /// What its content gives.
        found: String,
    },
    /// Written by another version.
    #[error("format version {found}; this program reads version {FORMAT_VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Checked bytes that are not the JSON they should be.
    #[error("content: {0}")]
    Content(#[from] serde_json::Error),
    /// The ranks in it are not 0 to world − 1, or a file has another name than its rank, world and generation give it.
    #[error("file {name} is not that of rank {rank} of {world} in generation {generation}")]
    File {
        /// The name it has.
        name: String,
        /// The rank that is due.
        rank: u32,
        /// Number of ranks.
        world: u32,
        /// The generation.
        generation: u64,
    },
    /// More or fewer files than ranks.
    #[error("{files} files for {world} ranks")]
    World {
        /// Number of files.
        files: usize,
        /// Number of ranks.
        world: u32,
    },
    /// The files are not the tensors.
    #[error(transparent)]
    Coverage(#[from] CoverageError),
}

impl Manifest {
    /// The bytes of `manifest.json`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let content = serde_json::to_vec(self).expect("strings and integers are always JSON");
        let digest = blake3::hash(&content).to_hex();
        [OPENING, digest.as_bytes(), MIDDLE, &content, CLOSING].concat()
    }

    /// The manifest in `bytes`, each of which is checked.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, Coverage), ManifestError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let missing = ManifestError::Envelope;
        let rest = bytes
            .strip_prefix(OPENING)
            .ok_or(missing("the beginning"))?;
        let (said, rest) = rest
            .split_at_checked(HEX_BYTES)
            .ok_or(missing("the checksum"))?;
        let content = rest
            .strip_prefix(MIDDLE)
            .ok_or(missing("the line end after the checksum"))?
            .strip_suffix(CLOSING)
            .ok_or(missing("the end"))?;
        let found = blake3::hash(content).to_hex();
        if said != found.as_bytes() {
            return Err(ManifestError::Checksum {
                said: String::from_utf8_lossy(said).into_owned(),
                found: found.to_string(),
            });
        }
        // The version first: another one may have other fields.
        let Versioned { version } = serde_json::from_slice(content)?;
        if version != FORMAT_VERSION {
            return Err(ManifestError::Version { found: version });
        }
        let manifest: Self = serde_json::from_slice(content)?;
        let coverage = manifest.check()?;
        Ok((manifest, coverage))
    }

    /// Whether files, ranks and tensors fit together, before writing and after reading.
    pub(crate) fn check(&self) -> Result<Coverage, ManifestError> {
        let (world, generation) = (self.world, self.generation);
        if world == 0 || self.files.len() as u64 != u64::from(world) {
            let files = self.files.len();
            return Err(ManifestError::World { files, world });
        }
        for (rank, file) in (0..world).zip(&self.files) {
            // Also what keeps a name from leading out of the folder.
            if file.rank != rank || file.name != folder::file_name(rank, world, generation) {
                return Err(ManifestError::File {
                    name: file.name.clone(),
                    rank,
                    world,
                    generation,
                });
            }
        }
        Ok(Coverage::of(&self.tensors, &self.files)?)
    }
}

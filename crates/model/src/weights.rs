//! Weights in: model.safetensors, or model.safetensors.index.json with its shards, into flat f32 buckets.
//!
//! Every header is checked before a weight is read: each parameter of the layout is there once with its shape, nothing
//! else is, and no file is shorter than its header says. Files are read in pieces, so loading needs the memory of the
//! weights and little more. Not here: what the names mean (`layout`).

mod file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::layout::Names;
use crate::{Layout, ModelConfig, ModelError};
use file::WeightFile;

/// All weights of the model in `dir`, one bucket after the other. Whoever keeps none of them has room for one.
pub(crate) fn load(
    dir: &Path,
    layout: &Layout,
    config: &ModelConfig,
) -> Result<impl Iterator<Item = Result<Vec<f32>, ModelError>>, ModelError> {
    let source = Source::open(dir)?;
    // Old files carry rotary frequencies and GPT-NeoX's masks as buffers; transformers ignores them too.
    let mut others = vec![
        ".rotary_emb.inv_freq",
        ".attention.bias",
        ".attention.masked_bias",
    ];
    let names = config.tied.then(|| Names::of(config.family));
    others.extend(names.as_ref().map(|names| names.head));
    source.check(layout, &others)?;
    Ok((0..layout.buckets.len()).map(move |bucket| {
        let values = source.read(layout, bucket)?;
        if let Some(names) = &names {
            source.check_tie(layout, names, bucket, &values)?;
        }
        Ok(values)
    }))
}

/// Whether all weights of the model in `dir` are stored in bf16, by the headers of its files.
///
/// # Errors
/// Files that are not there, or damaged.
pub fn stores_bf16(dir: &Path) -> Result<bool, ModelError> {
    let source = Source::open(dir)?;
    Ok(source.files.iter().all(WeightFile::is_bf16))
}

/// All weights of an adapter, from one file, bucket by bucket.
pub(crate) fn load_adapter(path: &Path, layout: &Layout) -> Result<Vec<Vec<f32>>, ModelError> {
    let source = Source::single(path)?;
    source.check(layout, &[])?;
    let buckets = 0..layout.buckets.len();
    buckets.map(|bucket| source.read(layout, bucket)).collect()
}

/// The weight files of a directory and which of them holds which tensor.
struct Source {
    /// The single file, or the index: where a missing tensor should have been.
    root: PathBuf,
    files: Vec<WeightFile>,
    /// Tensor name → index into `files`.
    holders: BTreeMap<String, usize>,
}

impl Source {
    /// As transformers does, the single file goes before the index.
    fn open(dir: &Path) -> Result<Self, ModelError> {
        let single = dir.join("model.safetensors");
        if single.exists() {
            return Self::single(&single);
        }
        let index = dir.join("model.safetensors.index.json");
        match fs::read_to_string(&index) {
            Ok(text) => Self::open_shards(dir, index, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ModelError::NoWeights {
                dir: dir.to_owned(),
            }),
            Err(source) => Err(ModelError::Read {
                path: index,
                source,
            }),
        }
    }

    fn single(path: &Path) -> Result<Self, ModelError> {
        let file = WeightFile::open(path)?;
        Ok(Self {
            root: path.to_owned(),
            holders: file.names().map(|name| (name, 0)).collect(),
            files: vec![file],
        })
    }

    fn open_shards(dir: &Path, index: PathBuf, text: &str) -> Result<Self, ModelError> {
        let bad = |reason: String| ModelError::Index {
            path: index.clone(),
            reason,
        };
        let parsed: Index = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
        let mut files: Vec<WeightFile> = Vec::new();
        let mut numbers = BTreeMap::new();
        let mut holders = BTreeMap::new();
        for (tensor, shard) in parsed.weight_map {
            // A shard lies beside its index; anything else would read files that the model does not own.
            if Path::new(&shard)
                .file_name()
                .is_none_or(|name| name != shard.as_str())
            {
                return Err(bad(format!(
                    "tensor `{tensor}` is said to be in `{shard}`, which is not a plain file name"
                )));
            }
            let number = if let Some(&number) = numbers.get(&shard) {
                number
            } else {
                files.push(WeightFile::open(&dir.join(&shard))?);
                numbers.insert(shard, files.len() - 1);
                files.len() - 1
            };
            if !files[number].holds(&tensor) {
                return Err(ModelError::Missing {
                    path: files[number].path().to_owned(),
                    tensor,
                });
            }
            holders.insert(tensor, number);
        }
        for (number, file) in files.iter().enumerate() {
            if let Some(name) = file.names().find(|name| holders.get(name) != Some(&number)) {
                return Err(bad(format!(
                    "{} holds `{name}`, which the index places elsewhere",
                    file.path().display()
                )));
            }
        }
        Ok(Self {
            root: index,
            files,
            holders,
        })
    }

    /// The names and shapes of the files are those of the layout; names that end in one of `others` may be there too.
    fn check(&self, layout: &Layout, others: &[&str]) -> Result<(), ModelError> {
        for parameter in &layout.parameters {
            self.file(&parameter.name)?
                .check(&parameter.name, &parameter.shape)?;
        }
        let known: std::collections::BTreeSet<&str> = layout
            .parameters
            .iter()
            .map(|parameter| parameter.name.as_str())
            .collect();
        for (name, &number) in &self.holders {
            let other = others.iter().any(|ending| name.ends_with(ending));
            if !other && !known.contains(name.as_str()) {
                return Err(ModelError::Extra {
                    path: self.files[number].path().to_owned(),
                    tensor: name.clone(),
                });
            }
        }
        Ok(())
    }

    /// The tensors of a bucket of the layout, which [`Source::check`] has vouched for.
    fn read(&self, layout: &Layout, bucket: usize) -> Result<Vec<f32>, ModelError> {
        let bucket = &layout.buckets[bucket];
        let mut values = vec![0.0; bucket.len];
        for parameter in &layout.parameters[bucket.parameters.clone()] {
            let values = &mut values[parameter.range()];
            self.file(&parameter.name)?.read(&parameter.name, values)?;
        }
        Ok(values)
    }

    /// A head stored beside a tied embedding must be its copy: the embedding is among the values of its bucket.
    fn check_tie(
        &self,
        layout: &Layout,
        names: &Names,
        bucket: usize,
        values: &[f32],
    ) -> Result<(), ModelError> {
        let embedding = layout
            .find(names.embedding)
            .expect("every layout has an embedding");
        let Some(&number) = self
            .holders
            .get(names.head)
            .filter(|_| embedding.bucket == bucket)
        else {
            return Ok(());
        };
        let file = &self.files[number];
        file.check(names.head, &embedding.shape)?;
        let mut head = vec![0.0; embedding.elements()];
        file.read(names.head, &mut head)?;
        let equal = values[embedding.range()]
            .iter()
            .zip(&head)
            .all(|(a, b)| a.to_bits() == b.to_bits());
        if equal {
            Ok(())
        } else {
            Err(ModelError::NotTied {
                path: file.path().to_owned(),
            })
        }
    }

    fn file(&self, tensor: &str) -> Result<&WeightFile, ModelError> {
        match self.holders.get(tensor) {
            Some(&number) => Ok(&self.files[number]),
            None => Err(ModelError::Missing {
                path: self.root.clone(),
                tensor: tensor.to_owned(),
            }),
        }
    }
}

/// model.safetensors.index.json; its other keys are figures.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

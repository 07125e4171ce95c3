//! `checkpoint inspect`.

use std::{fmt::Write, path::Path};

use anyhow::Result;
use checkpoint::{Checkpoint, pinned};
use serde_json::json;

use crate::print::{counted, print};

pub fn inspect(path: &Path, tensors: bool, json: bool) -> Result<u8> {
    let checkpoint = Checkpoint::open(path)?;
    let manifest = checkpoint.manifest();
    let elements = |spec: &checkpoint::TensorSpec| spec.elements().unwrap_or(0);
    let parameters: usize = manifest.tensors.iter().map(elements).sum();
    let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    let pin = pinned(path)?;
    if json {
        let all = json!({
            "path": path,
            "parameters": parameters,
            "bytes": bytes,
            "pinned": pin,
            "manifest": manifest,
        });
        return print(&all.to_string());
    }
    let (state, info) = (manifest.state, &manifest.info);
    let mut text = format!(
        "{}\n\
         step         {} (epoch {}, {} updates, seed {})\n\
         written by   generation {}, {}, version {}, format {}\n\
         model        {}\n\
         tokenizer    {}\n\
         data         {}\n\
         run          {}\n\
         tensors      {} with {parameters} parameters and their moments\n\
         files        {} with {bytes} bytes\n",
        path.display(),
        state.step,
        state.epoch,
        state.updates,
        state.seed,
        manifest.generation,
        counted(manifest.world as usize, "rank"),
        info.tool_version,
        manifest.version,
        info.model_digest,
        info.tokenizer_digest,
        info.data_digest,
        info.run_digest,
        manifest.tensors.len(),
        manifest.files.len(),
    );
    for file in &manifest.files {
        let (name, bytes, pieces) = (&file.name, file.bytes, file.pieces.len());
        writeln!(
            text,
            "  {name}  {bytes} bytes, {}",
            counted(pieces, "piece")
        )?;
    }
    if let Some(note) = pin {
        writeln!(text, "pinned       {note}")?;
    }
    if tensors {
        for spec in &manifest.tensors {
            writeln!(text, "  {} {:?}", spec.name, spec.shape)?;
        }
    }
    print(text.trim_end())
}

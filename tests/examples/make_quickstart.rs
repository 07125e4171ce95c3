//! Writes `configs/quickstart`: the data and the untrained model of the quickstart.
//!
//!     cargo run --release -p tests --example make_quickstart [DIR]
//!
//! The same files come out every time (`tests/tests/quickstart.rs` holds the committed ones against it). What follows,
//! `configs/quickstart/reference`, is this model trained by the program itself:
//!
//!     cargo run --release -p coordinator -- --config configs/quickstart-reference.toml

use std::{
    error::Error,
    fs::{self, File},
    io::{BufWriter, Write},
    path::PathBuf,
};

use model::{Layout, ModelConfig, random_weights, write_safetensors};
use tests::quickstart;

const WEIGHT_SEED: u64 = 1;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map_or_else(
        || tests::workspace_root().join("configs/quickstart"),
        PathBuf::from,
    );
    let initial = folder.join("init");
    fs::create_dir_all(&initial)?;
    for (name, text) in quickstart::data_files() {
        fs::write(folder.join(name), text)?;
    }
    for (name, text) in quickstart::model_files() {
        fs::write(initial.join(name), text)?;
    }

    let config = ModelConfig::load(&initial)?;
    let layout = Layout::new(&config);
    let mut out = BufWriter::new(File::create(initial.join("model.safetensors"))?);
    write_safetensors(&random_weights(&config, WEIGHT_SEED), &layout, &mut out)?;
    out.flush()?;
    println!(
        "{}: {} ids, {} parameters",
        folder.display(),
        config.vocabulary,
        layout.elements()
    );
    Ok(())
}

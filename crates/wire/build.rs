//! Compiles the protocol files without a system protoc.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let proto = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo::rerun-if-changed={}", proto.display());
    let mut compiler = protox::Compiler::new([&proto])?;
    compiler.include_source_info(true).include_imports(true);
    compiler.open_files([
        "caldpo/v1/workers.proto",
        "caldpo/v1/jobs.proto",
        "caldpo/v1/cluster.proto",
    ])?;
    // Served by reflection, so that stock clients can ask for status.
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("caldpo.v1.bin");
    fs::write(descriptors, compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        // Holds a key, which `Debug` must not print: written by hand in `to_worker.rs`.
        .skip_debug([".caldpo.v1.Form"])
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

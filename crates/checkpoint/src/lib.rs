//! Sharded training checkpoints: format, commit, verification, resharding, export.

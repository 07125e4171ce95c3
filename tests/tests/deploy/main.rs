//! Images, Kubernetes manifests and systemd units, held against each other and against the real programs.
//!
//! `tests/deploy.sh` checks them against schemas; here are the rules across fields and files, which schemas do not know: what
//! a server would refuse, and what it would accept and nobody wants. Needs `kubectl` to render, but no cluster, no container
//! engine and no systemd.

mod flags;
mod image;
mod jobs;
mod manifest;
mod pods;
mod service;
mod traffic;
mod units;

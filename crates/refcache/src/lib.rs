//! The reference log-prob store: content-addressed, checksummed, shared between runs.

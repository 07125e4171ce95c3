//! The only writer of files: atomic puts, an append-only checksummed log, locks.

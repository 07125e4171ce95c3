//! What crosses crates: real processes on loopback, golden files, tidy rules.

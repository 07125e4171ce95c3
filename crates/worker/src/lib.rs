//! A session with the coordinator around a trainer; the worker program.

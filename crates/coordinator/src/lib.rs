//! Schedules a job's workers: gRPC services, launchers, journal, run directory; the coordinator program.

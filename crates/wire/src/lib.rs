//! The gRPC messages of caldpo.v1 and their validated conversions.

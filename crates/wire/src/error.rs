//! Why a message was refused.

use std::fmt::Display;

/// A message that breaks the rules of its protocol file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A required field is absent or empty.
    #[error("{field} is missing; both sides must run the same version")]
    Missing {
        /// Message and field, such as `FromWorker.job`.
        field: &'static str,
    },
    /// A field has a value it cannot have.
    #[error("{field} is {value}, expected {expected}")]
    Invalid {
        /// Message and field.
        field: &'static str,
        /// What it is.
        value: String,
        /// What it can be.
        expected: &'static str,
    },
}

impl WireError {
    pub(crate) fn invalid(
        field: &'static str,
        value: impl Display,
        expected: &'static str,
    ) -> Self {
        let value = value.to_string();
        Self::Invalid {
            field,
            value,
            expected,
        }
    }
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// A message field, which proto3 lets be absent.
pub(crate) fn required<T>(field: &'static str, value: Option<T>) -> Result<T, WireError> {
    value.ok_or(WireError::Missing { field })
}

/// A string that must say something.
pub(crate) fn text(field: &'static str, value: String) -> Result<String, WireError> {
    if value.is_empty() {
        return Err(WireError::Missing { field });
    }
    Ok(value)
}

/// A count that starts at 1.
pub(crate) fn from_one(field: &'static str, value: u64) -> Result<u64, WireError> {
    if value == 0 {
        return Err(WireError::invalid(field, value, "1 or more"));
    }
    Ok(value)
}

/// A time that passed.
pub(crate) fn figure(field: &'static str, value: f64) -> Result<f64, WireError> {
    if !value.is_finite() || value < 0.0 {
        return Err(WireError::invalid(
            field,
            value,
            "a finite number, 0 or more",
        ));
    }
    Ok(value)
}

pub(crate) fn seconds(field: &'static str, value: f64) -> Result<f64, WireError> {
    if !value.is_finite() || value < 0.0 {
        return Err(WireError::invalid(
            field,
            value,
            "a finite number of seconds, 0 or more",
        ));
    }
    Ok(value)
}

/// `host:port`, with a port one can connect to.
pub(crate) fn address(field: &'static str, value: String) -> Result<String, WireError> {
    let parts = value.rsplit_once(':');
    let valid = parts.is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if !valid {
        return Err(WireError::invalid(field, format!("{value:?}"), "host:port"));
    }
    Ok(value)
}

/// A name of a job or a worker.
pub(crate) fn name(field: &'static str, value: String) -> Result<String, WireError> {
    let value = text(field, value)?;
    if !protocol::is_name(&value) {
        return Err(WireError::invalid(
            field,
            format!("{value:?}"),
            protocol::NAME_RULE,
        ));
    }
    Ok(value)
}

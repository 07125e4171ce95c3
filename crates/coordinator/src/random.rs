//! Bytes of the system's random source: secrets, and names that nobody else has drawn.

use std::io;

/// So many bytes.
///
/// # Errors
/// The system has no random source.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}

/// So many bytes as twice as many hexadecimal digits.
///
/// # Errors
/// As [`bytes`].
pub fn hexadecimal<const N: usize>() -> io::Result<String> {
    let digits = bytes::<N>()?.map(|byte| format!("{byte:02x}"));
    Ok(digits.concat())
}

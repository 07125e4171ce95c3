//! NCCL's version numbers, and which of them are refused.

use std::fmt;

/// A release, from NCCL's own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2 for all that exist.
    pub major: u32,
    /// Up to 99.
    pub minor: u32,
    /// Up to 99.
    pub patch: u32,
}

/// The first release whose communicators can be made without blocking and with a configuration.
pub const OLDEST: Version = Version::new(2, 18, 0);

/// First and last of each range of releases that are known to be faulty.
pub const KNOWN_BAD: [(Version, Version); 2] = [
    (Version::new(2, 25, 1), Version::new(2, 25, 1)),
    (Version::new(2, 28, 3), Version::new(2, 28, 8)),
];

impl Version {
    /// A release by its parts.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self {
            major,
            minor,
            patch,
        }
    }

    /// The release that `ncclGetVersion` writes as `code`: `major·10000 + minor·100 + patch`, and up to 2.8 with 1000 in
    /// place of 10000. `None` if no release has that code.
    pub fn from_code(code: i32) -> Option<Self> {
        let code = u32::try_from(code).ok()?;
        let major_unit = if code < 10_000 { 1_000 } else { 10_000 };
        let version = Self::new(code / major_unit, code % major_unit / 100, code % 100);
        (version.major > 0).then_some(version)
    }

    /// `ncclGetVersion`'s number, in the form that is used since 2.9.
    pub const fn code(self) -> u32 {
        self.major * 10_000 + self.minor * 100 + self.patch
    }

    /// Why this release is refused, with the cure; `None` if it is not.
    pub fn objection(self) -> Option<String> {
        if self < OLDEST {
            return Some(format!("too old: {OLDEST} is the oldest that works"));
        }
        let (first, last) = KNOWN_BAD
            .into_iter()
            .find(|&(first, last)| (first..=last).contains(&self))?;
        let next = Self::new(last.major, last.minor, last.patch + 1);
        let range = if first == last {
            first.to_string()
        } else {
            format!("{first} to {last}")
        };
        Some(format!(
            "known to be faulty ({range}): use {next} or newer, or an older release"
        ))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(code: i32, expected: &str, objection: Option<&str>) {
        let version = Version::from_code(code).expect("a version");
        assert_eq!(version.to_string(), expected);
        let found = version.objection();
        match (objection, &found) {
            (None, None) => {}
            (Some(part), Some(text)) => assert!(text.contains(part), "{expected}: {text}"),
            _ => panic!("{expected}: {found:?} where {objection:?} was expected"),
        }
    }

    #[test]
    fn codes_are_read_in_both_forms_and_faulty_releases_are_refused() {
        check(2_708, "2.7.8", Some("too old"));
        check(2_804, "2.8.4", Some("too old"));
        check(20_905, "2.9.5", Some("2.18.0 is the oldest"));
        check(21_701, "2.17.1", Some("too old"));
        check(21_800, "2.18.0", None);
        check(22_409, "2.24.9", None);
        check(22_501, "2.25.1", Some("(2.25.1): use 2.25.2 or newer"));
        check(22_502, "2.25.2", None);
        check(22_802, "2.28.2", None);
        for code in 22_803..=22_808 {
            let version = Version::from_code(code).expect("a version").to_string();
            check(
                code,
                &version,
                Some("(2.28.3 to 2.28.8): use 2.28.9 or newer"),
            );
        }
        check(22_809, "2.28.9", None);
        check(23_007, "2.30.7", None);
    }

    #[test]
    fn numbers_that_are_no_version_are_none() {
        for code in [-1, 0, 999, i32::MIN] {
            assert_eq!(Version::from_code(code), None);
        }
    }

    #[test]
    fn a_code_survives_its_parts() {
        for code in [20_905, 21_800, 22_501, 23_007] {
            let version = Version::from_code(code).expect("a version");
            assert_eq!(version.code(), code.unsigned_abs());
        }
    }
}

//! The module path under which cubecl-cuda looks for the PTX version.

/// The PTX version that code would be emitted for.
pub mod ptx_version {
    use std::fmt;

    /// A PTX version, as in `ptx87` for 8.7. The C++ path leaves the choice to NVRTC.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PtxVersion(u32);

    impl PtxVersion {
        /// None for every driver: no code is emitted here.
        pub fn for_driver(_driver: i32) -> Option<Self> {
            None
        }
    }

    impl fmt::Display for PtxVersion {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "ptx{}", self.0)
        }
    }
}

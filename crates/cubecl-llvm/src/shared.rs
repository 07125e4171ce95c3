//! The module path under which cubecl-cuda looks for the features of the LLVM back end.

/// Narrowing a device's features to what the back end lowers.
pub mod lowered_features {
    use cubecl_core::ir::DeviceProperties;

    use crate::NOT_BUILT_IN;

    /// A kind of device.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum GpuTarget {
        /// An NVIDIA device.
        Nvptx,
    }

    /// Called once per device when the LLVM back end was selected, so that a wrong build ends before its first kernel.
    ///
    /// # Panics
    /// Always.
    pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {
        panic!("{NOT_BUILT_IN}");
    }
}

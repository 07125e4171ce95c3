//! Under which circumstances two forwards give the same bits: what of them belongs into a reference value's key (R1).

use data::Truncation;
use model::Device;
use refcache::Scope;
use spec::Spec;

/// The scope of reference values of `spec` by a model with this weights digest on `device`.
pub(crate) fn scope(spec: &Spec, weights: [u8; 32], device: &Device) -> Scope {
    let truncation = match spec.data.truncation {
        Truncation::KeepStart => "keep_start",
        Truncation::KeepEnd => "keep_end",
    };
    Scope {
        weights,
        truncation: format!("{truncation} {}", spec.data.max_length),
        dtype: spec.model.dtype.name().into(),
        backend: device.backend(),
        device_class: device.class(host_class()),
        kernels: kernels::KERNEL_VERSION.to_string(),
    }
}

/// Sums are taken in as many lanes as the instruction set has, so their bits depend on it and on nothing else of the CPU.
fn host_class() -> String {
    format!("{} {}", std::env::consts::ARCH, instructions())
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> &'static str {
    if std::arch::is_x86_feature_detected!("avx512f") {
        "avx512f"
    } else if std::arch::is_x86_feature_detected!("fma") {
        "fma"
    } else {
        "baseline"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> &'static str {
    "baseline"
}

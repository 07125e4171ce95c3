//! Scalar functions and reductions that vectorise: plain loops over a fixed number of lanes, compiled for the best
//! instruction set of the machine through [`simd`]. The order of every sum is written here, not left to the compiler.

/// Lanes of a reduction: two AVX2 registers, so that additions overlap.
const LANES: usize = 16;

/// Runs `work` compiled for the best instruction set that this machine has. Only what is inlined is compiled so: the
/// closure itself needs `#[inline(always)]`, or it stays with the target's least common instructions.
#[inline(always)]
pub(crate) fn simd<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// e^x to about 2 ulp; 0 below −86.6, infinity above 88.72 (Cody–Waite reduction, degree 6 as in Cephes `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// 1.5 · 2²³: adding it rounds to the nearest integer and leaves that integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// Between these bounds 2^(n − 1) is a normal number.
    const LEAST: f32 = -86.6;
    const MOST: f32 = 88.72;
    let clamped = if x > MOST { MOST } else { x };
    let clamped = if clamped < LEAST { LEAST } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let value = p * r * r + r + 1.0;
    // 2^n in two steps, because n = 128 has no exponent of its own.
    let half = f32::from_bits(shifted.to_bits().wrapping_add(126) << 23);
    let value = value * half * 2.0;
    let value = if x < LEAST { 0.0 } else { value };
    if x > MOST { f32::INFINITY } else { value }
}

/// 1 / (1 + e^(−x)).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh(x) to about 2 ulp: an odd polynomial fitted near 0, where 1 − 2/(e^(2x) + 1) would cancel.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    const NEAR: f32 = 0.625;
    let square = x * x;
    let mut p = -5.664_775e-3;
    p = p * square + 2.059_568e-2;
    p = p * square - 5.372_268e-2;
    p = p * square + 1.333_115e-1;
    p = p * square - 3.333_326_3e-1;
    p = p * square + 1.0;
    let near = x * p;
    let far = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if x.abs() < NEAR { near } else { far }
}

/// The error function to about 2e-7: an odd polynomial up to 1, beyond that 1 − t·P(t)·e^(−x²) with t = 1/(1 + x/2), both
/// fitted to the exact function.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let square = x * x;
    let mut p = 7.882_497_4e-5;
    p = p * square - 8.018_855e-4;
    p = p * square + 5.189_312e-3;
    p = p * square - 2.685_432_9e-2;
    p = p * square + 1.128_359_7e-1;
    p = p * square - 3.761_262_6e-1;
    p = p * square + std::f32::consts::FRAC_2_SQRT_PI;
    let near = x * p;
    let size = x.abs();
    let t = 1.0 / (1.0 + 0.5 * size);
    let mut q = -7.562_107e-2;
    q = q * t + 1.789_168_6e-2;
    q = q * t + 2.982_922_8e-1;
    q = q * t + 1.792_448_1e-1;
    q = q * t + 2.988_827e-1;
    q = q * t + 2.804_971_3e-1;
    let far = (1.0 - t * q * exp(-square)).copysign(x);
    if size < 1.0 { near } else { far }
}

/// Σ `term(a, b)` over two slices of equal length, in a fixed order.
#[inline(always)]
pub(crate) fn sum_of(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_blocks.remainder(), b_blocks.remainder());
    for (a, b) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    let mut rest = 0.0;
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        rest += term(a, b);
    }
    fold(lanes) + rest
}

/// Σ a·b.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |a, b| a * b)
}

/// The largest element; −∞ for none. A NaN is skipped: the caller sees it in the sum.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let blocks = values.chunks_exact(LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] = if block[lane] > lanes[lane] {
                block[lane]
            } else {
                lanes[lane]
            };
        }
    }
    let mut largest = f32::NEG_INFINITY;
    for &value in lanes.iter().chain(rest) {
        largest = if value > largest { value } else { largest };
    }
    largest
}

/// Replaces every value v by e^(v − shift) and returns their sum.
#[inline(always)]
pub(crate) fn exp_shifted(values: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut blocks = values.chunks_exact_mut(LANES);
    for block in &mut blocks {
        for lane in 0..LANES {
            let value = exp(block[lane] - shift);
            block[lane] = value;
            lanes[lane] += value;
        }
    }
    let mut rest = 0.0;
    for value in blocks.into_remainder() {
        *value = exp(*value - shift);
        rest += *value;
    }
    fold(lanes) + rest
}

/// Pairwise sum of the lanes.
#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_standard_library_over_its_range() {
        let mut x = -86.6f32;
        while x < 88.7 {
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (ours - exact).abs() <= 4e-7 * exact,
                "exp({x}) = {ours}, expected {exact}"
            );
            x += 0.0137;
        }
    }

    #[test]
    fn exp_saturates_and_passes_nan() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_and_erf_agree_with_tables_and_with_the_standard_library() {
        let mut x = -12.0f32;
        while x < 12.0 {
            let exact = f64::from(x).tanh();
            assert!(
                (f64::from(tanh(x)) - exact).abs() <= 3e-7 * exact.abs(),
                "tanh({x}) = {}, expected {exact}",
                tanh(x)
            );
            x += 0.0131;
        }
        assert_eq!((tanh(100.0), tanh(-100.0), tanh(0.0)), (1.0, -1.0, 0.0));
        // Abramowitz and Stegun, table 7.1, and 1 − erfc for the rest.
        for (x, exact) in [
            (0.02, 0.022_564_574_7),
            (0.3, 0.328_626_759_5),
            (0.5, 0.520_499_877_8),
            (0.98, 0.834_231_504_3),
            (1.0, 0.842_700_792_9),
            (1.02, 0.850_838_017_7),
            (1.5, 0.966_105_146_5),
            (2.0, 0.995_322_265_0),
            (3.0, 0.999_977_909_5),
        ] {
            for sign in [1.0, -1.0] {
                let found = f64::from(erf((sign * x) as f32));
                assert!((found - sign * exact).abs() <= 3e-7, "erf({x}) = {found}");
            }
        }
        assert_eq!((erf(0.0), erf(9.0), erf(-9.0)), (0.0, 1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan() && erf(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_agree_with_plain_loops() {
        let values: Vec<f32> = (0..53)
            .map(|i| ((i * 37) % 29) as f32 / 7.0 - 2.0)
            .collect();
        let exact: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        assert!((f64::from(dot(&values, &values)) - exact).abs() < 1e-4);
        assert_eq!(
            max(&values),
            values.iter().copied().fold(f32::NEG_INFINITY, f32::max)
        );
        assert_eq!(max(&[]), f32::NEG_INFINITY);
    }
}

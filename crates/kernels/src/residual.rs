//! The residual sum. Its backward is the identity on both operands, so there is none here.

use crate::host::{self, Host};
use crate::math::simd;
use crate::{Tensor, parallel};

/// a + b, both `[n, d]`; in place when nothing else holds `a`.
pub fn add(a: Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    let [rows, width] = a.dims();
    assert_eq!(b.dims(), [rows, width], "operands of a sum");
    device_form!(cuda::add(&a, b));
    let composed = |a: &Tensor<2>| a.take_back(a.burn() + b.burn());
    let Some(b_host) = Host::read(b) else {
        return composed(&a);
    };
    let b_slice: &[f32] = &b_host;
    let mut out = match host::take(a) {
        Ok(out) => out,
        Err(a) => return composed(&a),
    };
    parallel::row_blocks(&mut out, width, |first, block| {
        let b = &b_slice[first * width..];
        simd(
            #[inline(always)]
            || {
                for (sum, &value) in block.iter_mut().zip(b) {
                    *sum += value;
                }
            },
        );
    });
    host::tensor(out, [rows, width])
}

//! Queries, keys and values that one product makes head by head (GPT-NeoX: q₀ k₀ v₀ q₁ k₁ v₁ …), apart and together again.

use crate::host::{self, Host};
use crate::{Tensor, composition, parallel};

/// `[n, 3 · heads · head_dim]` → queries, keys and values, `[n, heads · head_dim]` each.
pub fn split_heads(x: &Tensor<2>, heads: usize) -> [Tensor<2>; 3] {
    let [rows, width] = x.dims();
    assert_eq!(width % (3 * heads), 0, "{heads} heads in {width} columns");
    device_form!(cuda::split_heads(x, heads));
    let Some(x) = Host::read(x) else {
        return composition::split_heads(&x.burn(), heads).map(|part| x.take_back(part));
    };
    let (x, head_dim): (&[f32], usize) = (&x, width / (3 * heads));
    [0, 1, 2].map(|part| {
        let mut out = vec![0.0; rows * width / 3];
        parallel::row_blocks(&mut out, width / 3, |first, block| {
            let sources = x[first * width..].chunks_exact(3 * head_dim);
            for (target, source) in block.chunks_exact_mut(head_dim).zip(sources) {
                target.copy_from_slice(&source[part * head_dim..][..head_dim]);
            }
        });
        host::tensor(out, [rows, width / 3])
    })
}

/// The inverse of [`split_heads`], and so the gradient of its input from those of its outputs.
pub fn join_heads(parts: &[Tensor<2>; 3], heads: usize) -> Tensor<2> {
    let [rows, width] = parts[0].dims();
    for part in parts {
        assert_eq!(part.dims(), [rows, width], "queries, keys and values");
    }
    assert_eq!(width % heads, 0, "{heads} heads in {width} columns");
    device_form!(cuda::join_heads(parts, heads));
    let [Some(queries), Some(keys), Some(values)] = parts.each_ref().map(Host::read) else {
        let joined = composition::join_heads(&parts.each_ref().map(Tensor::burn), heads);
        return parts[0].take_back(joined);
    };
    let (sources, head_dim) = ([&queries[..], &keys, &values], width / heads);
    let mut out = vec![0.0; rows * width * 3];
    parallel::row_blocks(&mut out, 3 * width, |first, block| {
        for (index, target) in block.chunks_exact_mut(head_dim).enumerate() {
            let (head, part) = (index / 3, index % 3);
            target.copy_from_slice(&sources[part][first * width + head * head_dim..][..head_dim]);
        }
    });
    host::tensor(out, [rows, 3 * width])
}

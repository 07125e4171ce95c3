//! Token embedding: rows of a table. Without scaling; a family that scales does so itself.

use burn::tensor::Tensor;

use crate::host::{self, Host};
use crate::{Gradients, Slot, composition};

/// Rows `ids` of `weight`, `[vocabulary, d]` → `[ids, d]`.
///
/// # Panics
/// If an id is not below the vocabulary size.
pub fn embedding(weight: &Tensor<2>, ids: &[u32]) -> Tensor<2> {
    let [vocabulary, width] = weight.dims();
    check(ids, vocabulary);
    let Some(weight) = Host::read(weight) else {
        return composition::embedding(weight, ids);
    };
    let table: &[f32] = &weight;
    let mut out = Vec::with_capacity(ids.len() * width);
    for &id in ids {
        out.extend_from_slice(&table[id as usize * width..][..width]);
    }
    host::tensor(out, [ids.len(), width])
}

/// Adds the rows of `dy`, `[ids, d]`, to the gradient of the table at `slot`, in the order of `ids`.
pub fn embedding_backward(dy: &Tensor<2>, ids: &[u32], gradients: &mut Gradients, slot: &Slot) {
    let [rows, width] = dy.dims();
    assert_eq!(rows, ids.len(), "rows of dy and ids");
    check(ids, slot.len / width);
    let (Some(dy), Some(sums)) = (Host::read(dy), gradients.host(slot)) else {
        return composition::embedding_backward(dy, ids, gradients, slot);
    };
    for (&id, row) in ids.iter().zip(dy.chunks_exact(width)) {
        for (sum, &value) in sums[id as usize * width..][..width].iter_mut().zip(row) {
            *sum += value;
        }
    }
}

fn check(ids: &[u32], vocabulary: usize) {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
        panic!("token id {id} in a vocabulary of {vocabulary}");
    }
}

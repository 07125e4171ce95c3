//! Token embedding: rows of a table. Without scaling; a family that scales does so itself.

use std::collections::BTreeMap;

use crate::host::{self, Host};
use crate::{Gradients, Slot, Tensor, composition};

/// Rows `ids` of `weight`, `[vocabulary, d]` of any [`crate::Precision`] → `[ids, d]`, f32.
///
/// # Panics
/// If an id is not below the vocabulary size.
pub fn embedding(weight: &Tensor<2>, ids: &[u32]) -> Tensor<2> {
    let [vocabulary, width] = weight.dims();
    check(ids, vocabulary);
    device_form!(cuda::embedding(weight, ids));
    let Some(weight) = Host::read(weight) else {
        return weight.take_back(composition::embedding(&weight.burn(), ids));
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
    device_form!(cuda::embedding_backward(dy, ids, gradients, slot));
    let (Some(dy), Some(sums)) = (Host::read(dy), gradients.host(slot)) else {
        return composition::embedding_backward(&dy.burn(), ids, gradients, slot);
    };
    for (&id, row) in ids.iter().zip(dy.chunks_exact(width)) {
        for (sum, &value) in sums[id as usize * width..][..width].iter_mut().zip(row) {
            *sum += value;
        }
    }
}

/// The gradient of a table row by row, only the rows that occur. A table that is also the head's weight gets its gradient from
/// both; summing the embedding's part apart, one pack after another, keeps the order of additions the same whether packs go
/// through the model one by one or side by side.
#[derive(Debug, Default)]
pub struct EmbeddingRows(BTreeMap<u32, Vec<f32>>);

impl EmbeddingRows {
    /// Adds the rows of `dy`, `[ids, d]`, in the order of `ids`.
    pub fn add(&mut self, dy: Tensor<2>, ids: &[u32]) {
        let [rows, width] = dy.dims();
        assert_eq!(rows, ids.len(), "rows of dy and ids");
        let dy = dy.into_vec();
        for (&id, row) in ids.iter().zip(dy.chunks_exact(width)) {
            let sums = self.0.entry(id).or_insert_with(|| vec![0.0; width]);
            for (sum, &value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }

    /// Adds all rows to the gradient of the table at `slot`.
    pub fn add_to(self, gradients: &mut Gradients, slot: &Slot) {
        for (id, row) in self.0 {
            let row_slot = Slot {
                offset: slot.offset + id as usize * row.len(),
                len: row.len(),
                ..*slot
            };
            assert!(
                row_slot.offset + row_slot.len <= slot.offset + slot.len,
                "row {id} of a table of {} elements",
                slot.len
            );
            if let Some(sums) = gradients.host(&row_slot) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += value;
                }
            } else {
                let len = row.len();
                let row = Tensor::new(row, [len], gradients.device());
                gradients.accumulate(&row_slot, row);
            }
        }
    }
}

fn check(ids: &[u32], vocabulary: usize) {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
        panic!("token id {id} in a vocabulary of {vocabulary}");
    }
}

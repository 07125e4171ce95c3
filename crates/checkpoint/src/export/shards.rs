//! Which tensor goes into which file of an export, and the index that says so: what `save_pretrained` of transformers does.

use serde_json::{Map, Value, json};

use super::directory::SINGLE;
use super::dtype::WeightDtype;
use crate::parts::TensorSpec;

/// Largest shard unless another size is asked for, Hugging Face's 5GB: 5·10⁹ bytes of tensors.
pub const SHARD_BYTES_MAX: u64 = 5_000_000_000;

/// A tensor to export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tensor<'a> {
    pub spec: &'a TensorSpec,
    pub dtype: WeightDtype,
    /// Whether it had that type before the run.
    pub had_dtype: bool,
}

/// One file of weights.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shard<'a> {
    pub name: String,
    /// In the order of the file.
    pub tensors: Vec<Tensor<'a>>,
}

impl Tensor<'_> {
    pub(super) fn elements(&self) -> usize {
        self.spec
            .elements()
            .expect("an open checkpoint's shapes are checked")
    }

    /// Size in the file.
    pub(super) fn bytes(&self) -> u64 {
        self.elements() as u64 * self.dtype.size()
    }
}

/// Fills files of at most `bytes_max` bytes of tensors in the model's order. A larger tensor goes alone, and the file before
/// it is filled up further, as `huggingface_hub` does.
pub(super) fn plan<'a>(tensors: &[Tensor<'a>], bytes_max: u64) -> Vec<Shard<'a>> {
    let mut files: Vec<Vec<Tensor>> = Vec::new();
    let mut open: Vec<Tensor> = Vec::new();
    let mut open_bytes = 0;
    for tensor in tensors {
        let bytes = tensor.bytes();
        if bytes > bytes_max {
            files.push(vec![*tensor]);
            continue;
        }
        if open_bytes + bytes > bytes_max {
            files.push(std::mem::take(&mut open));
            open_bytes = 0;
        }
        open.push(*tensor);
        open_bytes += bytes;
    }
    if !open.is_empty() || files.is_empty() {
        files.push(open);
    }
    let count = files.len();
    let shard = |(index, mut tensors): (usize, Vec<Tensor<'a>>)| {
        // Wide elements first, so that all of them begin at a multiple of their size, which readers that map files rely on.
        tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size()));
        let name = match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        Shard { name, tensors }
    };
    files.into_iter().enumerate().map(shard).collect()
}

/// The bytes of the index of several shards.
pub(super) fn index(shards: &[Shard]) -> Vec<u8> {
    let tensors = || shards.iter().flat_map(|shard| &shard.tensors);
    let parameters: usize = tensors().map(Tensor::elements).sum();
    let size: u64 = tensors().map(Tensor::bytes).sum();
    // The map sorts its keys, as transformers does.
    let mut weight_map = Map::new();
    for shard in shards {
        for tensor in &shard.tensors {
            weight_map.insert(tensor.spec.name.clone(), Value::from(&*shard.name));
        }
    }
    let index = json!({
        "metadata": { "total_parameters": parameters, "total_size": size },
        "weight_map": weight_map,
    });
    format!("{index:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shards of tensors of so many bf16 elements, by number.
    fn check(elements: &[usize], bytes_max: u64, expected: &[&[usize]]) {
        let specs: Vec<TensorSpec> = elements.iter().enumerate().map(spec).collect();
        let tensors: Vec<Tensor> = specs
            .iter()
            .map(|spec| Tensor {
                spec,
                dtype: WeightDtype::Bf16,
                had_dtype: true,
            })
            .collect();
        let shards = plan(&tensors, bytes_max);
        let found: Vec<Vec<usize>> = shards
            .iter()
            .map(|shard| {
                let names = shard.tensors.iter().map(|tensor| &tensor.spec.name);
                names.map(|name| name.parse().expect("a number")).collect()
            })
            .collect();
        assert_eq!(found, expected, "{elements:?} in {bytes_max}");
    }

    fn spec((index, &elements): (usize, &usize)) -> TensorSpec {
        TensorSpec {
            name: index.to_string(),
            shape: vec![elements],
        }
    }

    #[test]
    fn shards_are_those_of_huggingface_hub() {
        // The example of its documentation.
        check(&[3, 3, 1, 3, 1, 1], 10, &[&[0], &[1, 2], &[3, 4, 5]]);
        check(&[1, 2, 2], 10, &[&[0, 1, 2]]);
        check(&[1, 2, 2], 9, &[&[0, 1], &[2]]);
        // One that is too large goes alone, before the file that was being filled.
        check(&[1, 9, 2, 3], 10, &[&[1], &[0, 2], &[3]]);
        check(&[9], 10, &[&[0]]);
    }
}

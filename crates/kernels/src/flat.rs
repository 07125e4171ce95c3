//! Flat weights: every parameter as a range of a few large buckets. Only the memory; what a bucket holds is the layout's
//! business (`model`), what is done to it the optimizer's (`trainer`).

use burn::tensor::{Device, Tensor, TensorData};

use crate::host;

/// Where one parameter lies: `len` elements from `offset` of bucket `bucket`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Index of the bucket.
    pub bucket: usize,
    /// First element within the bucket.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
}

/// The weights of a model on one device, one tensor per bucket.
pub struct Flat {
    buckets: Vec<Tensor<1>>,
    device: Device,
}

impl Flat {
    /// Buckets from host memory, which flex takes over without a copy.
    pub fn from_host(buckets: Vec<Vec<f32>>, device: &Device) -> Self {
        let mut flat = Self {
            buckets: Vec::new(),
            device: device.clone(),
        };
        flat.put_host(buckets);
        flat
    }

    /// The parameter at `slot` as a tensor of `shape`; on flex a view, not a copy.
    ///
    /// # Panics
    /// If the weights have been taken, the slot lies outside its bucket, or the shape has another size.
    pub fn view<const D: usize>(&self, slot: &Slot, shape: [usize; D]) -> Tensor<D> {
        assert!(
            slot.bucket < self.buckets.len(),
            "bucket {} of {}",
            slot.bucket,
            self.buckets.len()
        );
        assert_eq!(
            shape.iter().product::<usize>(),
            slot.len,
            "elements of shape {shape:?} and of {slot:?}"
        );
        let bucket = self.buckets[slot.bucket].clone();
        let [len] = bucket.dims();
        assert!(
            slot.offset + slot.len <= len,
            "{slot:?} in a bucket of {len}"
        );
        bucket.narrow(0, slot.offset, slot.len).reshape(shape)
    }

    /// The buckets as host memory, leaving no weights behind. On flex nothing is copied, provided that no view is alive.
    pub fn take_host(&mut self) -> Vec<Vec<f32>> {
        std::mem::take(&mut self.buckets)
            .into_iter()
            .map(host::into_vec)
            .collect()
    }

    /// Puts buckets (back) in place.
    pub fn put_host(&mut self, buckets: Vec<Vec<f32>>) {
        let device = &self.device;
        self.buckets = buckets
            .into_iter()
            .map(|bucket| {
                let len = bucket.len();
                Tensor::from_data(TensorData::new(bucket, [len]), device)
            })
            .collect();
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

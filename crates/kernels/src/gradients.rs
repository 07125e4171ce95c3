//! Flat gradients: the sums into which every backward adds, laid out like [`crate::Flat`]. On flex plain host memory,
//! so that a product accumulates in place and the collective gets it without a copy.

use burn::tensor::{Device, Tensor, TensorData};

use crate::{Slot, host};

/// The gradient of every parameter, in the buckets of its weights.
pub struct Gradients {
    buckets: Buckets,
    lens: Vec<usize>,
    device: Device,
}

enum Buckets {
    Host(Vec<Vec<f32>>),
    Device(Vec<Tensor<1>>),
}

impl Gradients {
    /// Zeros for buckets of these lengths.
    pub fn zeros(bucket_lens: &[usize], device: &Device) -> Self {
        let buckets = if host::is_host(device) {
            Buckets::Host(bucket_lens.iter().map(|&len| vec![0.0; len]).collect())
        } else {
            Buckets::Device(
                bucket_lens
                    .iter()
                    .map(|&len| Tensor::zeros([len], device))
                    .collect(),
            )
        };
        Self {
            buckets,
            lens: bucket_lens.to_vec(),
            device: device.clone(),
        }
    }

    /// Adds `gradient`, `[slot.len]`.
    pub fn accumulate(&mut self, slot: &Slot, gradient: Tensor<1>) {
        assert_eq!(gradient.dims(), [slot.len], "gradient for {slot:?}");
        self.check(slot);
        match &mut self.buckets {
            Buckets::Host(buckets) => {
                let gradient = host::into_vec(gradient);
                let sums = &mut buckets[slot.bucket][slot.offset..slot.offset + slot.len];
                for (sum, value) in sums.iter_mut().zip(gradient) {
                    *sum += value;
                }
            }
            Buckets::Device(buckets) => {
                let range = slot.offset..slot.offset + slot.len;
                let empty = Tensor::zeros([0], &self.device);
                let bucket = std::mem::replace(&mut buckets[slot.bucket], empty);
                let sum = bucket.clone().slice([range.clone()]) + gradient;
                buckets[slot.bucket] = bucket.slice_assign([range], sum);
            }
        }
    }

    /// The sums at `slot` for adding in place, when they are host memory.
    pub(crate) fn host(&mut self, slot: &Slot) -> Option<&mut [f32]> {
        self.check(slot);
        match &mut self.buckets {
            Buckets::Host(buckets) => {
                Some(&mut buckets[slot.bucket][slot.offset..slot.offset + slot.len])
            }
            Buckets::Device(_) => None,
        }
    }

    /// The buckets as host memory (no copy on flex), leaving none behind until [`Gradients::put_host`].
    pub fn take_host(&mut self) -> Vec<Vec<f32>> {
        match &mut self.buckets {
            Buckets::Host(buckets) => std::mem::take(buckets),
            Buckets::Device(buckets) => std::mem::take(buckets)
                .into_iter()
                .map(host::into_vec)
                .collect(),
        }
    }

    /// Puts buckets (back) in place.
    ///
    /// # Panics
    /// If their lengths are not those of the layout.
    pub fn put_host(&mut self, buckets: Vec<Vec<f32>>) {
        let lens: Vec<usize> = buckets.iter().map(Vec::len).collect();
        assert_eq!(lens, self.lens, "lengths of the gradient buckets");
        match &mut self.buckets {
            Buckets::Host(own) => *own = buckets,
            Buckets::Device(own) => {
                *own = buckets
                    .into_iter()
                    .zip(lens)
                    .map(|(bucket, len)| {
                        Tensor::from_data(TensorData::new(bucket, [len]), &self.device)
                    })
                    .collect();
            }
        }
    }

    /// Sets all sums to zero.
    pub fn zero(&mut self) {
        match &mut self.buckets {
            Buckets::Host(buckets) => buckets.iter_mut().for_each(|bucket| bucket.fill(0.0)),
            Buckets::Device(buckets) => {
                for bucket in buckets {
                    *bucket = bucket.zeros_like();
                }
            }
        }
    }

    fn check(&self, slot: &Slot) {
        let len = self.lens[slot.bucket];
        assert!(
            slot.offset + slot.len <= len,
            "{slot:?} in a bucket of {len}"
        );
        let present = match &self.buckets {
            Buckets::Host(buckets) => buckets.len(),
            Buckets::Device(buckets) => buckets.len(),
        };
        assert!(
            slot.bucket < present,
            "gradients were taken and not put back"
        );
    }
}

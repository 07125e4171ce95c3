//! Flat weights: every parameter as a range of a few large buckets. Only the memory; what a bucket holds is the layout's
//! business (`model`), what is done to it the optimizer's (`trainer`).

use collective::DeviceRegion;

use crate::{Device, Precision, Tensor, Values};

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
    /// f32: what an optimizer updates.
    buckets: Vec<Tensor<1>>,
    /// The same as operands of products, where they are not f32; made anew whenever the buckets are put in place.
    operands: Vec<Tensor<1>>,
    precision: Precision,
    device: Device,
}

impl Flat {
    /// Buckets from host memory, which flex takes over without a copy.
    pub fn from_host(buckets: Vec<Vec<f32>>, precision: Precision, device: &Device) -> Self {
        let mut flat = Self {
            buckets: Vec::new(),
            operands: Vec::new(),
            precision,
            device: device.clone(),
        };
        flat.put_host(buckets);
        flat
    }

    /// What the weights are as operands of products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Changes what the weights are as operands of products; the weights stay.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
        self.make_operands();
    }

    /// As [`Flat::view`], for a product: in the weights' [`Precision`].
    pub fn operand<const D: usize>(&self, slot: &Slot, shape: [usize; D]) -> Tensor<D> {
        match self.precision {
            Precision::F32 => self.view(slot, shape),
            Precision::Bf16 => view(&self.operands, slot, shape),
        }
    }

    fn make_operands(&mut self) {
        let made = |bucket| self.precision.operand(bucket);
        self.operands = match self.precision {
            Precision::F32 => Vec::new(),
            Precision::Bf16 => self.buckets.iter().map(made).collect(),
        };
    }

    /// The parameter at `slot` as a tensor of `shape`; on flex a view, not a copy.
    ///
    /// # Panics
    /// If the weights have been taken, the slot lies outside its bucket, or the shape has another size.
    pub fn view<const D: usize>(&self, slot: &Slot, shape: [usize; D]) -> Tensor<D> {
        view(&self.buckets, slot, shape)
    }

    /// Elements `range` of a bucket, held for reading: shared on flex, copied from a GPU.
    ///
    /// # Panics
    /// If the weights have been taken, the bucket has fewer, or the device fails.
    pub fn values(&self, bucket: usize, range: std::ops::Range<usize>) -> Values {
        Values::of(self.buckets[bucket].slice(range))
    }

    /// The buckets as host memory, leaving no weights behind. On flex nothing is copied, provided that no view or value of them is
    /// held.
    pub fn take_host(&mut self) -> Vec<Vec<f32>> {
        self.operands.clear();
        std::mem::take(&mut self.buckets)
            .into_iter()
            .map(Tensor::into_vec)
            .collect()
    }

    /// Puts buckets (back) in place.
    pub fn put_host(&mut self, buckets: Vec<Vec<f32>>) {
        let device = &self.device;
        self.buckets = buckets
            .into_iter()
            .map(|bucket| {
                let len = bucket.len();
                Tensor::new(bucket, [len], device)
            })
            .collect();
        self.make_operands();
    }

    /// Elements `range` of a bucket and what they are as operands, when they are memory of a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn arrays(
        &self,
        bucket: usize,
        range: &std::ops::Range<usize>,
    ) -> Option<(gpu::View, Option<gpu::View>)> {
        let part = |bucket: &Tensor<1>| Some(bucket.array()?.view.slice(range.clone()));
        let weights = part(self.buckets.get(bucket)?)?;
        Some((weights, self.operands.get(bucket).and_then(part)))
    }

    /// A bucket's f32 weights as a region of a collective, when they are memory of a GPU: nothing may use them until the region is
    /// given back, after which [`Flat::refresh`] is due.
    ///
    /// # Panics
    /// If the device fails.
    pub fn region(&self, bucket: usize) -> Option<DeviceRegion> {
        self.buckets[bucket].region()
    }

    /// Makes operands of weights that were changed where they lie.
    pub fn refresh(&mut self) {
        for (operand, bucket) in self.operands.iter_mut().zip(&self.buckets) {
            *operand = self.precision.operand(bucket);
        }
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

fn view<const D: usize>(buckets: &[Tensor<1>], slot: &Slot, shape: [usize; D]) -> Tensor<D> {
    assert!(
        slot.bucket < buckets.len(),
        "bucket {} of {}",
        slot.bucket,
        buckets.len()
    );
    assert_eq!(
        shape.iter().product::<usize>(),
        slot.len,
        "elements of shape {shape:?} and of {slot:?}"
    );
    let [len] = buckets[slot.bucket].dims();
    assert!(
        slot.offset + slot.len <= len,
        "{slot:?} in a bucket of {len}"
    );
    let range = slot.offset..slot.offset + slot.len;
    buckets[slot.bucket].slice(range).reshape(shape)
}

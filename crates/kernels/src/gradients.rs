//! Flat gradients: the sums into which every backward adds, laid out like [`crate::Flat`]. On flex plain host memory,
//! so that a product accumulates in place and the collective gets it without a copy.

use std::ops::Range;

use collective::DeviceRegion;

use crate::{Device, Slot, Tensor};

/// The gradient of every parameter, in the buckets of its weights. Buckets may be elsewhere for a while: split off, or taken.
pub struct Gradients {
    buckets: Buckets,
    lens: Vec<usize>,
    device: Device,
}

enum Buckets {
    Host(Vec<Option<Vec<f32>>>),
    Device(Vec<Option<Tensor<1>>>),
}

impl Gradients {
    /// Zeros for buckets of these lengths.
    pub fn zeros(bucket_lens: &[usize], device: &Device) -> Self {
        let lens = bucket_lens.iter();
        let buckets = if device.is_host() {
            Buckets::Host(lens.map(|&len| Some(vec![0.0; len])).collect())
        } else {
            Buckets::Device(
                lens.map(|&len| Some(Tensor::zeros([len], device)))
                    .collect(),
            )
        };
        Self {
            buckets,
            lens: bucket_lens.to_vec(),
            device: device.clone(),
        }
    }

    /// None of the buckets of these lengths: they are put in place one by one.
    pub fn absent(bucket_lens: &[usize], device: &Device) -> Self {
        let count = bucket_lens.len();
        Self {
            buckets: if device.is_host() {
                Buckets::Host(vec![None; count])
            } else {
                Buckets::Device(vec![None; count])
            },
            lens: bucket_lens.to_vec(),
            device: device.clone(),
        }
    }

    /// Whether a bucket is here.
    pub fn has(&self, bucket: usize) -> bool {
        match &self.buckets {
            Buckets::Host(buckets) => buckets[bucket].is_some(),
            Buckets::Device(buckets) => buckets[bucket].is_some(),
        }
    }

    /// Puts zeros in a bucket's place.
    ///
    /// # Panics
    /// If a device has no room.
    pub fn put_zeros(&mut self, bucket: usize) {
        let len = self.lens[bucket];
        match &mut self.buckets {
            Buckets::Host(buckets) => buckets[bucket] = Some(vec![0.0; len]),
            Buckets::Device(buckets) => {
                buckets[bucket] = Some(Tensor::zeros([len], &self.device));
            }
        }
    }

    /// Gives a bucket's memory back.
    pub fn drop_bucket(&mut self, bucket: usize) {
        match &mut self.buckets {
            Buckets::Host(buckets) => buckets[bucket] = None,
            Buckets::Device(buckets) => buckets[bucket] = None,
        }
    }

    /// Adds `gradient`, `[slot.len]`.
    pub fn accumulate(&mut self, slot: &Slot, gradient: impl Into<Tensor<1>>) {
        let gradient = gradient.into();
        assert_eq!(gradient.dims(), [slot.len], "gradient for {slot:?}");
        self.check(slot);
        let range = slot.offset..slot.offset + slot.len;
        match &mut self.buckets {
            Buckets::Host(buckets) => {
                let gradient = gradient.into_vec();
                let sums = &mut present(&mut buckets[slot.bucket])[range];
                for (sum, value) in sums.iter_mut().zip(gradient) {
                    *sum += value;
                }
            }
            Buckets::Device(buckets) => {
                let bucket = present(&mut buckets[slot.bucket]);
                #[cfg(feature = "cuda")]
                if crate::cuda::accumulate(bucket, range.clone(), &gradient).is_some() {
                    return;
                }
                let (sums, gradient) = (bucket.burn(), gradient.burn());
                let sum = sums.clone().slice([range.clone()]) + gradient;
                *bucket = sums.slice_assign([range], sum).into();
            }
        }
    }

    /// The sums at `slot` for adding in place, when they are host memory.
    pub(crate) fn host(&mut self, slot: &Slot) -> Option<&mut [f32]> {
        self.check(slot);
        match &mut self.buckets {
            Buckets::Host(buckets) => {
                let bucket = present(&mut buckets[slot.bucket]);
                Some(&mut bucket[slot.offset..slot.offset + slot.len])
            }
            Buckets::Device(_) => None,
        }
    }

    /// The sums at `slot` for adding in place, when they are memory of a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn array(&mut self, slot: &Slot) -> Option<crate::tensor::Array<1>> {
        self.check(slot);
        match &mut self.buckets {
            Buckets::Host(_) => None,
            Buckets::Device(buckets) => {
                let bucket = present(&mut buckets[slot.bucket]);
                let part = bucket
                    .array()?
                    .view
                    .slice(slot.offset..slot.offset + slot.len);
                Some(crate::tensor::Array {
                    view: part,
                    shape: [slot.len],
                })
            }
        }
    }

    /// Elements `range` of a bucket, the same memory, when it is that of a GPU.
    ///
    /// # Panics
    /// If the bucket is not here.
    pub fn part(&self, bucket: usize, range: Range<usize>) -> Option<Tensor<1>> {
        match &self.buckets {
            Buckets::Host(_) => None,
            Buckets::Device(buckets) => {
                let bucket = buckets[bucket].as_ref().unwrap_or_else(|| gone());
                Some(bucket.slice(range))
            }
        }
    }

    /// These buckets alone, for adding to them beside others; [`Gradients::join`] brings them back.
    ///
    /// # Panics
    /// If one of them is not here.
    #[must_use]
    pub fn split(&mut self, buckets: impl IntoIterator<Item = usize>) -> Self {
        let mut part = Self {
            buckets: match &self.buckets {
                Buckets::Host(all) => Buckets::Host(vec![None; all.len()]),
                Buckets::Device(all) => Buckets::Device(vec![None; all.len()]),
            },
            lens: self.lens.clone(),
            device: self.device.clone(),
        };
        for index in buckets {
            match (&mut self.buckets, &mut part.buckets) {
                (Buckets::Host(own), Buckets::Host(part)) => {
                    part[index] = Some(own[index].take().unwrap_or_else(|| gone()));
                }
                (Buckets::Device(own), Buckets::Device(part)) => {
                    part[index] = Some(own[index].take().unwrap_or_else(|| gone()));
                }
                _ => unreachable!("a part lies where the whole lies"),
            }
        }
        part
    }

    /// Takes back what was split off.
    pub fn join(&mut self, part: Self) {
        match (&mut self.buckets, part.buckets) {
            (Buckets::Host(own), Buckets::Host(part)) => join(own, part),
            (Buckets::Device(own), Buckets::Device(part)) => join(own, part),
            _ => unreachable!("a part lies where the whole lies"),
        }
    }

    /// One bucket as host memory (no copy on flex), leaving none behind until [`Gradients::put`].
    ///
    /// # Panics
    /// If it is not here.
    pub fn take(&mut self, bucket: usize) -> Vec<f32> {
        match &mut self.buckets {
            Buckets::Host(buckets) => buckets[bucket].take().unwrap_or_else(|| gone()),
            Buckets::Device(buckets) => {
                let bucket = buckets[bucket].take();
                bucket.unwrap_or_else(|| gone()).into_vec()
            }
        }
    }

    /// Puts a bucket (back) in place.
    ///
    /// # Panics
    /// If its length is not that of the layout.
    pub fn put(&mut self, bucket: usize, values: Vec<f32>) {
        let len = values.len();
        assert_eq!(len, self.lens[bucket], "length of a gradient bucket");
        match &mut self.buckets {
            Buckets::Host(own) => own[bucket] = Some(values),
            Buckets::Device(own) => {
                own[bucket] = Some(Tensor::new(values, [len], &self.device));
            }
        }
    }

    /// All buckets as host memory; see [`Gradients::take`].
    pub fn take_host(&mut self) -> Vec<Vec<f32>> {
        (0..self.lens.len())
            .map(|bucket| self.take(bucket))
            .collect()
    }

    /// A bucket as a region of a collective, when it is memory of a GPU: nothing may add to it until the region is given back.
    ///
    /// # Panics
    /// If the bucket is not here, or the device fails.
    pub fn region(&self, bucket: usize) -> Option<DeviceRegion> {
        match &self.buckets {
            Buckets::Host(_) => None,
            Buckets::Device(buckets) => buckets[bucket].as_ref().unwrap_or_else(|| gone()).region(),
        }
    }

    /// Sets all sums that are here to zero.
    pub fn zero(&mut self) {
        match &mut self.buckets {
            Buckets::Host(buckets) => {
                let here = buckets.iter_mut().flatten();
                here.for_each(|bucket| bucket.fill(0.0));
            }
            Buckets::Device(buckets) => {
                buckets.iter_mut().flatten().for_each(Tensor::clear);
            }
        }
    }

    /// Where the sums lie.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn check(&self, slot: &Slot) {
        let len = self.lens[slot.bucket];
        assert!(
            slot.offset + slot.len <= len,
            "{slot:?} in a bucket of {len}"
        );
        if !self.has(slot.bucket) {
            gone()
        }
    }
}

fn join<T>(own: &mut [Option<T>], part: Vec<Option<T>>) {
    for (own, part) in own.iter_mut().zip(part) {
        if part.is_some() {
            assert!(own.is_none(), "a bucket is in one place");
            *own = part;
        }
    }
}

fn present<T>(bucket: &mut Option<T>) -> &mut T {
    bucket.as_mut().unwrap_or_else(|| gone())
}

fn gone() -> ! {
    panic!("gradients were taken and not put back")
}

//! Flat weights: every parameter as a range of a few large buckets. Only the memory; what a bucket holds is the layout's
//! business (`model`), what is done to it the optimizer's (`trainer`).
//!
//! ```text
//! whole      buckets: f32 masters ─────────► operands: bf16, made of them       a rank alone, f32, adapters
//! parted     (an optimizer has the masters)  operands: bf16, gathered           ranks that share the masters out
//!                                            narrow:   f32 of what is read in f32
//! frozen     none                            the same, as they were read        under an adapter; a reference
//! ```

use std::convert::Infallible;
use std::ops::Range;

use collective::DeviceRegion;
use rayon::prelude::*;

use crate::host::unshared;
use crate::rounding::from_bf16;
use crate::{Device, Precision, Rounding, Tensor, Values};

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
    /// f32 masters: what an optimizer updates. Memory of the device, or of the host where they are parked beside a GPU, or none
    /// while an optimizer has them, and where nothing is updated.
    buckets: Vec<Tensor<1>>,
    /// The same as operands of products, where they are not f32; made anew whenever the buckets are put in place.
    operands: Vec<Tensor<1>>,
    /// By bucket how its masters become operands of bf16, which the values that it had first decide.
    roundings: Vec<Rounding>,
    /// What is read in f32, where the masters are not memory of the device.
    narrow: Option<Narrow>,
    /// By bucket what [`Flat::unshare`] has copied the last time, for its memory.
    before: Vec<Option<Tensor<1>>>,
    precision: Precision,
    device: Device,
}

/// The elements that are read in f32 whatever the precision of products is, such as norms and biases.
struct Narrow {
    /// By bucket.
    places: Vec<Vec<Place>>,
    /// All of them, one behind the other.
    values: Tensor<1>,
}

/// A stretch of a bucket among the narrow values.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Elements within the bucket.
    range: Range<usize>,
    /// First element among the narrow values.
    at: usize,
}

impl Flat {
    /// Buckets from host memory, which flex takes over without a copy.
    pub fn from_host(buckets: Vec<Vec<f32>>, precision: Precision, device: &Device) -> Self {
        let buckets = buckets.into_iter().map(Ok::<_, Infallible>);
        let Ok(flat) = Self::read(buckets, precision, device);
        flat
    }

    /// As [`Flat::from_host`]. A GPU gets one bucket after the other: the host holds no more.
    ///
    /// # Errors
    /// The first of `buckets`.
    pub fn read<E>(
        buckets: impl Iterator<Item = Result<Vec<f32>, E>>,
        precision: Precision,
        device: &Device,
    ) -> Result<Self, E> {
        let mut roundings = Vec::new();
        let placed = buckets.enumerate().map(|(index, bucket)| {
            let bucket = bucket?;
            roundings.push(Rounding::fitting(index, &bucket));
            Ok(placed(bucket, device))
        });
        let mut flat = Self {
            buckets: placed.collect::<Result<_, E>>()?,
            operands: Vec::new(),
            roundings,
            narrow: None,
            before: Vec::new(),
            precision,
            device: device.clone(),
        };
        flat.make_operands();
        Ok(flat)
    }

    /// As [`Flat::read`] for products of bf16, with nothing but operands and the `narrow` ranges of every bucket on the device: the
    /// masters stay on the host, for [`Flat::take_masters`]. Those whose values are of bf16, such as they come from most files, are
    /// their operands, and take nothing there.
    ///
    /// # Errors
    /// The first of `buckets`.
    pub fn parked<E>(
        buckets: impl Iterator<Item = Result<Vec<f32>, E>>,
        narrow: &[Vec<Range<usize>>],
        device: &Device,
    ) -> Result<Self, E> {
        let host = Device::flex();
        let mut parked = Vec::with_capacity(narrow.len());
        let mut flat = Self::parted(buckets, narrow, device, |bucket, operand| {
            parked.push(if is_bf16(&bucket) {
                operand.clone()
            } else {
                placed(bucket, &host)
            });
        })?;
        flat.buckets = parked;
        Ok(flat)
    }

    /// As [`Flat::parked`] for weights that nobody updates: there are no masters. Of `buckets` one is held at a time.
    ///
    /// # Errors
    /// The first of `buckets`.
    pub fn frozen<E>(
        buckets: impl Iterator<Item = Result<Vec<f32>, E>>,
        narrow: &[Vec<Range<usize>>],
        device: &Device,
    ) -> Result<Self, E> {
        Self::parted(buckets, narrow, device, |_, _| ())
    }

    fn parted<E>(
        buckets: impl Iterator<Item = Result<Vec<f32>, E>>,
        narrow: &[Vec<Range<usize>>],
        device: &Device,
        mut keep: impl FnMut(Vec<f32>, &Tensor<1>),
    ) -> Result<Self, E> {
        let mut operands = Vec::with_capacity(narrow.len());
        let mut roundings = Vec::with_capacity(narrow.len());
        let (mut apart, mut bits) = (Collected::default(), Vec::new());
        for (index, (bucket, narrow)) in buckets.zip(narrow).enumerate() {
            let bucket = bucket?;
            let rounding = Rounding::fitting(index, &bucket);
            roundings.push(rounding);
            bits.resize(bucket.len(), 0);
            rounding.to_bf16(&bucket, &mut bits);
            let operand = Tensor::from_bf16(&bits, device);
            apart.add(narrow, |range| bucket[range].to_vec());
            keep(bucket, &operand);
            operands.push(operand);
        }
        Ok(Self {
            buckets: Vec::new(),
            operands,
            roundings,
            narrow: Some(apart.on(device)),
            before: Vec::new(),
            precision: Precision::Bf16,
            device: device.clone(),
        })
    }

    /// What the weights are as operands of products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Changes what the weights are as operands of products; the weights stay.
    ///
    /// # Panics
    /// If the masters are elsewhere and the precision is another.
    pub fn set_precision(&mut self, precision: Precision) {
        if self.narrow.is_some() {
            assert_eq!(precision, self.precision, "the masters are elsewhere");
            return;
        }
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
        // First those that are there: a device need not have room for both.
        self.operands.clear();
        let masters = self.buckets.iter().zip(&self.roundings);
        self.operands = match self.precision {
            Precision::F32 => Vec::new(),
            Precision::Bf16 => masters.map(|(bucket, it)| it.operand(bucket)).collect(),
        };
    }

    /// How masters of a bucket, from element `start` on, become operands of bf16.
    pub fn rounding(&self, bucket: usize, start: usize) -> Rounding {
        self.roundings[bucket].after(start)
    }

    /// The parameter at `slot` in f32 as a tensor of `shape`; on flex a view, not a copy. While the masters are elsewhere, only
    /// narrow ones are here.
    ///
    /// # Panics
    /// If the weights have been taken, the slot lies outside its bucket, or the shape has another size.
    pub fn view<const D: usize>(&self, slot: &Slot, shape: [usize; D]) -> Tensor<D> {
        match &self.narrow {
            None => view(&self.buckets, slot, shape),
            Some(narrow) => narrow.view(slot).reshape(shape),
        }
    }

    /// A copy of the masters at `slot` in host memory, wherever they lie.
    ///
    /// # Panics
    /// If they have been taken.
    pub fn master(&self, slot: &Slot) -> Vec<f32> {
        view(&self.buckets, slot, [slot.len]).into_vec()
    }

    /// Elements `range` of a bucket, held for reading: shared on flex, copied from a GPU.
    ///
    /// # Panics
    /// If the weights have been taken, the bucket has fewer, or the device fails.
    pub fn values(&self, bucket: usize, range: std::ops::Range<usize>) -> Values {
        Values::of(self.buckets[bucket].slice(range))
    }

    /// Copies what [`Flat::values`] has given out of a flex device and is still held, on all threads, so that the next change of the
    /// weights need not. Copies go where those of an earlier time were, whose memory is kept for that.
    pub fn unshare(&mut self) {
        self.before.resize_with(self.buckets.len(), || None);
        let buckets = std::mem::take(&mut self.buckets).into_par_iter();
        let each = buckets.zip(&mut self.before);
        self.buckets = each
            .map(|(bucket, before)| unshared(bucket, before))
            .collect();
    }

    /// The buckets as host memory, leaving no weights behind. On flex nothing is copied, provided that no view or value of them is
    /// held.
    pub fn take_host(&mut self) -> Vec<Vec<f32>> {
        self.operands.clear();
        self.narrow = None;
        std::mem::take(&mut self.buckets)
            .into_iter()
            .map(Tensor::into_vec)
            .collect()
    }

    /// Puts buckets (back) in place.
    pub fn put_host(&mut self, buckets: Vec<Vec<f32>>) {
        let buckets = buckets.into_iter();
        self.buckets = buckets.map(|it| placed(it, &self.device)).collect();
        self.narrow = None;
        self.make_operands();
    }

    /// Elements `range` of a bucket and what they are as operands, when they are memory of a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn arrays(
        &self,
        bucket: usize,
        range: &Range<usize>,
    ) -> Option<(gpu::View, Option<gpu::View>)> {
        let weights = part(self.buckets.get(bucket)?, range)?;
        Some((weights, self.operand_array(bucket, range)))
    }

    /// What elements `range` of a bucket are as operands, when they are memory of a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn operand_array(&self, bucket: usize, range: &Range<usize>) -> Option<gpu::View> {
        part(self.operands.get(bucket)?, range)
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
        let masters = self.buckets.iter().zip(&self.roundings);
        for (operand, (bucket, rounding)) in self.operands.iter_mut().zip(masters) {
            *operand = rounding.operand(bucket);
        }
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// Weights whose masters an optimizer has, in shards.
impl Flat {
    /// Whether the masters are in place, on the device.
    pub fn is_whole(&self) -> bool {
        self.narrow.is_none()
    }

    /// The masters, by bucket: f32 memory of the device, or what [`Flat::parked`] has of them. What stays are operands, and the
    /// `narrow` ranges of every bucket in f32.
    ///
    /// # Panics
    /// If the masters have been taken, or products are not of bf16.
    pub fn take_masters(&mut self, narrow: &[Vec<Range<usize>>]) -> Vec<Tensor<1>> {
        assert_eq!(self.precision, Precision::Bf16, "operands of their own");
        assert_eq!(self.buckets.len(), narrow.len(), "buckets of masters");
        if self.narrow.is_none() {
            self.narrow = Some(Narrow::of(&self.buckets, narrow, &self.device));
        }
        std::mem::take(&mut self.buckets)
    }

    /// Puts masters in place, wherever they lie.
    pub fn put_masters(&mut self, masters: Vec<Tensor<1>>) {
        let device = &self.device;
        let placed = masters.into_iter().map(|bucket| {
            if bucket.device() == *device {
                return bucket.widened();
            }
            placed(bucket.into_vec(), device)
        });
        self.buckets = placed.collect();
        self.narrow = None;
        self.make_operands();
    }

    /// Replaces a bucket's operands, whole, by the values of these bits of bf16.
    ///
    /// # Panics
    /// If their number is not the bucket's.
    pub fn put_operands(&mut self, bucket: usize, bits: &[u16]) {
        let operand = &mut self.operands[bucket];
        assert_eq!(operand.dims(), [bits.len()], "operands of a bucket");
        if self.device.is_host() {
            // The memory that is there, unless somebody still looks at it.
            let old = std::mem::replace(operand, Tensor::zeros([0], &self.device));
            let mut values = old.into_vec();
            from_bf16(bits, &mut values);
            *operand = Tensor::new(values, [bits.len()], &self.device);
        } else {
            *operand = Tensor::from_bf16(bits, &self.device);
        }
    }

    /// A bucket's operands as a region of a collective, when they are memory of a GPU: nothing may use them until the region is
    /// given back.
    ///
    /// # Panics
    /// If the device fails.
    pub fn operand_region(&self, bucket: usize) -> Option<DeviceRegion> {
        self.operands[bucket].region()
    }

    /// Number of elements that are read in f32.
    ///
    /// # Panics
    /// If the masters are in place.
    pub fn narrow_len(&self) -> usize {
        self.apart().values.dims()[0]
    }

    /// Copies what is narrow among elements `range` of a bucket, whose masters are `masters`, to its place in `narrow`.
    ///
    /// # Panics
    /// If the masters are in place.
    pub fn collect_narrow(
        &self,
        bucket: usize,
        range: &Range<usize>,
        masters: &[f32],
        narrow: &mut [f32],
    ) {
        for (own, to) in self.apart().within(bucket, range) {
            narrow[to].copy_from_slice(&masters[own]);
        }
    }

    /// Replaces what is read in f32.
    ///
    /// # Panics
    /// If the masters are in place, or the number is another.
    pub fn put_narrow(&mut self, values: Vec<f32>) {
        let device = self.device.clone();
        let narrow = self.narrow.as_mut().expect(MASTERS_HERE);
        let len = values.len();
        assert_eq!(narrow.values.dims(), [len], "values that are read in f32");
        narrow.values = Tensor::new(values, [len], &device);
    }

    /// What is read in f32 as a region of a collective, when it is memory of a GPU, with nothing in it but what is narrow among
    /// these ranges of buckets, whose masters lie there too: a sum over ranks makes it whole. `None` elsewhere.
    ///
    /// # Panics
    /// If the masters are in place, or the device fails.
    pub fn narrow_region<'m>(
        &mut self,
        masters: impl IntoIterator<Item = (usize, &'m Range<usize>, &'m Tensor<1>)>,
    ) -> Option<DeviceRegion> {
        if !self.device.is_gpu() {
            return None;
        }
        let narrow = self.narrow.as_mut().expect(MASTERS_HERE);
        narrow.values.clear();
        for (bucket, range, masters) in masters {
            for (own, to) in narrow.within(bucket, range) {
                narrow.values.slice(to).overwrite(&masters.slice(own));
            }
        }
        narrow.values.region()
    }

    /// Makes operands of elements `range` of a bucket, whose masters are `masters`, where both are memory of a GPU.
    ///
    /// # Panics
    /// If they are not, or the device fails.
    pub fn round_in_place(&self, bucket: usize, range: Range<usize>, masters: &Tensor<1>) {
        let rounding = self.rounding(bucket, range.start);
        let operand = self.operands[bucket].slice(range);
        operand.overwrite(&rounding.operand(masters));
    }

    /// As [`Flat::round_in_place`] for bits of bf16 of the host.
    ///
    /// # Panics
    /// If the operands are not memory of a GPU, or the device fails.
    pub fn write_in_place(&self, bucket: usize, range: Range<usize>, bits: &[u16]) {
        let operand = self.operands[bucket].slice(range);
        operand.overwrite(&Tensor::from_bf16(bits, &self.device));
    }

    /// What a forward reads of a bucket: its operands, and behind them what it reads in f32.
    ///
    /// # Panics
    /// If the masters are in place.
    pub fn computed(&self, bucket: usize) -> Vec<f32> {
        let mut values = self.operands[bucket].clone().into_vec();
        let narrow = self.apart();
        for place in &narrow.places[bucket] {
            let range = place.at..place.at + place.range.len();
            values.extend(narrow.values.slice(range).into_vec());
        }
        values
    }

    fn apart(&self) -> &Narrow {
        self.narrow.as_ref().expect(MASTERS_HERE)
    }
}

const MASTERS_HERE: &str = "masters are elsewhere";

impl Narrow {
    /// Copies of the `ranges` of every bucket, on `device`.
    fn of(buckets: &[Tensor<1>], ranges: &[Vec<Range<usize>>], device: &Device) -> Self {
        let mut collected = Collected::default();
        for (bucket, ranges) in buckets.iter().zip(ranges) {
            collected.add(ranges, |range| bucket.slice(range).into_vec());
        }
        collected.on(device)
    }

    fn view(&self, slot: &Slot) -> Tensor<1> {
        let asked = slot.offset..slot.offset + slot.len;
        let place = self.places[slot.bucket]
            .iter()
            .find(|place| place.range.start <= asked.start && asked.end <= place.range.end);
        let place = place.unwrap_or_else(|| panic!("the masters of {slot:?} are elsewhere"));
        let start = place.at + asked.start - place.range.start;
        self.values.slice(start..start + slot.len)
    }

    /// What is narrow of a range of a bucket: elements within the range, and among the narrow values.
    fn within(
        &self,
        bucket: usize,
        range: &Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let places = self.places[bucket].iter();
        places.filter_map(|place| {
            let start = place.range.start.max(range.start);
            let end = place.range.end.min(range.end);
            let at = place.at + start.checked_sub(place.range.start)?;
            (start < end).then(|| {
                (
                    start - range.start..end - range.start,
                    at..at + (end - start),
                )
            })
        })
    }
}

fn placed(bucket: Vec<f32>, device: &Device) -> Tensor<1> {
    let len = bucket.len();
    Tensor::new(bucket, [len], device)
}

/// Whether bf16 has all of these values.
fn is_bf16(values: &[f32]) -> bool {
    let lower = values.iter();
    lower.fold(0, |bits, value| bits | value.to_bits() as u16) == 0
}

/// Narrow values of buckets one after the other.
#[derive(Default)]
struct Collected {
    places: Vec<Vec<Place>>,
    values: Vec<f32>,
}

impl Collected {
    /// Adds the `ranges` of the next bucket, which `read` reads.
    fn add(&mut self, ranges: &[Range<usize>], read: impl Fn(Range<usize>) -> Vec<f32>) {
        let mut places = Vec::with_capacity(ranges.len());
        for range in ranges {
            places.push(Place {
                range: range.clone(),
                at: self.values.len(),
            });
            self.values.extend(read(range.clone()));
        }
        self.places.push(places);
    }

    fn on(self, device: &Device) -> Narrow {
        let len = self.values.len();
        Narrow {
            places: self.places,
            values: Tensor::new(self.values, [len], device),
        }
    }
}

#[cfg(feature = "cuda")]
fn part(bucket: &Tensor<1>, range: &Range<usize>) -> Option<gpu::View> {
    Some(bucket.array()?.view.slice(range.clone()))
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

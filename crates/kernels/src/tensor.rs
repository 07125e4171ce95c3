//! The tensors of this crate: burn's, or memory of a CUDA device that has fused forms. Only where elements lie and how they
//! get from one place to the other.

use burn::tensor::TensorData;

#[cfg(feature = "cuda")]
use gpu::{Element, Gpu, View};

use crate::host;

/// What a GPU's launches of one name took together.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceTime {
    /// The kernel, or the product's shape.
    pub name: String,
    /// Launches.
    pub launches: usize,
    /// Seconds on the device.
    pub seconds: f64,
    /// Operations of products; 0 of kernels.
    pub operations: f64,
}

/// How a GPU came to its kernels so far. Displays as one line.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceKernels {
    /// Texts that were compiled; one holds all kernels of a source for one set of macros.
    pub compiled: usize,
    /// Those that were found compiled on disk.
    pub loaded: usize,
    /// Seconds that both took.
    pub seconds: f64,
    /// Where they are kept; `None` where they are not.
    pub folder: Option<std::path::PathBuf>,
    /// What went wrong with what is kept, with its cure; the kernels are right nevertheless.
    pub problems: Vec<String>,
}

impl std::fmt::Display for DeviceKernels {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            compiled,
            loaded,
            seconds,
            ..
        } = self;
        let texts = compiled + loaded;
        write!(
            formatter,
            "{texts} texts in {seconds:.1} s since this process began: {compiled} compiled, {loaded} loaded"
        )?;
        match &self.folder {
            Some(folder) => write!(formatter, "; kept in {}", folder.display()),
            None => write!(formatter, "; not kept"),
        }
    }
}

/// What computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Device(pub(crate) Kind);

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// One of burn's devices: flex has fused forms, the others compute the reference compositions.
    Burn(burn::tensor::Device),
    /// A GPU with fused forms.
    #[cfg(feature = "cuda")]
    Gpu(&'static Gpu),
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Burn(own), Self::Burn(other)) => own == other,
            #[cfg(feature = "cuda")]
            (Self::Gpu(own), Self::Gpu(other)) => own.ordinal() == other.ordinal(),
            #[cfg(feature = "cuda")]
            _ => false,
        }
    }
}

impl Device {
    /// The CPU: burn's flex backend with the fused host forms.
    pub fn flex() -> Self {
        burn::tensor::Device::flex().into()
    }

    /// GPU number `ordinal` of those that this process sees.
    ///
    /// # Errors
    /// A driver, library, header or device that is not there.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Self, gpu::GpuError> {
        Ok(Self(Kind::Gpu(Gpu::open(ordinal)?)))
    }

    /// Whether tensors have fused host forms here.
    pub fn is_host(&self) -> bool {
        match &self.0 {
            Kind::Burn(device) => {
                let probe = burn::tensor::Tensor::<1>::zeros([1], device);
                host::Host::read(&probe.into()).is_some()
            }
            #[cfg(feature = "cuda")]
            Kind::Gpu(_) => false,
        }
    }

    /// Whether it is a GPU with fused forms.
    pub fn is_gpu(&self) -> bool {
        match &self.0 {
            Kind::Burn(_) => false,
            #[cfg(feature = "cuda")]
            Kind::Gpu(_) => true,
        }
    }

    /// Waits until a GPU has done what it was asked for; elsewhere that has happened by now.
    ///
    /// # Panics
    /// If the device fails.
    pub fn synchronize(&self) {
        #[cfg(feature = "cuda")]
        if let Kind::Gpu(gpu) = &self.0 {
            crate::cuda::done(gpu.synchronize());
        }
    }

    /// Forgets what was done here before: a GPU gets memory back that is not used any more, for libraries that allocate their own,
    /// and [`Device::peak_bytes`] tells of what comes alone.
    ///
    /// # Panics
    /// If the device fails.
    pub fn begin_anew(&self) {
        #[cfg(feature = "cuda")]
        if let Kind::Gpu(gpu) = &self.0 {
            crate::cuda::done(gpu.trim());
            gpu.forget_peak();
        }
    }

    /// The most bytes of a GPU that were in use at one time since [`Device::begin_anew`]; `None` elsewhere.
    pub fn peak_bytes(&self) -> Option<usize> {
        match &self.0 {
            Kind::Burn(_) => None,
            #[cfg(feature = "cuda")]
            Kind::Gpu(gpu) => Some(gpu.peak_bytes()),
        }
    }

    /// Bytes of a GPU that this process can still take, and all of them; `None` elsewhere.
    ///
    /// # Panics
    /// If the device fails.
    pub fn available_and_total(&self) -> Option<[u64; 2]> {
        match &self.0 {
            Kind::Burn(_) => None,
            #[cfg(feature = "cuda")]
            Kind::Gpu(gpu) => {
                let (free, total) = crate::cuda::done(gpu.available_and_total());
                Some([free as u64, total as u64])
            }
        }
    }

    /// Bytes of a GPU that this process uses; none elsewhere.
    pub fn used_bytes(&self) -> u64 {
        match &self.0 {
            Kind::Burn(_) => 0,
            #[cfg(feature = "cuda")]
            Kind::Gpu(gpu) => gpu.used_bytes() as u64,
        }
    }

    /// Whether the device still does what it is asked for. A GPU whose driver has reported a fault never does again in this process.
    pub fn answers(&self) -> bool {
        match &self.0 {
            Kind::Burn(_) => true,
            #[cfg(feature = "cuda")]
            Kind::Gpu(gpu) => gpu.synchronize().is_ok(),
        }
    }

    /// What a GPU does in `work`, by kernel and product, the longest first; nothing elsewhere. Every launch is timed, which
    /// makes `work` slower.
    ///
    /// # Panics
    /// If the device fails.
    pub fn traced<T>(&self, work: impl FnOnce() -> T) -> (T, Vec<DeviceTime>) {
        match &self.0 {
            Kind::Burn(_) => (work(), Vec::new()),
            #[cfg(feature = "cuda")]
            Kind::Gpu(gpu) => {
                gpu.trace(true);
                let made = work();
                gpu.trace(false);
                let sums = crate::cuda::done(gpu.traced()).into_iter();
                let times = sums.map(|sum| DeviceTime {
                    name: sum.name,
                    launches: sum.launches,
                    seconds: sum.seconds,
                    operations: sum.operations,
                });
                (made, times.collect())
            }
        }
    }

    /// How a GPU came to the kernels that were asked for so far; `None` elsewhere.
    pub fn kernels(&self) -> Option<DeviceKernels> {
        match &self.0 {
            Kind::Burn(_) => None,
            #[cfg(feature = "cuda")]
            Kind::Gpu(gpu) => {
                let report = gpu.kernels();
                Some(DeviceKernels {
                    compiled: report.compiled,
                    loaded: report.loaded,
                    seconds: report.seconds,
                    folder: report.folder,
                    problems: report.problems,
                })
            }
        }
    }

    /// The GPU, where this is one.
    #[cfg(feature = "cuda")]
    pub fn gpu(&self) -> Option<&'static Gpu> {
        match self.0 {
            Kind::Burn(_) => None,
            Kind::Gpu(gpu) => Some(gpu),
        }
    }

    /// The backend's name, without the index of the device: `flex`, `cuda`, or what burn calls another.
    pub fn backend(&self) -> String {
        match &self.0 {
            Kind::Burn(device) if *device == burn::tensor::Device::flex() => "flex".into(),
            Kind::Burn(device) => format!("{device:?}").to_lowercase(),
            #[cfg(feature = "cuda")]
            Kind::Gpu(_) => "cuda".into(),
        }
    }

    /// The device's class: equal classes compute equal bits. Of a GPU its model; of a CPU what `host` says.
    pub fn class(&self, host: String) -> String {
        match &self.0 {
            Kind::Burn(_) => host,
            #[cfg(feature = "cuda")]
            Kind::Gpu(gpu) => gpu.facts().name.clone(),
        }
    }
}

impl From<burn::tensor::Device> for Device {
    fn from(device: burn::tensor::Device) -> Self {
        Self(Kind::Burn(device))
    }
}

/// A tensor of `D` dimensions, row-major. Clones share their elements.
#[derive(Clone)]
pub struct Tensor<const D: usize>(pub(crate) Place<D>);

#[derive(Clone)]
#[allow(
    clippy::large_enum_variant,
    reason = "a tensor is a handle: a few hundred live at a time"
)]
pub(crate) enum Place<const D: usize> {
    Burn(burn::tensor::Tensor<D>),
    #[cfg(feature = "cuda")]
    Gpu(Array<D>),
}

/// Elements of a GPU without gaps between them.
#[cfg(feature = "cuda")]
#[derive(Clone)]
pub(crate) struct Array<const D: usize> {
    pub view: View,
    pub shape: [usize; D],
}

impl<const D: usize> From<burn::tensor::Tensor<D>> for Tensor<D> {
    fn from(tensor: burn::tensor::Tensor<D>) -> Self {
        Self(Place::Burn(tensor))
    }
}

#[cfg(feature = "cuda")]
impl<const D: usize> From<Array<D>> for Tensor<D> {
    fn from(array: Array<D>) -> Self {
        Self(Place::Gpu(array))
    }
}

impl<const D: usize> Tensor<D> {
    /// `values` in `shape` on `device`.
    ///
    /// # Panics
    /// If their numbers differ, or the device has no room.
    pub fn new(values: Vec<f32>, shape: [usize; D], device: &Device) -> Self {
        match &device.0 {
            Kind::Burn(device) => {
                burn::tensor::Tensor::from_data(TensorData::new(values, shape), device).into()
            }
            #[cfg(feature = "cuda")]
            Kind::Gpu(gpu) => {
                assert_eq!(
                    values.len(),
                    shape.iter().product::<usize>(),
                    "values of {shape:?}"
                );
                let view = crate::cuda::done(View::upload(gpu, &values, Element::F32));
                Array { view, shape }.into()
            }
        }
    }

    /// Zeros.
    ///
    /// # Panics
    /// If the device has no room.
    pub fn zeros(shape: [usize; D], device: &Device) -> Self {
        match &device.0 {
            Kind::Burn(device) => burn::tensor::Tensor::zeros(shape, device).into(),
            #[cfg(feature = "cuda")]
            Kind::Gpu(gpu) => {
                let mut zeros = Self::from(crate::cuda::empty(gpu, shape, Element::F32));
                zeros.clear();
                zeros
            }
        }
    }

    /// Sets every element to 0; in place on a GPU, for all who share them.
    ///
    /// # Panics
    /// If a device fails.
    pub fn clear(&mut self) {
        match &mut self.0 {
            Place::Burn(tensor) => *tensor = tensor.zeros_like(),
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => crate::cuda::done(array.view.clear()),
        }
    }

    /// The shape.
    pub fn dims(&self) -> [usize; D] {
        match &self.0 {
            Place::Burn(tensor) => tensor.dims(),
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => array.shape,
        }
    }

    /// What computes with it.
    pub fn device(&self) -> Device {
        match &self.0 {
            Place::Burn(tensor) => tensor.device().into(),
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => Device(Kind::Gpu(array.view.gpu())),
        }
    }

    /// The same elements in another shape of as many.
    ///
    /// # Panics
    /// If `shape` has another number of elements.
    #[must_use]
    pub fn reshape<const E: usize>(self, shape: [usize; E]) -> Tensor<E> {
        match self.0 {
            Place::Burn(tensor) => tensor.reshape(shape).into(),
            #[cfg(feature = "cuda")]
            Place::Gpu(Array { view, .. }) => {
                assert_eq!(
                    view.len(),
                    shape.iter().product::<usize>(),
                    "elements of {shape:?}"
                );
                Array { view, shape }.into()
            }
        }
    }

    /// Every element times `factor`.
    #[must_use]
    pub fn scale(self, factor: f32) -> Self {
        match self.0 {
            Place::Burn(tensor) => tensor.mul_scalar(factor).into(),
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => crate::cuda::affine(&array, factor, 0.0).into(),
        }
    }

    /// `term` added to every element.
    #[must_use]
    pub fn add_scalar(self, term: f32) -> Self {
        match self.0 {
            Place::Burn(tensor) => tensor.add_scalar(term).into(),
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => crate::cuda::affine(&array, 1.0, term).into(),
        }
    }

    /// The elements as f32, row-major; without a copy when a flex tensor is the only one to its memory. Waits for a device.
    ///
    /// # Panics
    /// If the device fails.
    pub fn into_vec(self) -> Vec<f32> {
        match self.0 {
            Place::Burn(tensor) => host::into_vec(tensor),
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => crate::cuda::done(crate::cuda::as_f32(&array).view.download()),
        }
    }

    /// burn's tensor of the same elements: itself, or a copy on burn's CUDA backend.
    pub fn burn(&self) -> burn::tensor::Tensor<D> {
        match &self.0 {
            Place::Burn(tensor) => tensor.clone(),
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => crate::cuda::to_burn(array),
        }
    }

    /// A tensor of burn's back where this one lies: what a reference composition made of its copy.
    pub(crate) fn take_back<const E: usize>(&self, made: burn::tensor::Tensor<E>) -> Tensor<E> {
        match &self.0 {
            Place::Burn(_) => made.into(),
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => crate::cuda::from_burn(array.view.gpu(), made).into(),
        }
    }

    /// The GPU's elements, where it is a GPU that has them.
    #[cfg(feature = "cuda")]
    pub(crate) fn array(&self) -> Option<&Array<D>> {
        match &self.0 {
            Place::Burn(_) => None,
            Place::Gpu(array) => Some(array),
        }
    }
}

impl<const D: usize> std::fmt::Debug for Tensor<D> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Tensor({:?}, {:?})", self.dims(), self.device())
    }
}

impl Tensor<1> {
    /// The values of bits of bf16 on `device`: bf16 on a GPU, elsewhere f32 of its values.
    ///
    /// # Panics
    /// If the device has no room.
    pub(crate) fn from_bf16(bits: &[u16], device: &Device) -> Self {
        #[cfg(feature = "cuda")]
        if let Kind::Gpu(gpu) = &device.0 {
            let view = crate::cuda::done(View::upload(gpu, bits, Element::Bf16));
            let shape = [bits.len()];
            return Array { view, shape }.into();
        }
        let mut values = vec![0.0; bits.len()];
        crate::rounding::from_bf16(bits, &mut values);
        Self::new(values, [bits.len()], device)
    }

    /// The same values in f32.
    pub(crate) fn widened(self) -> Self {
        match &self.0 {
            Place::Burn(_) => self,
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => crate::cuda::as_f32(array).into(),
        }
    }

    /// Copies `from`, of the same size and type, over these elements, for all who share them.
    ///
    /// # Panics
    /// If not both are memory of one GPU, or it fails.
    pub(crate) fn overwrite(&self, from: &Self) {
        #[cfg(feature = "cuda")]
        if let (Place::Gpu(own), Place::Gpu(from)) = (&self.0, &from.0) {
            assert_eq!(own.view.element(), from.view.element(), "types of elements");
            return crate::cuda::done(own.view.copy(&from.view));
        }
        panic!(
            "elements {:?} and {:?} lie on one GPU",
            self.dims(),
            from.dims()
        );
    }

    /// As a region of a collective, when it is memory of a GPU.
    pub(crate) fn region(&self) -> Option<collective::DeviceRegion> {
        match &self.0 {
            Place::Burn(_) => None,
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => Some(crate::cuda::done(array.view.region())),
        }
    }

    /// Elements `range`, the same memory where the place allows it: on flex and on a GPU.
    #[must_use]
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        match &self.0 {
            Place::Burn(tensor) => {
                let part = tensor.clone().narrow(0, range.start, range.len());
                part.into()
            }
            #[cfg(feature = "cuda")]
            Place::Gpu(array) => Array {
                shape: [range.len()],
                view: array.view.slice(range),
            }
            .into(),
        }
    }
}

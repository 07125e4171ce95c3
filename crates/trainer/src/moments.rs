//! Moments of an optimizer where its weights are updated: host memory, or a GPU's.

use std::borrow::Cow;

use kernels::{Device, Tensor};

/// A moment of one bucket's shard.
pub enum Moments {
    /// Updated by this crate.
    Host(Vec<f32>),
    /// Updated by a GPU; `None` holds nothing.
    Device(Option<Box<Tensor<1>>>),
}

impl Moments {
    /// `len` zeros: on `device` if it is a GPU that shall keep them.
    pub fn zeros(len: usize, device: Option<&Device>) -> Self {
        match device {
            Some(device) => Self::Device((len > 0).then(|| Box::new(Tensor::zeros([len], device)))),
            None => Self::Host(vec![0.0; len]),
        }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(values) => values.len(),
            Self::Device(values) => values.as_ref().map_or(0, |values| values.dims()[0]),
        }
    }

    /// The values; waits for a device.
    pub fn read(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Host(values) => Cow::Borrowed(values),
            Self::Device(values) => {
                let values = values.as_ref().map(|values| (**values).clone());
                Cow::Owned(values.map(Tensor::into_vec).unwrap_or_default())
            }
        }
    }

    /// Replaces the values by as many.
    ///
    /// # Panics
    /// If the numbers differ.
    pub fn write(&mut self, new: Vec<f32>) {
        assert_eq!(new.len(), self.len(), "moments of a shard");
        match self {
            Self::Host(values) => *values = new,
            Self::Device(None) => (),
            Self::Device(Some(values)) => {
                let shape = values.dims();
                **values = Tensor::new(new, shape, &values.device());
            }
        }
    }

    /// Host memory for updating in place.
    ///
    /// # Panics
    /// If a GPU has them.
    pub fn host(&mut self) -> &mut [f32] {
        match self {
            Self::Host(values) => values,
            Self::Device(_) => panic!("moments of a GPU are not updated here"),
        }
    }

    /// A GPU's memory, if it has any.
    pub fn device(&self) -> Option<&Tensor<1>> {
        match self {
            Self::Host(_) => None,
            Self::Device(values) => values.as_deref(),
        }
    }
}

impl std::fmt::Debug for Moments {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} moments", self.len())
    }
}

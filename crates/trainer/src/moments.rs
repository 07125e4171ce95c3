//! What an optimizer keeps of a bucket's shard, where its weights are updated: host memory, or a GPU's. Moments, and in the same way
//! f32 masters and sums of gradients.

use std::borrow::Cow;
use std::sync::Arc;

use checkpoint::Spares;
use kernels::{Device, Tensor, Values};

/// A moment of one bucket's shard, or its masters, or the sums of its gradient.
pub enum Moments {
    /// Updated by this crate; in a copy while a checkpoint is written from these.
    Host(Arc<Vec<f32>>),
    /// Updated by a GPU; `None` holds nothing.
    Device(Option<Box<Tensor<1>>>),
}

impl Moments {
    /// `len` zeros: on `device` if it is a GPU that shall keep them.
    pub fn zeros(len: usize, device: Option<&Device>) -> Self {
        match device {
            Some(device) => Self::Device((len > 0).then(|| Box::new(Tensor::zeros([len], device)))),
            None => Self::Host(Arc::new(vec![0.0; len])),
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

    /// The values, held for reading while updates go on: shared on the host, copied from a device.
    pub fn values(&self) -> Values {
        match self {
            Self::Host(values) => Arc::clone(values).into(),
            Self::Device(_) => Arc::new(self.read().into_owned()).into(),
        }
    }

    /// Copies values that are held elsewhere, so that an update need not; says whether they were.
    pub fn unshare(&mut self, spares: &Spares) -> bool {
        match self {
            Self::Host(values) => spares.unshare(values),
            Self::Device(_) => false,
        }
    }

    /// Replaces the values by as many.
    ///
    /// # Panics
    /// If the numbers differ.
    pub fn write(&mut self, new: Vec<f32>) {
        assert_eq!(new.len(), self.len(), "moments of a shard");
        match self {
            Self::Host(values) => *values = Arc::new(new),
            Self::Device(None) => (),
            Self::Device(Some(values)) => {
                let shape = values.dims();
                **values = Tensor::new(new, shape, &values.device());
            }
        }
    }

    /// Host memory for updating in place, of which nobody else holds any.
    ///
    /// # Panics
    /// If a GPU has them.
    pub fn host(&mut self) -> &mut [f32] {
        match self {
            Self::Host(values) => Arc::make_mut(values).as_mut_slice(),
            Self::Device(_) => panic!("moments of a GPU are not updated here"),
        }
    }

    /// A tensor's values where `others` are, without a copy where they are there.
    pub fn of(values: Tensor<1>, others: &Self) -> Self {
        match others {
            Self::Host(_) => Self::Host(Arc::new(values.into_vec())),
            Self::Device(others) => {
                let device = others.as_ref().map(|others| others.device());
                let placed = match device {
                    Some(device) if device != values.device() => {
                        let shape = values.dims();
                        Tensor::new(values.into_vec(), shape, &device)
                    }
                    _ => values,
                };
                Self::Device(Some(Box::new(placed)))
            }
        }
    }

    /// The values as a tensor of the device that has them.
    pub fn into_tensor(self) -> Tensor<1> {
        match self {
            Self::Device(Some(values)) => *values,
            Self::Device(None) => Tensor::new(Vec::new(), [0], &Device::flex()),
            Self::Host(values) => {
                let len = values.len();
                Tensor::new(Arc::unwrap_or_clone(values), [len], &Device::flex())
            }
        }
    }

    /// Moves them to the host's memory.
    pub fn park(&mut self) {
        if let Self::Device(values) = self {
            let values = values.take().map(|values| values.into_vec());
            *self = Self::Host(Arc::new(values.unwrap_or_default()));
        }
    }

    /// Whether they are a GPU's.
    pub fn is_on_device(&self) -> bool {
        matches!(self, Self::Device(_))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_are_held_stay_what_they_were_and_nothing_is_copied_for_nobody() {
        let mut moments = Moments::zeros(1000, None);
        let before = moments.host().as_ptr();
        let held = moments.values();
        assert_eq!(held.as_ptr(), before, "held without a copy");
        moments.host()[7] = 1.0;
        assert!(held.iter().all(|&value| value == 0.0));
        assert_eq!(moments.read()[7], 1.0);
        drop(held);
        let after = moments.host().as_ptr();
        let spares = Spares::default();
        assert!(!moments.unshare(&spares));
        assert_eq!(moments.host().as_ptr(), after, "nobody holds them");
        let held = moments.values();
        assert!(moments.unshare(&spares));
        assert_ne!(moments.host().as_ptr(), held.as_ptr());
        assert_eq!(held[7], 1.0);
    }
}

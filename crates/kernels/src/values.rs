//! Elements held for reading while their owner goes on: whoever writes to a flex tensor that is held like this writes to a copy.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use crate::Tensor;
use crate::host::Host;

/// Elements as they were when they were taken, on the host. Clones share them.
#[derive(Clone)]
pub struct Values {
    memory: Memory,
    range: Range<usize>,
}

#[derive(Clone)]
enum Memory {
    /// The tensor's own.
    Flex(Host),
    Vec(Arc<Vec<f32>>),
}

impl Values {
    /// The elements of `tensor`: shared on flex, copied from anywhere else.
    ///
    /// # Panics
    /// If the device fails.
    pub(crate) fn of(tensor: Tensor<1>) -> Self {
        match Host::read(&tensor) {
            Some(host) => Self {
                range: 0..host.len(),
                memory: Memory::Flex(host),
            },
            None => Arc::new(tensor.into_vec()).into(),
        }
    }

    /// Elements `range` of these.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.range.len(),
            "{range:?} of {} values",
            self.range.len()
        );
        Self {
            memory: self.memory.clone(),
            range: self.range.start + range.start..self.range.start + range.end,
        }
    }
}

impl From<Arc<Vec<f32>>> for Values {
    fn from(values: Arc<Vec<f32>>) -> Self {
        Self {
            range: 0..values.len(),
            memory: Memory::Vec(values),
        }
    }
}

impl Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let all = match &self.memory {
            Memory::Flex(host) => host,
            Memory::Vec(values) => &values[..],
        };
        &all[self.range.clone()]
    }
}

impl AsRef<[f32]> for Values {
    fn as_ref(&self) -> &[f32] {
        self
    }
}

impl fmt::Debug for Values {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} values", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Flat, Precision};

    #[test]
    fn values_stay_what_they_were_when_weights_change_and_share_memory_until_then() {
        let bucket: Vec<f32> = (0..100u8).map(f32::from).collect();
        let mut flat = Flat::from_host(vec![bucket.clone()], Precision::F32, &Device::flex());
        let held = flat.values(0, 10..90);
        let part = held.slice(5..10);
        assert_eq!(part[..], bucket[15..20]);
        let again = flat.values(0, 15..20);
        assert_eq!(part.as_ptr(), again.as_ptr(), "copied");
        drop(again);
        let mut taken = flat.take_host();
        taken[0].fill(-1.0);
        assert_ne!(taken[0][15..20].as_ptr(), part.as_ptr(), "not copied");
        flat.put_host(taken);
        assert_eq!(held[..], bucket[10..90]);
        assert_eq!(part[..], bucket[15..20]);
        assert!(flat.values(0, 0..100).iter().all(|&value| value < 0.0));
    }

    #[test]
    fn weights_that_are_held_are_copied_to_where_earlier_ones_were() {
        let buckets = vec![vec![1.0; 1000], vec![2.0; 10]];
        let mut flat = Flat::from_host(buckets, Precision::F32, &Device::flex());
        let address = |flat: &Flat| flat.values(0, 0..1000).as_ptr();
        let first = address(&flat);
        flat.unshare();
        assert_eq!(address(&flat), first, "nobody holds them");
        let held = flat.values(0, 10..20);
        flat.unshare();
        let second = address(&flat);
        assert_ne!(second, first);
        // As long as they are held their memory is not taken.
        let other = flat.values(0, 0..5);
        flat.unshare();
        let third = address(&flat);
        assert!(third != first && third != second);
        drop((held, other));
        let held = flat.values(0, 0..1000);
        flat.unshare();
        assert_eq!(address(&flat), second);
        let mut taken = flat.take_host();
        assert_eq!(taken[0].as_ptr(), second, "not copied again");
        taken[0].fill(3.0);
        flat.put_host(taken);
        assert!(held.iter().all(|value| *value == 1.0));
        assert_eq!(flat.take_host(), [vec![3.0; 1000], vec![2.0; 10]]);
    }

    #[test]
    fn weights_that_nobody_holds_are_taken_without_a_copy() {
        let bucket = vec![1.0; 1000];
        let mut flat = Flat::from_host(vec![bucket], Precision::F32, &Device::flex());
        let held = flat.values(0, 0..1000);
        let address = held.as_ptr();
        drop(held);
        assert_eq!(flat.take_host()[0].as_ptr(), address);
    }

    #[test]
    #[should_panic(expected = "4..6 of 5 values")]
    fn a_slice_beyond_the_end_is_refused() {
        let values = Values::from(Arc::new(vec![0.0; 9])).slice(1..6);
        drop(values.slice(4..6));
    }
}

//! The last rows, and warnings that come again at growing distances.

use std::collections::VecDeque;

/// The last `N` values.
#[derive(Debug)]
pub(super) struct Window<T, const N: usize>(VecDeque<T>);

impl<T, const N: usize> Default for Window<T, N> {
    fn default() -> Self {
        Self(VecDeque::with_capacity(N))
    }
}

impl<T, const N: usize> Window<T, N> {
    /// Takes a value in; whether the window is full now.
    pub(super) fn push(&mut self, value: T) -> bool {
        if self.0.len() == N {
            self.0.pop_front();
        }
        self.0.push_back(value);
        self.0.len() == N
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}

impl<const N: usize> Window<f64, N> {
    /// # Panics
    /// If it is empty.
    pub(super) fn mean(&self) -> f64 {
        assert!(!self.0.is_empty(), "a window without values has no mean");
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }
}

/// A mark that moves out of the way each time it is reached.
#[derive(Debug)]
pub(super) struct Mark {
    next: f64,
    factor: f64,
}

impl Mark {
    /// Reached at `first`, then at `factor` times what was reached.
    pub(super) fn new(first: f64, factor: f64) -> Self {
        Self {
            next: first,
            factor,
        }
    }

    /// Whether `value` has reached it; it then lies `factor` times farther.
    pub(super) fn reached(&mut self, value: f64) -> bool {
        let reached = value >= self.next;
        if reached {
            self.next = value * self.factor;
        }
        reached
    }
}

//! What is still to happen, in the order of its time, and of its coming where times are equal.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A queue in time. Items keep their place while their keys are sorted: they are large, and there are many.
pub struct Queue<T> {
    order: BinaryHeap<Reverse<(u64, u64, usize)>>,
    items: Vec<Option<T>>,
    free: Vec<usize>,
    sequence: u64,
}

impl<T> Queue<T> {
    pub fn new() -> Self {
        Self {
            order: BinaryHeap::new(),
            items: Vec::new(),
            free: Vec::new(),
            sequence: 0,
        }
    }

    pub fn push(&mut self, at_ms: u64, item: T) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.items.push(None);
            self.items.len() - 1
        });
        self.items[place] = Some(item);
        self.sequence += 1;
        self.order.push(Reverse((at_ms, self.sequence, place)));
    }

    /// The next one, and when it happens.
    pub fn pop(&mut self) -> Option<(u64, T)> {
        let Reverse((at_ms, _, place)) = self.order.pop()?;
        self.free.push(place);
        let item = self.items[place].take();
        Some((at_ms, item.expect("a place in the order is taken")))
    }
}

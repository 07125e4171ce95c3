//! All entries of several segments in ascending order, each once: where values of several segments meet, and must agree.

use std::{cmp::Reverse, collections::BinaryHeap};

use crate::{EntryKey, StoreError, segment::Segment};

/// The distinct entries of some segments. A segment that contradicts one before it is told once, and a damaged one is not
/// read further.
pub struct Distinct<'a> {
    segments: Vec<&'a Segment>,
    /// The next entry of each segment that has one: key, which segment, its place there, the bits of its value.
    next: BinaryHeap<Reverse<(EntryKey, usize, usize, u32)>>,
    /// The entry that was given last.
    last: Option<(EntryKey, f32)>,
    contradicts: Vec<bool>,
    failed: Option<StoreError>,
}

impl<'a> Distinct<'a> {
    pub fn new(segments: impl IntoIterator<Item = &'a Segment>) -> Self {
        let segments: Vec<_> = segments.into_iter().collect();
        let mut distinct = Self {
            next: BinaryHeap::with_capacity(segments.len()),
            last: None,
            contradicts: vec![false; segments.len()],
            failed: None,
            segments,
        };
        for segment in 0..distinct.segments.len() {
            distinct.advance(segment, 0);
        }
        distinct
    }

    /// Lines up the entry at `place` of `segment`, if there is one.
    fn advance(&mut self, segment: usize, place: usize) {
        if place == self.segments[segment].len() {
            return;
        }
        match self.segments[segment].entry(place) {
            Ok((key, value)) => {
                let next = (key, segment, place, value.to_bits());
                self.next.push(Reverse(next));
            }
            Err(error) => self.failed = Some(error),
        }
    }
}

impl Iterator for Distinct<'_> {
    type Item = Result<(EntryKey, f32), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(error) = self.failed.take() {
                return Some(Err(error));
            }
            let Reverse((key, segment, place, bits)) = self.next.pop()?;
            self.advance(segment, place + 1);
            let value = f32::from_bits(bits);
            let Some((_, other)) = self.last.filter(|(last, _)| *last == key) else {
                self.last = Some((key, value));
                return Some(Ok((key, value)));
            };
            if other.to_bits() != bits && !self.contradicts[segment] {
                self.contradicts[segment] = true;
                return Some(Err(
                    self.segments[segment].contradicts(place, key, value, other)
                ));
            }
        }
    }
}

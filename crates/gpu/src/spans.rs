//! Which parts of a range of memory are free: only the bookkeeping.

use std::collections::BTreeMap;

/// Sizes are rounded up to this, so that every part begins as aligned as products like it.
const STEP: usize = 512;

/// Free parts of a range that grows at its end; no two of them touch.
#[derive(Debug, Default)]
pub(crate) struct Spans {
    /// Lengths by offset.
    free: BTreeMap<usize, usize>,
    end: usize,
    used: usize,
    peak: usize,
}

impl Spans {
    /// The size that `bytes` take.
    pub fn rounded(bytes: usize) -> usize {
        bytes.max(1).next_multiple_of(STEP)
    }

    /// Takes a part of `size` bytes, the smallest that fits and of those the first; `None` if none does.
    pub fn take(&mut self, size: usize) -> Option<usize> {
        let fitting = self.free.iter().filter(|&(_, &len)| len >= size);
        let (&offset, &len) = fitting.min_by_key(|&(&offset, &len)| (len, offset))?;
        self.free.remove(&offset);
        if len > size {
            self.free.insert(offset + size, len - size);
        }
        self.used += size;
        self.peak = self.peak.max(self.used);
        Some(offset)
    }

    /// Gives a part back.
    pub fn give(&mut self, offset: usize, size: usize) {
        self.used -= size;
        self.insert(offset, size);
    }

    /// Bytes that the range must grow by before a part of `size` fits.
    pub fn missing(&self, size: usize) -> usize {
        size.saturating_sub(self.free_end())
    }

    /// Bytes that are free at the end of the range.
    pub fn free_end(&self) -> usize {
        let last = self.free.last_key_value();
        let tail = last.filter(|&(&offset, &len)| offset + len == self.end);
        tail.map_or(0, |(_, &len)| len)
    }

    /// Takes `size` free bytes off the end.
    ///
    /// # Panics
    /// If fewer are free there.
    pub fn shrink(&mut self, size: usize) {
        let free = self.free_end();
        assert!(size <= free, "{size} of {free} free bytes at the end");
        self.free.remove(&(self.end - free));
        if free > size {
            self.free.insert(self.end - free, free - size);
        }
        self.end -= size;
    }

    /// Adds `size` free bytes at the end.
    pub fn grow(&mut self, size: usize) {
        let offset = self.end;
        self.end += size;
        self.insert(offset, size);
    }

    /// Bytes of the range.
    pub fn end(&self) -> usize {
        self.end
    }

    /// Bytes that are taken.
    pub fn used(&self) -> usize {
        self.used
    }

    /// The most bytes that were taken at one time.
    pub fn peak(&self) -> usize {
        self.peak
    }

    /// From now on the peak is that of what comes.
    pub fn forget_peak(&mut self) {
        self.peak = self.used;
    }

    fn insert(&mut self, mut offset: usize, mut size: usize) {
        if let Some((&before, &len)) = self.free.range(..offset).next_back()
            && before + len == offset
        {
            self.free.remove(&before);
            (offset, size) = (before, size + len);
        }
        if let Some(len) = self.free.remove(&(offset + size)) {
            size += len;
        }
        self.free.insert(offset, size);
    }
}

#[cfg(test)]
mod tests {
    use super::Spans;

    #[test]
    fn the_tightest_part_is_taken_and_neighbours_grow_together_again() {
        let mut spans = Spans::default();
        assert_eq!(spans.take(512), None);
        spans.grow(8192);
        let [a, b, c] = [1024, 2048, 1024].map(|size| spans.take(size));
        assert_eq!((a, b, c), (Some(0), Some(1024), Some(3072)));
        assert_eq!(spans.used(), 4096);
        spans.give(1024, 2048);
        assert_eq!(spans.used(), 2048);
        // 2048 at 1024 and 4096 at the end: the tighter one.
        assert_eq!(spans.take(1536), Some(1024));
        assert_eq!(spans.take(512), Some(2560));
        for (offset, size) in [(1024, 1536), (0, 1024), (3072, 1024), (2560, 512)] {
            spans.give(offset, size);
        }
        assert_eq!(spans.free.len(), 1);
        assert_eq!(spans.take(8192), Some(0));
        assert_eq!((spans.peak(), spans.end()), (8192, 8192));
        spans.give(0, 4096);
        spans.forget_peak();
        assert_eq!(spans.peak(), 4096);
    }

    #[test]
    fn a_range_grows_by_what_its_free_end_lacks() {
        let mut spans = Spans::default();
        assert_eq!(spans.missing(1000), 1000);
        spans.grow(4096);
        let first = spans.take(1024).expect("room");
        assert_eq!(spans.missing(4096), 1024);
        spans.grow(1024);
        assert_eq!(spans.take(4096), Some(1024));
        assert_eq!(spans.missing(512), 512);
        spans.give(first, 1024);
        assert_eq!(spans.missing(2048), 2048, "the free part is not at the end");
    }

    #[test]
    fn a_range_shrinks_by_what_is_free_at_its_end() {
        let mut spans = Spans::default();
        spans.grow(4096);
        let [a, b] = [1024, 1024].map(|size| spans.take(size).expect("room"));
        assert_eq!(spans.free_end(), 2048);
        spans.shrink(512);
        assert_eq!((spans.end(), spans.free_end()), (3584, 1536));
        spans.give(a, 1024);
        spans.shrink(1536);
        assert_eq!(
            (spans.end(), spans.free_end()),
            (2048, 0),
            "what is used stays"
        );
        spans.give(b, 1024);
        spans.shrink(2048);
        assert_eq!((spans.end(), spans.free.len()), (0, 0));
        spans.grow(512);
        assert_eq!(spans.take(512), Some(0));
    }

    #[test]
    fn any_order_of_taking_and_giving_keeps_parts_apart() {
        let mut spans = Spans::default();
        spans.grow(1 << 20);
        let (mut held, mut state) = (Vec::<(usize, usize)>::new(), 7u64);
        for _ in 0..20_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let size = Spans::rounded((state >> 40) as usize % 40_000);
            if (state >> 33).is_multiple_of(2)
                && let Some(offset) = spans.take(size)
            {
                assert!(
                    held.iter()
                        .all(|&(start, len)| offset + size <= start || start + len <= offset)
                );
                held.push((offset, size));
            } else if !held.is_empty() {
                let (offset, size) = held.swap_remove((state >> 50) as usize % held.len());
                spans.give(offset, size);
            }
        }
        for (offset, size) in held {
            spans.give(offset, size);
        }
        assert_eq!(spans.take(1 << 20), Some(0));
    }
}

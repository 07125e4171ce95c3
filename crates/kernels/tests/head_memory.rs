//! The head's memory: no allocation, single or together, comes near rows × vocabulary.

#![allow(clippy::unwrap_used, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kernels::{Device, Gradients, Slot, Tensor, logprob_head, logprob_head_backward};

/// The system allocator with a count of live bytes and their maximum.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to `System` unchanged; the counters touch no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(
            LIVE.fetch_add(layout.size(), Relaxed) + layout.size(),
            Relaxed,
        );
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_head_never_holds_rows_times_vocabulary() {
    let (rows, width, vocabulary) = (2000, 8, 20_000);
    let device = Device::flex();
    let ones = |rows: usize| Tensor::new(vec![1.0; rows * width], [rows, width], &device);
    let (hidden, weight) = (ones(rows), ones(vocabulary));
    let targets = vec![7; rows];
    let slot = Slot {
        bucket: 0,
        offset: 0,
        len: vocabulary * width,
    };
    let mut gradients = Gradients::zeros(&[slot.len], &device);
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let (_, saved) = logprob_head(&hidden, &weight, &targets, None);
    logprob_head_backward(
        &vec![1.0; rows],
        &hidden,
        &weight,
        &targets,
        None,
        &saved,
        Some((&mut gradients, &slot)),
    );
    let peak = PEAK.load(Relaxed) - before;
    assert!(
        peak < rows * vocabulary * 4 / 20,
        "peak of {peak} bytes; all logits would take {}",
        rows * vocabulary * 4
    );
}

//! What the machine can do, to judge what training makes of it.

use std::time::Instant;

use crate::{Device, Tensor, linear};

/// Rows and columns of the matrices: large enough for the product's own best, small enough for a core's caches.
const SIZE: usize = 768;
/// Products of each thread: about a second.
const ROUNDS: usize = 120;

/// Operations by second that `threads` threads reach together in f32 matrix products on the host, each by itself: nothing is
/// shared and nothing waited for. Takes about a second.
///
/// # Panics
/// If a thread cannot be started.
pub fn product_speed(threads: usize) -> f64 {
    let alone = || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        pool.expect("start a thread")
    };
    let pools: Vec<_> = (0..threads).map(|_| alone()).collect();
    let matrix = Tensor::new(vec![1.0; SIZE * SIZE], [SIZE, SIZE], &Device::flex());
    let start = Instant::now();
    std::thread::scope(|scope| {
        for pool in &pools {
            scope.spawn(|| {
                pool.install(|| {
                    for _ in 0..ROUNDS {
                        std::hint::black_box(linear(&matrix, &matrix));
                    }
                });
            });
        }
    });
    let operations = 2.0 * (SIZE as f64).powi(3) * (ROUNDS * threads) as f64;
    operations / start.elapsed().as_secs_f64()
}

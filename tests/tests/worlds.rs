//! Invariant T2 through the real programs: the number of workers changes nothing but rounding, and equal worlds agree to the bit.

use tests::programs::{Run, SMALL};

/// Relative; f32 sums reorder. Measured worst: 1e-6.
const TOLERANCE: f64 = 1e-5;

fn run(workers: u32) -> Run {
    let run = Run::new(SMALL)
        .set("train.steps=20")
        .set(&format!("cluster.workers={workers}"));
    run.complete();
    run
}

#[test]
fn t2_one_two_and_three_workers_give_the_same_losses_and_the_same_world_the_same_bits() {
    let pair = run(2);
    let losses = |run: &Run| -> Vec<f64> {
        let rows = run.metrics();
        assert_eq!(rows.len(), 20);
        rows.iter()
            .map(|row| row["loss"].as_f64().expect("a loss"))
            .collect()
    };
    let expected = losses(&pair);
    let mut worst = 0f64;
    for workers in [1, 3] {
        for (step, (found, expected)) in losses(&run(workers)).iter().zip(&expected).enumerate() {
            let error = (found - expected).abs() / expected.abs();
            worst = worst.max(error);
            assert!(
                error <= TOLERANCE,
                "step {}: {found} with {workers} workers, {expected} with 2",
                step + 1
            );
        }
    }
    println!("largest relative difference {worst:.1e}");

    let again = run(2);
    assert_eq!(again.training(), pair.training());
    assert_eq!(again.rows("eval.jsonl"), pair.rows("eval.jsonl"));
    assert!(again.exported() == pair.exported(), "the exports differ");
}

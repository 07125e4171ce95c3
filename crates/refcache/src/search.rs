//! Searching among keys that are spread evenly: a guess tells nearly where one is.

/// The number of indices below `count` for which `before` holds. It must hold for none behind one for which it does not.
///
/// Takes steps of doubling length away from `guess`, so it costs the logarithm of how far off that is.
pub fn partition_near(count: usize, guess: usize, before: impl Fn(usize) -> bool) -> usize {
    // All below `low` are before; `high` and all above are not.
    let (mut low, mut high) = (guess.min(count), guess.min(count));
    let mut step = 2;
    while low > 0 && !before(low - 1) {
        high = low - 1;
        low = high.saturating_sub(step);
        step *= 2;
    }
    while high < count && before(high) {
        low = high + 1;
        high = low.saturating_add(step).min(count);
        step *= 2;
    }
    while low < high {
        let middle = low + (high - low) / 2;
        if before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_border_is_found_from_every_guess() {
        for count in 0..40 {
            for border in 0..=count {
                for guess in 0..count + 3 {
                    let found = partition_near(count, guess, |index| {
                        assert!(index < count);
                        index < border
                    });
                    assert_eq!(found, border, "of {count} from {guess}");
                }
            }
        }
    }
}

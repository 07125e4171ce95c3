//! Prompts with completions that answer others: what KTO estimates its KL divergence on (Ethayarajh et al. 2024, arXiv 2402.01306,
//! section 4.1).
//!
//! TRL shifts completions within a batch. Here the partner is the next pair of the data set whose prompt differs, so that it depends
//! on neither batches nor ranks, and no completion ever stands behind its own prompt.

use crate::dataset::Pair;
use crate::error::DataError;

/// For each of `pairs`, in order: its prompt with a completion of the next pair (after the last comes the first) whose prompt
/// differs, that pair's chosen one if it has one. The completion is `chosen`, cut to what `max_length` leaves behind the prompt,
/// at least one token; `rejected` is empty.
///
/// # Errors
/// If all prompts are equal.
pub fn mismatched(pairs: &[Pair], max_length: usize) -> Result<Vec<Pair>, DataError> {
    let count = pairs.len();
    let after = |index: usize| (index + 1) % count;
    let differs = |&index: &usize| pairs[index].prompt != pairs[after(index)].prompt;
    let Some(border) = (0..count).find(differs) else {
        return Err(DataError::OnePrompt { pairs: count });
    };
    // Backwards once around from a border: what follows a run of equal prompts is then known before the run.
    let mut mismatched = Vec::with_capacity(count);
    let mut partner = after(border);
    for step in 0..count {
        let index = (border + count - step) % count;
        if differs(&index) {
            partner = after(index);
        }
        mismatched.push(behind(&pairs[index], &pairs[partner], max_length));
    }
    mismatched.reverse();
    // The last of them is the border's.
    mismatched.rotate_left(count - 1 - border);
    Ok(mismatched)
}

fn behind(pair: &Pair, other: &Pair, max_length: usize) -> Pair {
    let completion = match other.chosen.as_slice() {
        [] => &other.rejected,
        chosen => chosen,
    };
    let room = max_length.saturating_sub(pair.prompt.len()).max(1);
    Pair {
        place: pair.place.clone(),
        prompt: pair.prompt.clone(),
        chosen: completion[..completion.len().min(room)].to_vec(),
        rejected: Vec::new(),
        scores: None,
    }
}

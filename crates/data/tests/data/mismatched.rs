//! Completions that answer another prompt.

use std::path::PathBuf;

use data::{Pair, Place, mismatched};

/// A pair whose tokens are bytes.
fn pair(prompt: &str, chosen: &str, rejected: &str) -> Pair {
    let ids = |text: &str| text.bytes().map(u32::from).collect();
    Pair {
        place: Place {
            file: PathBuf::from(prompt).into(),
            line: 1,
        },
        prompt: ids(prompt),
        chosen: ids(chosen),
        rejected: ids(rejected),
        scores: Some([1.0, 0.0]),
    }
}

#[track_caller]
fn check(pairs: &[Pair], max_length: usize, expected: &[&str]) {
    let found = mismatched(pairs, max_length).unwrap();
    assert_eq!(found.len(), pairs.len());
    let text = |ids: &[u32]| -> String { ids.iter().map(|&id| id as u8 as char).collect() };
    let completions: Vec<String> = found.iter().map(|it| text(&it.chosen)).collect();
    assert_eq!(completions, expected);
    for (found, pair) in found.iter().zip(pairs) {
        assert_eq!((&found.prompt, &found.place), (&pair.prompt, &pair.place));
        assert!(found.rejected.is_empty() && found.scores.is_none());
    }
}

#[test]
fn the_partner_is_the_next_pair_with_another_prompt() {
    let pairs = |prompts: &str| -> Vec<Pair> {
        let indexed = prompts.char_indices();
        let pair =
            |(index, prompt): (usize, char)| pair(&prompt.to_string(), &index.to_string(), "n");
        indexed.map(pair).collect()
    };
    check(&pairs("ab"), 9, &["1", "0"]);
    check(&pairs("abc"), 9, &["1", "2", "0"]);
    check(&pairs("aab"), 9, &["2", "2", "0"]);
    check(&pairs("abb"), 9, &["1", "0", "0"]);
    // Runs that go around the end.
    check(&pairs("aabaa"), 9, &["2", "2", "3", "2", "2"]);
    check(&pairs("abbba"), 9, &["1", "4", "4", "4", "1"]);
}

#[test]
fn the_partner_gives_its_chosen_completion_or_its_only_one() {
    let pairs = [pair("a", "A", "x"), pair("b", "", "B"), pair("c", "C", "")];
    check(&pairs, 9, &["B", "C", "A"]);
}

#[test]
fn completions_are_cut_to_the_length_and_keep_a_token() {
    let pairs = [pair("abc", "12345", "n"), pair("d", "1234567", "n")];
    check(&pairs, 5, &["12", "1234"]);
    check(&pairs, 3, &["1", "12"]);
    check(&pairs, 2, &["1", "1"]);
}

#[test]
fn long_runs_of_equal_prompts_take_no_longer() {
    // Quadratic work would be 4e10 comparisons.
    let mut pairs = vec![pair("a", "y", "n"); 200_000];
    pairs[100_000] = pair("b", "z", "n");
    let found = mismatched(&pairs, 9).unwrap();
    let of_b = found.iter().filter(|it| it.chosen == [u32::from(b'z')]);
    assert_eq!(of_b.count(), 199_999);
}

#[test]
fn one_prompt_has_no_partner() {
    for pairs in [1, 3] {
        let error = mismatched(&vec![pair("a", "y", "n"); pairs], 9).unwrap_err();
        let message = error.to_string();
        let expected = format!("all {pairs} pairs have the same prompt, and kto ");
        assert!(message.starts_with(&expected), "{message}");
        assert!(
            message.ends_with("or set another objective.kind"),
            "{message}"
        );
    }
}

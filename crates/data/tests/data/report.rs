//! The report counts what happened, for a person and for a program.

use data::{Bucket, DropReason};
use serde_json::json;

use crate::support::{Folder, config};

#[test]
fn the_report_counts_and_shows_what_became_of_the_rows() {
    let folder = Folder::with_tokenizer();
    let rows = [
        json!({ "prompt": "one", "chosen": "yes\n", "rejected": "no" }),
        json!({ "prompt": "this prompt is far too long", "chosen": "yes", "rejected": "no" }),
        json!({ "prompt": "two", "chosen": "same", "rejected": "same" }),
        json!({ "prompt": "three", "chosen": "a completion that goes on", "rejected": "no" }),
    ];
    let dataset = folder
        .load(rows.map(|row| row.to_string()).join("\n"), &config(16))
        .unwrap();
    let report = &dataset.report;
    assert_eq!((report.rows, report.pairs), (4, 3));
    assert_eq!(
        (report.truncated, report.identical, report.border_moved),
        (1, 1, 0)
    );
    assert_eq!(report.dropped.len(), 1);
    assert_eq!(report.dropped[0].place.line, 2);
    assert_eq!(
        report.dropped[0].reason,
        DropReason::EmptyCompletion {
            prompt_tokens: 28,
            max_length: 16
        }
    );
    assert_eq!(report.longest, 16);
    assert_eq!(
        report.tokens,
        dataset.pairs.iter().map(data::Pair::tokens).sum::<u64>()
    );
    let buckets = [(5, 8, 1), (9, 16, 5)].map(|(from, to, count)| Bucket { from, to, count });
    assert_eq!(report.lengths, buckets);

    let text = report
        .to_string()
        .replace(&format!("{}/", folder.path().display()), "");
    assert_eq!(
        text,
        "\
3 pairs of 4 rows
layout: text with its prompt in a column
59 tokens, 31 of them scored; longest sequence 16
1 pair truncated: a completion lost its end to data.max_length
1 pair with identical chosen and rejected, which teach no preference
1 row dropped:
  pairs.jsonl:2: no completion left: the prompt alone has 28 tokens and data.max_length is 16
warning: 1 of 3 (33.3 %) pairs lost the end of a completion to data.max_length; raise it, or leave long rows out
warning: 1 of 4 (25.0 %) rows gave no pair; the first of them are listed with their reasons
warning: 1 of 3 (33.3 %) pairs have the same tokens in chosen and rejected: they teach no preference and count as ties; leave \
them out
sequences by tokens of prompt + completion:
       5 – 8            1 ████████
       9 – 16           5 ████████████████████████████████████████
pairs.jsonl:1 as the model sees it, scored tokens in ⟦ ⟧:
  prompt    <s>one
  chosen   ⟦yes\\n</s>⟧
  rejected ⟦no</s>⟧
"
    );

    let json = serde_json::to_value(report).unwrap();
    assert_eq!(json["dropped"][0]["reason"]["kind"], "empty_completion");
    assert_eq!(json["dropped"][0]["place"]["line"], 2);
    assert_eq!(json["example"]["chosen"], "yes\n</s>");
}

#[test]
fn long_lists_and_texts_are_shortened_in_the_text_alone() {
    let folder = Folder::with_tokenizer();
    let mut rows =
        vec![json!({ "prompt": "p", "chosen": "c".repeat(900), "rejected": "no" }).to_string()];
    let long = json!({ "prompt": "p".repeat(1200), "chosen": "y", "rejected": "n" }).to_string();
    rows.extend(std::iter::repeat_n(long, 8));
    let report = folder.load(rows.join("\n"), &config(1024)).unwrap().report;
    let text = report.to_string();
    assert!(
        text.contains("8 rows dropped:") && text.contains("  and 3 more\n"),
        "{text}"
    );
    assert!(text.contains(" characters … "), "{text}");
    assert_eq!(report.dropped.len(), 8);
    assert_eq!(report.example.unwrap().chosen.len(), 904);
}

#[test]
fn an_empty_prompt_without_bos_is_dropped() {
    let folder = Folder::with_tokenizer();
    folder.write(
        "tokenizer_config.json",
        r#"{"eos_token": "</s>", "add_bos_token": false}"#,
    );
    let rows = r#"{"prompt": "", "chosen": "y", "rejected": "n"}
{"prompt": "p", "chosen": "y", "rejected": "n"}"#;
    let report = folder.load(rows, &config(64)).unwrap().report;
    assert_eq!(report.dropped[0].reason, DropReason::EmptyPrompt);
    assert_eq!(report.pairs, 1);
}

/// Warnings of 200 pairs, of which the first so many are long, the same on both sides, or repetitions.
fn warnings(long: usize, identical: usize, repeated: usize, dropped: usize) -> Vec<String> {
    let folder = Folder::with_tokenizer();
    let mut rows = Vec::new();
    for index in 0..200 - repeated {
        let mut rejected = format!("{index} no");
        if index >= 200 - repeated - long {
            rejected = "no ".repeat(20);
        }
        if index < identical {
            rejected = "yes".into();
        }
        let prompt = format!("prompt {index}");
        rows.push(json!({ "prompt": prompt, "chosen": "yes", "rejected": rejected }).to_string());
    }
    let again = rows[100].clone();
    rows.extend(std::iter::repeat_n(again, repeated));
    let row = json!({ "prompt": "p".repeat(40), "chosen": "y", "rejected": "n" }).to_string();
    rows.extend(std::iter::repeat_n(row, dropped));
    let report = folder.load(rows.join("\n"), &config(32)).unwrap().report;
    assert_eq!((report.pairs, report.repeated), (200, repeated));
    let said = report.warnings();
    let text = report.to_string();
    for warning in &said {
        assert!(text.contains(&format!("\nwarning: {warning}\n")), "{text}");
    }
    said
}

#[test]
fn what_is_more_than_a_curiosity_is_a_warning_with_its_numbers() {
    let none: [String; 0] = [];
    assert_eq!(warnings(0, 0, 0, 0), none);
    assert_eq!(warnings(10, 1, 2, 10), none, "all at their limits");
    let check = |said: Vec<String>, begins: &str| {
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].starts_with(begins), "{said:?}");
    };
    check(
        warnings(11, 0, 0, 0),
        "11 of 200 (5.5 %) pairs lost the end",
    );
    check(
        warnings(0, 2, 0, 0),
        "2 of 200 (1.0 %) pairs have the same tokens",
    );
    check(
        warnings(0, 0, 3, 0),
        "3 of 200 (1.5 %) pairs repeat an earlier one",
    );
    check(warnings(0, 0, 0, 11), "11 of 211 (5.2 %) rows gave no pair");
    assert_eq!(warnings(11, 2, 3, 11).len(), 4);
}

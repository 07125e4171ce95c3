//! JSON text as Python's `json.dumps` writes it: chat templates put it into prompts, so every space counts.

use std::fmt::Write;

use serde_json::Value;

/// The arguments of `json.dumps` that transformers passes on.
#[derive(Default)]
pub(crate) struct Options {
    pub indent: Option<usize>,
    pub ascii: bool,
    pub sorted: bool,
    /// Between items, and between a key and its value.
    pub separators: Option<(String, String)>,
}

/// `json.dumps(value, …)`.
pub(crate) fn dumps(value: &Value, options: &Options) -> String {
    let mut text = String::new();
    write_value(&mut text, value, options, 1);
    text
}

fn write_value(text: &mut String, value: &Value, options: &Options, depth: usize) {
    match value {
        Value::Array(items) => write_list(text, options, depth, ['[', ']'], items, |text, item| {
            write_value(text, item, options, depth + 1);
        }),
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            if options.sorted {
                fields.sort_by_key(|(key, _)| *key);
            }
            write_list(
                text,
                options,
                depth,
                ['{', '}'],
                &fields,
                |text, (key, value)| {
                    write_string(text, key, options);
                    text.push_str(options.separators.as_ref().map_or(": ", |(_, key)| key));
                    write_value(text, value, options, depth + 1);
                },
            );
        }
        Value::String(string) => write_string(text, string, options),
        Value::Number(number) if number.is_f64() => {
            text.push_str(&float(number.as_f64().expect("asked in the guard")));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => text.push_str(&value.to_string()),
    }
}

fn write_list<T>(
    text: &mut String,
    options: &Options,
    depth: usize,
    [open, close]: [char; 2],
    items: &[T],
    mut write_item: impl FnMut(&mut String, &T),
) {
    // Python drops the space after a comma when it breaks the line there.
    let default = if options.indent.is_some() { "," } else { ", " };
    let separator = options
        .separators
        .as_ref()
        .map_or(default, |(item, _)| item);
    text.push(open);
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            text.push_str(separator);
        }
        break_line(text, options, depth);
        write_item(text, item);
    }
    if !items.is_empty() {
        break_line(text, options, depth - 1);
    }
    text.push(close);
}

fn break_line(text: &mut String, options: &Options, depth: usize) {
    if let Some(indent) = options.indent {
        text.push('\n');
        text.extend(std::iter::repeat_n(' ', indent * depth));
    }
}

/// Python's `repr`: shortest digits, an exponent below 1e-4 and from 1e16 on.
fn float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("`{:e}` writes an e");
    let exponent: i32 = exponent.parse().expect("`{:e}` writes a decimal exponent");
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') {
        plain
    } else {
        plain + ".0"
    }
}

fn write_string(text: &mut String, string: &str, options: &Options) {
    text.push('"');
    for character in string.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            control if control < ' ' => escape(text, control as u16),
            wide if options.ascii && !wide.is_ascii() => {
                for unit in wide.encode_utf16(&mut [0; 2]) {
                    escape(text, *unit);
                }
            }
            plain => text.push(plain),
        }
    }
    text.push('"');
}

fn escape(text: &mut String, unit: u16) {
    write!(text, "\\u{unit:04x}").expect("a String takes every write");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    fn check(json: &str, options: &Options, expected: &str) {
        let value = serde_json::from_str(json).unwrap();
        assert_eq!(dumps(&value, options), expected);
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        // Expected texts are CPython 3's json.dumps(…, ensure_ascii=False) of the same values.
        let plain = Options::default();
        check(
            r#"{"b":1,"a":[true,null,"é\u0001\"/"],"c":{},"d":[]}"#,
            &plain,
            r#"{"b": 1, "a": [true, null, "é\u0001\"/"], "c": {}, "d": []}"#,
        );
        check(
            "[1.0,1e16,123456789012345.6,0.0001,0.00001,-1.5e-7,1e100]",
            &plain,
            "[1.0, 1e+16, 123456789012345.6, 0.0001, 1e-05, -1.5e-07, 1e+100]",
        );
    }

    #[test]
    fn the_options_of_json_dumps_are_honoured() {
        let indented = Options {
            indent: Some(2),
            sorted: true,
            ..Options::default()
        };
        check(
            r#"{"b":[1,2],"a":{}}"#,
            &indented,
            "{\n  \"a\": {},\n  \"b\": [\n    1,\n    2\n  ]\n}",
        );
        let tight = Options {
            ascii: true,
            separators: Some((",".into(), ":".into())),
            ..Options::default()
        };
        check(
            r#"{"a":["é","🙂"]}"#,
            &tight,
            r#"{"a":["\u00e9","\ud83d\ude42"]}"#,
        );
    }
}

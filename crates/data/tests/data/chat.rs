//! Chat templates render what transformers renders.

use data::{ChatTemplate, TemplateError};
use serde_json::{Value, json};

use crate::support::{read_json, shared};

fn special_tokens() -> Vec<(String, String)> {
    vec![
        ("bos_token".into(), "<s>".into()),
        ("eos_token".into(), "</s>".into()),
    ]
}

fn render(template: &str, messages: &Value) -> Result<String, TemplateError> {
    ChatTemplate::new(template, &special_tokens())?.render(messages.as_array().unwrap(), true)
}

#[test]
fn templates_render_to_the_text_or_the_error_of_transformers() {
    let Some(shared) = shared() else { return };
    let golden = read_json(&shared.join("fixtures/chat.json"));
    let tokens: Vec<(String, String)> = golden["tokens"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, token)| (name.clone(), token.as_str().unwrap().into()))
        .collect();
    let cases = golden["rendered"].as_array().unwrap();
    assert_eq!(cases.len(), 72);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let template = golden["templates"][name].as_str().unwrap();
        let messages = &golden["messages"][case["messages"].as_str().unwrap()];
        let rendered = ChatTemplate::new(template, &tokens).unwrap().render(
            messages.as_array().unwrap(),
            case["add_generation_prompt"].as_bool().unwrap(),
        );
        let expected = match case.get("error") {
            Some(error) => Err(TemplateError::Raised(error.as_str().unwrap().into())),
            None => Ok(case["text"].as_str().unwrap().to_owned()),
        };
        assert_eq!(rendered, expected, "{name} on {}", case["messages"]);
    }
}

#[test]
fn python_spellings_and_generation_tags_render() {
    let messages =
        json!([{ "role": "user", "content": " Hi ", "tool": { "b": 1.5, "a": ["é", null] } }]);
    for (template, expected) in [
        ("{{ none }} {{ true }} {{ 1 == 2 }}", "None True False"),
        (
            "{% for m in messages %}{%- generation -%} {{ m.content.strip() }}{% endgeneration %}!{% endfor %}",
            "Hi!",
        ),
        (
            "{{ messages[0].tool | tojson }}",
            r#"{"b": 1.5, "a": ["é", null]}"#,
        ),
        (
            "{{ messages[0].tool | tojson(indent=1, sort_keys=true) }}",
            "{\n \"a\": [\n  \"é\",\n  null\n ],\n \"b\": 1.5\n}",
        ),
        (
            "{{ messages[0].tool | tojson(separators=(',', ':'), ensure_ascii=true) }}",
            r#"{"b":1.5,"a":["\u00e9",null]}"#,
        ),
        ("{{ strftime_now('%d %b %Y, %-m') }}", "26 Jul 2024, 7"),
        ("{{ bos_token }}{{ pad_token }}{{ eos_token }}", "<s></s>"),
        (
            "{% if tools is none and not documents %}no tools{% endif %}",
            "no tools",
        ),
        (
            "{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}\n",
            "x\n",
        ),
    ] {
        assert_eq!(
            render(template, &messages).as_deref(),
            Ok(expected),
            "{template}"
        );
    }
}

#[test]
fn a_template_that_goes_wrong_names_its_line() {
    let messages = json!([{ "role": "user", "content": "Hi" }]);
    for (template, line) in [
        ("a\n{% if %}", 2),
        ("a\nb\n{{ messages.missing.deeper }}", 3),
    ] {
        match render(template, &messages) {
            Err(TemplateError::Invalid { line: got, .. }) => assert_eq!(got, line, "{template}"),
            other => panic!("{template}: {other:?}"),
        }
    }
}

//! Chat templates as Hugging Face writes them, rendered as transformers' jinja does. Text only; tokens are `tokenizer`'s matter.
//!
//! As in transformers: `trim_blocks`, `lstrip_blocks`, loop controls, Python's string methods, `raise_exception`, a `tojson` that
//! writes what `json.dumps(ensure_ascii=False)` writes, `{% generation %}` blocks, and every special token as a variable.
//!
//! Unlike transformers, `strftime_now` always answers with one day, 26 Jul 2024 (the date that Llama 3's template falls back to).
//! With the real date, tokens, dataset digest and every cached reference value would change overnight, and no run could resume.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State};

use crate::python_json;

const NAME: &str = "chat_template";

/// What Python's `strftime` answers for Friday 26 July 2024, midnight.
const DATE: [(char, &str); 18] = [
    ('d', "26"),
    ('e', "26"),
    ('b', "Jul"),
    ('h', "Jul"),
    ('B', "July"),
    ('m', "07"),
    ('y', "24"),
    ('Y', "2024"),
    ('a', "Fri"),
    ('A', "Friday"),
    ('j', "208"),
    ('H', "00"),
    ('I', "12"),
    ('M', "00"),
    ('S', "00"),
    ('p', "AM"),
    ('F', "2024-07-26"),
    ('%', "%"),
];

/// Why a template did not compile or render.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template's own `raise_exception`.
    #[error("{0}")]
    Raised(String),
    /// Anything else that went wrong in it.
    #[error("line {line} of the template: {reason}")]
    Invalid {
        /// Line of the template, from 1; 0 where the engine names none.
        line: usize,
        /// What the template engine said.
        reason: String,
    },
}

/// A compiled template with the tokenizer's special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
    reads_date: bool,
}

impl ChatTemplate {
    /// Compiles `source`; `special_tokens` are (variable, token), like (`bos_token`, `<s>`).
    pub fn new(source: &str, special_tokens: &[(String, String)]) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_syntax(
            minijinja::syntax::SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .expect("the default delimiters are valid"),
        );
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(write_as_python);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| failure(&error))?;
        Ok(Self {
            environment,
            special_tokens: special_tokens.to_vec(),
            reads_date: source.contains("strftime_now"),
        })
    }

    /// The conversation as text. `add_generation_prompt` ends it where the assistant's next turn starts.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let mut variables: Vec<(&str, Value)> = vec![
            ("messages", Value::from(minijinja::value::Serde(messages))),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        for (name, token) in &self.special_tokens {
            variables.push((name, Value::from(token)));
        }
        let context = Value::from_pairs(variables);
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(|error| failure(&error))
    }

    /// Whether the template asks for today's date, which this crate keeps still.
    pub fn reads_date(&self) -> bool {
        self.reads_date
    }
}

/// Marks an error as the template's own.
const RAISED: &str = "raise_exception: ";

fn raise_exception(message: &Value) -> Result<String, Error> {
    Err(Error::new(
        ErrorKind::InvalidOperation,
        format!("{RAISED}{message}"),
    ))
}

fn failure(error: &Error) -> TemplateError {
    if let Some(message) = error
        .detail()
        .and_then(|detail| detail.strip_prefix(RAISED))
    {
        return TemplateError::Raised(message.into());
    }
    TemplateError::Invalid {
        line: error.line().unwrap_or(0),
        reason: match error.detail() {
            Some(detail) => format!("{}: {detail}", error.kind()),
            None => error.kind().to_string(),
        },
    }
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let directive = characters.next();
        // `%-d` is d without its leading zero.
        let (bare, directive) = match directive {
            Some('-') => (true, characters.next()),
            other => (false, other),
        };
        let known = DATE.iter().find(|(name, _)| Some(*name) == directive);
        let Some((_, value)) = known else {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now: unknown directive in {format:?}"),
            ));
        };
        text.push_str(if bare {
            value.trim_start_matches('0')
        } else {
            value
        });
    }
    Ok(text)
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the engine hands keyword arguments over by value"
)]
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<(String, String)> = options
        .get::<Option<Vec<String>>>("separators")?
        .and_then(|pair| <[String; 2]>::try_from(pair).ok())
        .map(|[item, key]| (item, key));
    options.assert_all_used()?;
    let value = serde_json::to_value(value).map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "cannot write as JSON").with_source(error)
    })?;
    Ok(python_json::dumps(
        &value,
        &python_json::Options {
            indent,
            ascii: ascii.unwrap_or(false),
            sorted: sorted.unwrap_or(false),
            separators,
        },
    ))
}

/// Python prints `None`, `True`, `False`.
fn write_as_python(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::None => "None",
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(text).map_err(Error::from)
}

/// `{% generation %}` … `{% endgeneration %}` marks assistant tokens for trainers that mask by template; the text between is
/// rendered as it is, which `{% if true %}` does with the same whitespace control.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let inner = &rest[start + 2..start + length];
        let name = inner.trim_matches(['-', '+']).trim();
        let replaced = match name {
            "generation" => inner.replacen(name, "if true", 1),
            "endgeneration" => inner.replacen(name, "endif", 1),
            _ => inner.into(),
        };
        text.push_str(&rest[..start + 2]);
        text.push_str(&replaced);
        text.push_str("%}");
        rest = &rest[start + length + 2..];
    }
    text.push_str(rest);
    text
}

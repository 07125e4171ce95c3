//! Layers of values, each of which remembers where it came from, merged through the `config` crate.
//!
//! Every leaf carries its origin (`FILE:LINE`, `preset NAME:LINE`, the variable's name, `--set KEY`), so that a refusal can name it. What the
//! keys mean is not known here.

use std::path::{Path, PathBuf};

use config::{Map, Source, Value, ValueKind};
use toml::{Spanned, de::DeTable, de::DeValue};

use super::{presets, refusal::ConfigError};

pub(super) const ENVIRONMENT_PREFIX: &str = "CALDPO__";
/// What holds where no layer says otherwise.
pub(super) const DEFAULTS: &str = include_str!("defaults.toml");

/// What a configuration is made of; later kinds win over earlier ones, and all over the preset that they name and the built-in
/// defaults.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Texts that came some other way than as files, with the name of their origin; files win over them.
    pub texts: Vec<(String, String)>,
    /// `--config` files, the last one wins.
    pub files: Vec<PathBuf>,
    /// Environment variables; those that begin with `CALDPO__` count.
    pub environment: Vec<(String, String)>,
    /// `--set` arguments, `section.key=value`, the last one wins.
    pub set: Vec<String>,
}

/// The merged values with their origins.
#[derive(Clone, Debug)]
pub(crate) struct Merged(Value);

/// One source's values.
#[derive(Clone, Debug)]
struct Layer(Map<String, Value>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        Ok(self.0.clone())
    }
}

/// Reads and merges all sources over the defaults, and over the preset that they name.
pub(crate) fn merge(sources: &Sources) -> Result<Merged, ConfigError> {
    let given = given_layers(sources)?;
    let defaults = parse_document(DEFAULTS, None).expect("the built-in defaults are valid TOML");
    let preset = presets::layer(&merge_layers(given.clone())?)?;
    let below = [Some(defaults), preset].into_iter().flatten().map(Layer);
    merge_layers(below.chain(given).collect())
}

fn merge_layers(layers: Vec<Layer>) -> Result<Merged, ConfigError> {
    let mut builder = config::Config::builder();
    for layer in layers {
        builder = builder.add_source(layer);
    }
    let merged = builder.build();
    let merged = merged.map_err(|error| ConfigError::Merge(error.to_string()))?;
    Ok(Merged(merged.cache))
}

/// What somebody gave, the strongest last.
fn given_layers(sources: &Sources) -> Result<Vec<Layer>, ConfigError> {
    let mut layers = Vec::new();
    for (name, text) in &sources.texts {
        let values = parse_document(text, Some(Path::new(name)));
        let values = values.map_err(|reason| ConfigError::Syntax {
            path: name.into(),
            reason,
        })?;
        layers.push(Layer(values));
    }
    for path in &sources.files {
        layers.push(file_layer(path)?);
    }
    for (name, text) in &sources.environment {
        if let Some(key) = name.strip_prefix(ENVIRONMENT_PREFIX) {
            let path: Vec<String> = key.split("__").map(str::to_lowercase).collect();
            if path.iter().any(String::is_empty) {
                return Err(ConfigError::Refused {
                    key: name.clone(),
                    origin: Some("the environment".into()),
                    reason: "expected CALDPO__SECTION__KEY, two underscores between names".into(),
                });
            }
            layers.push(single(&path, text, name));
        }
    }
    for argument in &sources.set {
        let (path, text) = split_set(argument)?;
        let origin = format!("--set {}", path.join("."));
        layers.push(single(&path, text, &origin));
    }
    Ok(layers)
}

impl Merged {
    /// These values alone.
    pub(super) fn of(values: Map<String, Value>) -> Self {
        Self(values.into())
    }

    /// The value at a dotted path of names.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        let mut value = &self.0;
        for name in key.split('.') {
            let ValueKind::Table(table) = &value.kind else {
                return None;
            };
            value = table.get(name)?;
        }
        Some(value)
    }

    /// Where the value at a dotted path came from; for a table, where its first value came from.
    pub(crate) fn origin(&self, key: &str) -> Option<String> {
        let mut value = &self.0;
        for name in key.split('.') {
            let ValueKind::Table(table) = &value.kind else {
                break;
            };
            // A list's values came together, so that the list's origin is that of `name[1]` too.
            let (name, _) = name.split_once('[').unwrap_or((name, ""));
            value = table.get(name)?;
        }
        first_origin(value)
    }

    /// Dotted paths of all values that somebody gave or a preset has, sorted: those that are not built-in defaults.
    pub(crate) fn given(&self) -> Vec<String> {
        let mut given = Vec::new();
        collect_given("", &self.0, &mut given);
        given.sort();
        given
    }

    /// All values.
    pub(crate) fn table(&self) -> toml::Table {
        match plain(&self.0) {
            Some(toml::Value::Table(table)) => table,
            _ => toml::Table::new(),
        }
    }
}

fn collect_given(path: &str, value: &Value, given: &mut Vec<String>) {
    match &value.kind {
        ValueKind::Table(table) => {
            for (name, value) in table {
                let path = match path {
                    "" => name.clone(),
                    _ => format!("{path}.{name}"),
                };
                collect_given(&path, value, given);
            }
        }
        _ if first_origin(value).is_some() => given.push(path.to_owned()),
        _ => {}
    }
}

fn first_origin(value: &Value) -> Option<String> {
    match &value.kind {
        ValueKind::Table(table) => {
            // The map has no order of its own; sorted, so that the same mistake reads the same twice.
            let mut names: Vec<_> = table.keys().collect();
            names.sort();
            names.iter().find_map(|name| first_origin(&table[*name]))
        }
        ValueKind::Array(values) => values.iter().find_map(first_origin),
        _ => value.origin().map(str::to_owned),
    }
}

fn file_layer(path: &Path) -> Result<Layer, ConfigError> {
    let bytes = std::fs::read(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    let text = String::from_utf8(bytes).map_err(|error| ConfigError::Encoding {
        path: path.to_owned(),
        offset: error.utf8_error().valid_up_to(),
        byte: error.as_bytes()[error.utf8_error().valid_up_to()],
    })?;
    let values = parse_document(&text, Some(path)).map_err(|reason| ConfigError::Syntax {
        path: path.to_owned(),
        reason,
    })?;
    Ok(Layer(values))
}

pub(super) fn parse_document(
    text: &str,
    path: Option<&Path>,
) -> Result<Map<String, Value>, String> {
    let document = DeTable::parse(text).map_err(|error| error.to_string())?;
    let origin = |offset: usize| {
        let line = text[..offset].matches('\n').count() + 1;
        path.map(|path| format!("{}:{line}", path.display()))
    };
    from_table(document.into_inner(), &origin)
}

/// One value at `path`; text that is not a TOML value is a string.
fn single(path: &[String], text: &str, origin: &str) -> Layer {
    let at = |_| Some(origin.to_owned());
    let parsed = DeValue::parse(text).ok();
    let mut value = parsed
        .and_then(|value| from_value(value, &at).ok())
        .unwrap_or_else(|| Value::new(Some(&origin.to_owned()), text));
    let (first, rest) = path.split_first().expect("a key has at least one name");
    for name in rest.iter().rev() {
        value = Value::from(Map::from_iter([(name.clone(), value)]));
    }
    Layer(Map::from_iter([(first.clone(), value)]))
}

fn split_set(argument: &str) -> Result<(Vec<String>, &str), ConfigError> {
    let refused = |reason: &str| ConfigError::Set {
        argument: argument.to_owned(),
        reason: reason.to_owned(),
    };
    let (key, text) = argument
        .split_once('=')
        .ok_or_else(|| refused("expected section.key=value"))?;
    let path: Vec<String> = key.trim().split('.').map(str::to_owned).collect();
    if path.len() < 2 || path.iter().any(String::is_empty) {
        return Err(refused(
            "expected section.key=value, such as objective.beta=0.05",
        ));
    }
    Ok((path, text.trim()))
}

type OriginAt<'a> = dyn Fn(usize) -> Option<String> + 'a;

fn from_table(table: DeTable<'_>, origin: &OriginAt) -> Result<Map<String, Value>, String> {
    let entries = table.into_iter().map(|(key, value)| {
        let value = from_value(value, origin)?;
        Ok((key.into_inner().into_owned(), value))
    });
    entries.collect()
}

fn from_value(value: Spanned<DeValue<'_>>, origin: &OriginAt) -> Result<Value, String> {
    let place = origin(value.span().start);
    let place = place.as_ref();
    Ok(match value.into_inner() {
        DeValue::String(text) => Value::new(place, text.into_owned()),
        DeValue::Boolean(value) => Value::new(place, value),
        DeValue::Integer(number) => {
            let parsed = i64::from_str_radix(number.as_str(), number.radix());
            Value::new(place, parsed.map_err(|error| format!("{number}: {error}"))?)
        }
        DeValue::Float(number) => {
            let parsed = number.as_str().parse::<f64>();
            Value::new(place, parsed.map_err(|error| format!("{number}: {error}"))?)
        }
        // No key takes a date; as text it is refused by its key with the place.
        DeValue::Datetime(date) => Value::new(place, date.to_string()),
        DeValue::Array(values) => {
            let values: Result<Vec<_>, _> = values
                .into_iter()
                .map(|value| from_value(value, origin))
                .collect();
            Value::new(place, values?)
        }
        DeValue::Table(table) => Value::new(place, from_table(table, origin)?),
    })
}

/// The value without its origins. `None` for what TOML has no word for.
fn plain(value: &Value) -> Option<toml::Value> {
    Some(match &value.kind {
        ValueKind::Nil => return None,
        ValueKind::Boolean(value) => (*value).into(),
        ValueKind::I64(value) => (*value).into(),
        ValueKind::U64(value) => i64::try_from(*value).ok()?.into(),
        ValueKind::I128(value) => i64::try_from(*value).ok()?.into(),
        ValueKind::U128(value) => i64::try_from(*value).ok()?.into(),
        ValueKind::Float(value) => (*value).into(),
        ValueKind::String(value) => value.clone().into(),
        ValueKind::Array(values) => {
            toml::Value::Array(values.iter().filter_map(plain).collect::<Vec<_>>())
        }
        ValueKind::Table(values) => {
            let entries = values
                .iter()
                .filter_map(|(name, value)| Some((name.clone(), plain(value)?)));
            toml::Value::Table(entries.collect())
        }
    })
}

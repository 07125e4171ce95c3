//! The JSON Schema of a configuration file, for editors: every key with its description, type, range and default.
//!
//! Made from the types that the sections are read into, so that it cannot name other keys than they do; the coordinator's own
//! defaults come from `defaults.toml`. Nothing is required at the top, since a file is one layer of several and may leave
//! whole sections to another. What depends on two keys at once is mostly not said here; loading says it.

use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};
use spec::Spec;
use toml::Table;

use super::layers::DEFAULTS;
use super::sections::{CheckpointSection, ClusterSection, JobSection};
use super::service::SecuritySection;
use super::telemetry::TelemetrySection;

/// The schema, draft 2020-12.
///
/// # Panics
/// If a section is not a struct, which only a mistake in its declaration can cause.
pub fn schema() -> Value {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let mut generator = settings.into_generator();
    let own = [
        ("job", section::<JobSection>(&mut generator)),
        ("checkpoint", section::<CheckpointSection>(&mut generator)),
        ("cluster", section::<ClusterSection>(&mut generator)),
        ("telemetry", section::<TelemetrySection>(&mut generator)),
        ("security", section::<SecuritySection>(&mut generator)),
    ];
    let mut training = generator.into_root_schema_for::<Spec>().to_value();
    let training = training["properties"].take();

    let mut properties = Map::new();
    let [job, others @ ..] = own;
    properties.insert(job.0.into(), job.1);
    if let Value::Object(training) = training {
        properties.extend(training);
    }
    properties["train"]["properties"]["skipped_steps_max"] = json!({
        "description": "Consecutive steps with a non-finite gradient that end the job.",
        "type": "integer",
        "minimum": 1,
    });
    properties.extend(others.map(|(name, section)| (name.into(), section)));
    properties["cluster"]["properties"]["state"] = json!({
        "description": "Folder of the queue's journal; only of `coordinator --cluster`. Default `cluster`.",
        "type": "string",
    });
    add_defaults(&mut properties);

    let mut schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "caldpo configuration",
        "description": "A job of the caldpo coordinator, as in `coordinator FILE.toml`; or, of `coordinator --cluster`, cluster.listen, cluster.state, [security] and telemetry.metrics_listen.",
        "type": "object",
        "properties": properties,
    });
    tidy(&mut schema);
    schema
}

/// A section all of whose keys have defaults.
fn section<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    let mut schema = generator.subschema_for::<T>().to_value();
    if let Some(section) = schema.as_object_mut() {
        section.remove("required");
    }
    schema
}

/// Enters the built-in defaults of the coordinator's own keys.
fn add_defaults(sections: &mut Map<String, Value>) {
    let defaults: Table = DEFAULTS
        .parse()
        .expect("the built-in defaults are valid TOML");
    for (section, keys) in &defaults {
        for (key, value) in keys.as_table().into_iter().flatten() {
            let value = serde_json::to_value(value).expect("TOML values are JSON values");
            sections[section]["properties"][key]["default"] = value;
        }
    }
}

/// Makes the schema one of TOML files: no nulls, no integer widths, no keys but the named ones; texts run on.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Array(values) => values.iter_mut().for_each(tidy),
        Value::Object(object) => tidy_object(object),
        _ => {}
    }
}

fn tidy_object(object: &mut Map<String, Value>) {
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|kind| kind != "null");
        if let [kind] = &types[..] {
            object["type"] = kind.clone();
        }
    }
    if let Some(Value::Array(choices)) = object.get_mut("enum") {
        choices.retain(|choice| !choice.is_null());
    }
    // Widths of Rust's numbers, which no validator of TOML knows.
    if object
        .get("type")
        .is_some_and(|kind| kind == "integer" || kind == "number")
    {
        object.remove("format");
    }
    // An empty list is what a missing key means; where the key must not be empty it is no default to offer.
    let empty = object.get("default") == Some(&json!([])) && object.contains_key("minItems");
    if empty || object.get("default").is_some_and(Value::is_null) {
        object.remove("default");
    }
    if let Some(Value::String(text)) = object.get_mut("description") {
        *text = text.replace('\n', " ");
    }
    if object.contains_key("properties") {
        object.insert("additionalProperties".into(), false.into());
    }
    for (key, value) in object.iter_mut() {
        // A default is a value, not a schema.
        if key != "default" {
            tidy(value);
        }
    }
}

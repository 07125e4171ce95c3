//! Values of published runs, by name: a layer between the built-in defaults and all that somebody gives.
//!
//! Like defaults, they make way: of two keys that exclude each other the given one stays, and another objective than the
//! preset's takes none of its parameters.

use config::{Map, Value, ValueKind};

use super::{
    layers::{Merged, parse_document},
    refusal::{ConfigError, unknown},
    sections::refuse,
};

/// The key that names one.
const KEY: &str = "job.preset";

/// Names and values. A name says what it reproduces.
const PRESETS: [(&str, &str); 3] = [
    (
        "cal-dpo-zephyr",
        include_str!("presets/cal-dpo-zephyr.toml"),
    ),
    ("cal-dpo-hh", include_str!("presets/cal-dpo-hh.toml")),
    ("cal-dpo-tldr", include_str!("presets/cal-dpo-tldr.toml")),
];

/// Their names.
pub(super) const NAMES: [&str; PRESETS.len()] = {
    let mut names = [""; PRESETS.len()];
    let mut index = 0;
    while index < PRESETS.len() {
        names[index] = PRESETS[index].0;
        index += 1;
    }
    names
};

/// Keys of which only one may be set.
const ALTERNATIVES: [(&str, &str); 4] = [
    ("schedule.warmup_ratio", "schedule.warmup_steps"),
    ("schedule.warmup_steps", "schedule.warmup_ratio"),
    ("train.epochs", "train.steps"),
    ("train.steps", "train.epochs"),
];

/// The values of the preset that `given` asks for, as far as `given` leaves room for them.
pub(super) fn layer(given: &Merged) -> Result<Option<Map<String, Value>>, ConfigError> {
    let Some(value) = given.value(KEY) else {
        return Ok(None);
    };
    let ValueKind::String(name) = &value.kind else {
        let reason = format!("expected the name of a preset: {}", NAMES.join(", "));
        return Err(refuse(given, KEY, reason));
    };
    let Some((_, text)) = PRESETS.iter().find(|(known, _)| known == name) else {
        return Err(refuse(given, KEY, unknown("preset", name, &NAMES)));
    };
    let origin = format!("preset {name}");
    let mut values =
        parse_document(text, Some(origin.as_ref())).expect("the built-in presets are valid TOML");
    for (key, instead) in ALTERNATIVES {
        if given.value(instead).is_some() {
            remove(&mut values, key);
        }
    }
    let objective = |values: &Merged| values.value("objective.kind").map(|it| it.kind.clone());
    let own = objective(&Merged::of(values.clone()));
    if objective(given).is_some_and(|given| Some(given) != own) {
        values.remove("objective");
    }
    Ok(Some(values))
}

fn remove(values: &mut Map<String, Value>, key: &str) {
    let (section, key) = key.split_once('.').expect("a key has a section");
    let section = values.get_mut(section).map(|section| &mut section.kind);
    if let Some(ValueKind::Table(section)) = section {
        section.remove(key);
    }
}

//! Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): W x becomes W x + s·B A x with A `[rank, in]` and B
//! `[out, rank]`, and only A and B are trained. On disk they are PEFT's: adapter_config.json and adapter_model.safetensors,
//! with its tensor names.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::layout::{BUCKET_ELEMENTS_MAX, Module, Names, Stage, modules};
use crate::random::adapter_weights;
use crate::{Layout, ModelConfig, ModelError, weights};

/// How the names of A and B end, and what PEFT puts before a module's.
pub(crate) const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const PREFIX: &str = "base_model.model.";

/// An adapter as data.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// α; what B A adds is multiplied by α/rank.
    pub alpha: f64,
    /// Multiply by α/√rank instead (rsLoRA; Kalajdzievski 2023, arXiv 2312.03732).
    pub rank_stabilized: bool,
    /// Where it goes.
    pub targets: Targets,
}

/// The modules that get an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every linear map of every block.
    AllLinear,
    /// Those with one of these names, such as `q_proj`, in every block.
    Named(Vec<String>),
}

impl Lora {
    /// The factor s on what B A adds.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha
            / if self.rank_stabilized {
                rank.sqrt()
            } else {
                rank
            }
    }

    /// Where every parameter of the adapter lies, for the model that `config` describes.
    ///
    /// # Errors
    /// A target that names no linear map of the model.
    pub fn layout(&self, config: &ModelConfig) -> Result<Layout, ModelError> {
        self.check(config)?;
        let block = Names::of(config.family).block;
        let tensors = config
            .attention
            .iter()
            .enumerate()
            .flat_map(|(index, plan)| {
                let modules = modules(config, plan).into_iter();
                let adapted = modules.filter(|module| self.adapts(module));
                adapted.flat_map(move |module| {
                    let name = format!("{PREFIX}{block}.{index}.{}", module.name);
                    let columns = module.columns.unwrap_or_default();
                    let stage = Stage::Block(index);
                    [
                        (stage, format!("{name}{A}"), vec![self.rank, columns]),
                        (stage, format!("{name}{B}"), vec![module.out, self.rank]),
                    ]
                })
            });
        Ok(Layout::of(tensors, BUCKET_ELEMENTS_MAX))
    }

    /// Fresh weights for the model that `config` describes: with them it computes what it does without an adapter.
    ///
    /// # Errors
    /// As [`Lora::layout`].
    pub fn fresh(&self, config: &ModelConfig, seed: u64) -> Result<Vec<Vec<f32>>, ModelError> {
        Ok(adapter_weights(&self.layout(config)?, seed))
    }

    /// adapter_config.json as PEFT reads it, for the model called `base`.
    ///
    /// # Errors
    /// As [`Lora::layout`].
    pub fn to_peft(&self, config: &ModelConfig, base: &str) -> Result<Value, ModelError> {
        self.check(config)?;
        let targets: Vec<&str> = linear_names(config)
            .into_iter()
            .filter(|name| self.targets.name(name))
            .map(last)
            .collect();
        Ok(json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": true,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "use_rslora": self.rank_stabilized,
            "use_dora": false,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "target_modules": targets,
            "modules_to_save": null,
        }))
    }

    /// Whether `module` gets an adapter.
    pub(crate) fn adapts(&self, module: &Module) -> bool {
        module.columns.is_some() && self.targets.name(module.name)
    }

    fn check(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let Targets::Named(names) = &self.targets else {
            return Ok(());
        };
        let known = linear_names(config);
        let refuse = |reason: String| {
            let known = known.iter().map(|name| last(name)).collect();
            Err(ModelError::Targets { reason, known })
        };
        if names.is_empty() {
            return refuse("names no module".into());
        }
        for name in names {
            if !known.iter().any(|known| is_named(known, name)) {
                return refuse(format!("`{name}` is no linear map of its blocks"));
            }
        }
        Ok(())
    }
}

impl Targets {
    fn name(&self, module: &str) -> bool {
        match self {
            Self::AllLinear => true,
            Self::Named(names) => names.iter().any(|name| is_named(module, name)),
        }
    }
}

/// PEFT's rule: the name, or its end after a dot.
fn is_named(module: &str, name: &str) -> bool {
    let before = module.strip_suffix(name);
    !name.is_empty() && before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn last(name: &'static str) -> &'static str {
    name.rsplit('.').next().unwrap_or(name)
}

/// The linear maps of a block.
fn linear_names(config: &ModelConfig) -> Vec<&'static str> {
    let modules = modules(config, &config.attention[0]).into_iter();
    let linear = modules.filter(|module| module.columns.is_some());
    linear.map(|module| module.name).collect()
}

/// Reads an adapter in PEFT's format for the model that `config` describes: what it is, and its weights.
///
/// # Errors
/// Files that cannot be read, an adapter of another kind, or weights that do not fit the model.
pub fn load_adapter(dir: &Path, config: &ModelConfig) -> Result<(Lora, Vec<Vec<f32>>), ModelError> {
    let path = dir.join("adapter_config.json");
    let text = fs::read_to_string(&path).map_err(|source| ModelError::Read {
        path: path.clone(),
        source,
    })?;
    let lora = from_peft(&text).map_err(|(key, reason)| ModelError::Config {
        path: path.clone(),
        key,
        reason,
    })?;
    let layout = lora.layout(config)?;
    let weights = weights::load_adapter(&dir.join("adapter_model.safetensors"), &layout)?;
    Ok((lora, weights))
}

/// Keys of adapter_config.json that say nothing about what the adapter computes.
const SILENT: [&str; 10] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
    "runtime_config",
];

/// Reads the text of an adapter_config.json. What it asks for beyond plain LoRA is refused by its key.
fn from_peft(text: &str) -> Result<Lora, (String, String)> {
    let refuse = |key: &str, reason: &str| Err((key.to_owned(), reason.to_owned()));
    let config: Map<String, Value> = match serde_json::from_str(text) {
        Ok(Value::Object(config)) => config,
        Ok(_) => return refuse("adapter_config.json", "an object is needed"),
        Err(error) => return refuse("adapter_config.json", &format!("not JSON: {error}")),
    };
    let found = |key: &str| config.get(key).unwrap_or(&Value::Null);
    if found("peft_type") != "LORA" {
        let reason = format!(
            "only \"LORA\" adapters are read, got {}",
            found("peft_type")
        );
        return refuse("peft_type", &reason);
    }
    let Some(rank) = found("r")
        .as_u64()
        .filter(|rank| (1..=RANK_MAX).contains(rank))
    else {
        return refuse(
            "r",
            &format!("must be from 1 to {RANK_MAX}, got {}", found("r")),
        );
    };
    let Some(alpha) = found("lora_alpha").as_f64().filter(|alpha| *alpha > 0.0) else {
        let reason = format!("must be a number above 0, got {}", found("lora_alpha"));
        return refuse("lora_alpha", &reason);
    };
    let targets = match found("target_modules") {
        Value::String(name) if name == "all-linear" => Targets::AllLinear,
        Value::Array(names) if names.iter().all(Value::is_string) => {
            let names = names.iter().filter_map(Value::as_str);
            Targets::Named(names.map(str::to_owned).collect())
        }
        other => {
            let reason = format!("must be \"all-linear\" or a list of module names, got {other}");
            return refuse("target_modules", &reason);
        }
    };
    let rank_stabilized = match found("use_rslora") {
        Value::Bool(value) => *value,
        Value::Null => false,
        other => return refuse("use_rslora", &format!("must be true or false, got {other}")),
    };
    // Some ways to begin change the base model too, and these weights are not beside it.
    match found("init_lora_weights") {
        Value::Null | Value::Bool(_) => {}
        Value::String(way) if way == "gaussian" => {}
        other => {
            let reason = format!("{other} changes the model's own weights, which are not here");
            return refuse("init_lora_weights", &reason);
        }
    }
    let read = [
        "init_lora_weights",
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "use_rslora",
    ];
    for (key, value) in &config {
        let known = SILENT.contains(&key.as_str()) || read.contains(&key.as_str());
        let off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(entries) => entries.is_empty(),
            Value::Array(entries) => entries.is_empty(),
            Value::String(value) => key == "bias" && value == "none",
            Value::Number(_) | Value::Bool(true) => false,
        };
        if !known && !off {
            return refuse(
                key,
                &format!("{value} is not supported; plain LoRA leaves it out"),
            );
        }
    }
    Ok(Lora {
        rank: rank as usize,
        alpha,
        rank_stabilized,
        targets,
    })
}

/// Largest rank that is read or trained: beyond it an adapter is larger than most weights that it stands beside.
const RANK_MAX: u64 = 4096;

//! `[adapter]` made real: which adapter a run trains, and its weights at the start.

use std::path::Path;

use model::{Lora, Model, ModelConfig, Targets, load_adapter};
use spec::{AdapterSection, AdapterTargets, Spec};

use crate::error::TrainError;

/// Puts the adapter of the folder `path`, if one is named, on `model`.
pub(crate) fn put_on(path: Option<&Path>, model: &mut Model) -> Result<(), TrainError> {
    if let Some(path) = path {
        let (lora, weights) = load_adapter(path, model.config())?;
        Adapter { lora, weights }.put_on(model)?;
    }
    Ok(())
}

/// An adapter that is not on a model yet.
pub(crate) struct Adapter {
    pub lora: Lora,
    pub weights: Vec<Vec<f32>>,
}

impl Adapter {
    /// The adapter that `spec` asks for, as it starts; `None` where the model's own weights are trained.
    ///
    /// # Errors
    /// Targets that the model does not have; an adapter that cannot be read.
    pub fn of(spec: &Spec, config: &ModelConfig) -> Result<Option<Self>, TrainError> {
        let Some(section) = &spec.adapter else {
            return Ok(None);
        };
        let (lora, weights) = match section {
            AdapterSection::Lora {
                rank,
                alpha,
                rank_stabilized,
                targets,
                dropout: _,
            } => {
                let lora = Lora {
                    rank: *rank,
                    alpha: *alpha,
                    rank_stabilized: *rank_stabilized,
                    targets: match targets {
                        AdapterTargets::All(_) => Targets::AllLinear,
                        AdapterTargets::Named(names) => Targets::Named(names.clone()),
                    },
                };
                let weights = lora.fresh(config, spec.seed)?;
                (lora, weights)
            }
            AdapterSection::Peft { path } => load_adapter(path, config)?,
        };
        Ok(Some(Self { lora, weights }))
    }

    /// Puts it on; the model's own weights are frozen then.
    pub fn put_on(self, model: &mut Model) -> Result<(), TrainError> {
        Ok(model.adapt(&self.lora, self.weights)?)
    }

    /// BLAKE3 of what it is and of its weights.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("caldpo adapter 1 {:?}", self.lora).as_bytes());
        for values in &self.weights {
            for value in values {
                hasher.update(&value.to_le_bytes());
            }
        }
        *hasher.finalize().as_bytes()
    }
}

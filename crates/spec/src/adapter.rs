//! `[adapter]`: what is trained in place of the model's own weights.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::sections::{SpecError, refuse};

/// Largest rank: beyond it an adapter is larger than most weights that it stands beside.
const RANK_MAX: usize = 4096;

/// `[adapter]`. The model's own weights stay as they are, and the reference is the model without the adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum AdapterSection {
    /// A fresh low-rank adapter (LoRA, arXiv 2106.09685): W x becomes W x + s·B A x, where B begins as 0.
    Lora {
        /// Rows of A and columns of B. Default 16.
        #[serde(default = "default_rank")]
        #[schemars(range(min = 1, max = 4096))]
        rank: usize,
        /// α of s = α/rank. Default 32.
        #[serde(default = "default_alpha")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        alpha: f64,
        /// s = α/√rank instead (rsLoRA, arXiv 2312.03732). Default false.
        #[serde(default)]
        rank_stabilized: bool,
        /// `"all-linear"`, every linear map of every block, or a list of names such as `["q_proj", "v_proj"]`. Default
        /// `"all-linear"`.
        #[serde(default = "default_targets")]
        targets: AdapterTargets,
        /// Only 0: nothing is dropped in training. Default 0.
        #[serde(default)]
        #[schemars(range(min = 0, max = 0))]
        dropout: f64,
    },
    /// An adapter that is there already, in PEFT's format, trained on from where it stands.
    Peft {
        /// Folder with adapter_config.json and adapter_model.safetensors.
        path: PathBuf,
    },
}

/// The modules that get an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum AdapterTargets {
    /// `"all-linear"`.
    All(AllLinear),
    /// Names, or their ends after a dot.
    Named(Vec<String>),
}

/// The one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AllLinear {
    /// Every linear map of every block.
    #[serde(rename = "all-linear")]
    AllLinear,
}

impl AdapterSection {
    /// Its kind in configurations.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Lora { .. } => "lora",
            Self::Peft { .. } => "peft",
        }
    }

    pub(crate) fn validate(&self) -> Result<(), SpecError> {
        match self {
            Self::Lora {
                rank,
                alpha,
                targets,
                dropout,
                ..
            } => {
                if !(1..=RANK_MAX).contains(rank) {
                    let reason = format!("must be from 1 to {RANK_MAX}, got {rank}");
                    return refuse("adapter.rank", &reason);
                }
                if !(alpha.is_finite() && *alpha > 0.0) {
                    let reason = format!("must be a finite number above 0, got {alpha}");
                    return refuse("adapter.alpha", &reason);
                }
                if *dropout != 0.0 {
                    let reason = format!(
                        "must be 0, got {dropout}: with dropout the policy at the start would not be the reference"
                    );
                    return refuse("adapter.dropout", &reason);
                }
                if *targets == AdapterTargets::Named(Vec::new()) {
                    return refuse(
                        "adapter.targets",
                        "is empty; name modules such as \"q_proj\", or say \"all-linear\"",
                    );
                }
                Ok(())
            }
            Self::Peft { path } if path.as_os_str().is_empty() => {
                refuse("adapter.path", "is empty; name a folder")
            }
            Self::Peft { .. } => Ok(()),
        }
    }
}

fn default_rank() -> usize {
    16
}

fn default_alpha() -> f64 {
    32.0
}

fn default_targets() -> AdapterTargets {
    AdapterTargets::All(AllLinear::AllLinear)
}

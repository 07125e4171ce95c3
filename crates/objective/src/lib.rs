//! Cal-DPO and its relatives as functions of sequence log-probs, with their derivatives.
//!
//! Everything is f64: near a calibration loss of 500 000 the spacing of f32 is 0.03. Values depend on log-probs and counts
//! alone; models, packs, devices and files are not here.
//!
//! Notation of the whole crate: r = log π − log π_ref summed over a completion's tokens, in nats; r_w of the chosen
//! completion, r_l of the rejected one; D = r_w − r_l; t = 1/(2β); n = a completion's tokens; ε = label smoothing.
//!
//! | kind | reference | pairs | calibrated | by length |
//! |---|---|---|---|---|
//! | `cal_dpo` | yes | yes | yes | no |
//! | `dpo`, also with `label_smoothing` (cDPO) and `divergence` (f-DPO) | yes | yes | no | no |
//! | `robust`, `exo_pair`, `dpop`, `discopop` | yes | yes | no | no |
//! | `slic` | yes | yes | with `calibration_weight` | no |
//! | `ipo` | yes | yes | with `calibration_weight` | with `length_normalized` |
//! | `sigmoid_norm` | yes | yes | no | yes |
//! | `sppo_hard` | yes | yes | it is calibration alone | no |
//! | `nca_pair`, `apo_zero`, `apo_down` | yes | yes | no: each side on its own, but without a target | no |
//! | `cpo` | no | yes | no | its NLL |
//! | `simpo` | no | yes | no | yes |
//! | `orpo` | no | yes | no | yes |
//! | `sft` | no | no | no | yes |
//! | `mix` | if a part has one | if a part needs them | if a part is | as its parts |
//!
//! "Calibrated" means that r_w and r_l have targets of their own, so that the chosen completion cannot lose probability for
//! the sake of the margin. Objectives that need a batch's statistics (`kto`, `bco_pair`, `aot`) are absent: a share of the loss
//! here depends on its pair and on global counts alone.

mod about;
mod config;
mod curves;
mod divergence;
mod loss;
mod rewards;

pub use about::About;
pub use config::{ConfigError, Divergence, ObjectiveConfig, Parameter, Part, Targets};
pub use loss::{GlobalCounts, PairLogps, PairLoss, pair_loss};
pub use rewards::{RewardStatistics, reward_statistics};

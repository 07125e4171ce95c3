//! Cal-DPO and its relatives as functions of sequence log-probs, with their derivatives.
//!
//! Everything is f64: near a calibration loss of 500 000 the spacing of f32 is 0.03. Values depend on log-probs, counts
//! and scores alone; models, packs, devices and files are not here.
//!
//! Notation of the whole crate: r = log π − log π_ref summed over a completion's tokens, in nats; r_w of the chosen
//! completion, r_l of the rejected one; D = r_w − r_l; t = 1/(2β); n = a completion's tokens; ε = label smoothing.
//!
//! | kind | reference | pairs | unpaired rows | calibrated | by length | beside its pair |
//! |---|---|---|---|---|---|---|
//! | `cal_dpo` | yes | yes | no | yes | no | with `score_scale`, scores |
//! | `dpo`, also with `label_smoothing` (cDPO) and `divergence` (f-DPO) | yes | yes | no | no | no | – |
//! | `robust`, `exo_pair`, `dpop`, `discopop` | yes | yes | no | no | no | – |
//! | `slic` | yes | yes | no | with `calibration_weight` | no | – |
//! | `ipo` | yes | yes | no | with `calibration_weight` | with `length_normalized` | – |
//! | `sigmoid_norm` | yes | yes | no | no | yes | – |
//! | `sppo_hard` | yes | yes | no | it is calibration alone | no | – |
//! | `nca_pair`, `apo_zero`, `apo_down` | yes | yes | no | no: each side on its own, but without a target | no | – |
//! | `bco_pair` | yes | yes | no | no: as `nca_pair` | no | all pairs' mean r, and the batches' before |
//! | `aot` | yes | yes | no | no | no | all pairs' margins, sorted |
//! | `aot_unpaired` | yes | yes | no | no | no | all pairs' r, sorted |
//! | `kto` | yes | no | yes | no: as `nca_pair` | no | mean r of mismatched completions |
//! | `cpo` | no | yes | no | no | its NLL | – |
//! | `simpo` | no | yes | no | no | yes | – |
//! | `orpo` | no | yes | no | no | yes | – |
//! | `sft` | no | no | yes: its chosen | no | yes | – |
//! | `mix` | if a part has one | if a part needs them | if all parts take them | if a part is | as its parts | what its parts read |
//!
//! "Calibrated" means that r_w and r_l have targets of their own, so that the chosen completion cannot lose probability for
//! the sake of the margin. Scores are part of a
//! [`PairLogps`]; what an objective reads of other rows and steps is in [`BatchStatistics`], made once a step.

mod about;
mod batch;
mod config;
mod curves;
mod divergence;
mod loss;
mod rewards;

pub use about::About;
pub use batch::{BatchStatistics, RunningMean};
pub use config::{ConfigError, Divergence, ObjectiveConfig, Parameter, Part, Sides, Targets};
pub use loss::{GlobalCounts, PairLogps, PairLoss, pair_loss};
pub use rewards::{RewardStatistics, reward_statistics};

//! Cal-DPO and its relatives as functions of sequence log-probs, with their derivatives.
//!
//! Everything is f64: near a calibration loss of 500 000 the spacing of f32 is 0.03. Values depend on log-probs and counts
//! alone; models, packs, devices and files are not here.
//!
//! Notation of the whole crate: r = log π − log π_ref summed over a completion's tokens, in nats; r_w of the chosen
//! completion, r_l of the rejected one; D = r_w − r_l; t = 1/(2β).

mod config;
mod loss;
mod rewards;

pub use config::{ConfigError, ObjectiveConfig};
pub use loss::{GlobalCounts, PairLogps, PairLoss, pair_loss};
pub use rewards::{RewardStatistics, reward_statistics};

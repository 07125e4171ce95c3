//! The update rules on one contiguous piece of parameters, element by element: AdamW (Loshchilov & Hutter 2019, arXiv
//! 1711.05101, Algorithm 2) and RMSprop as torch has it. Which piece, whose gradient and when are the caller's. Values and
//! moments are f32, factors are computed in f64.

use kernels::UpdateRule;
use spec::{OptimizerKind, OptimizerSection};

/// The factors of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    clip: f32,
    /// As decayed parameters have it.
    rule: UpdateRule,
}

/// Whether the rule of `section` has a first moment; all have a second one.
pub fn has_first_moment(section: &OptimizerSection) -> bool {
    match section.kind {
        OptimizerKind::AdamW { .. } => true,
        OptimizerKind::RmsProp { .. } => false,
    }
}

impl Update {
    /// Factors of update number `updates` (from 1) for a gradient of norm `grad_norm`.
    pub fn new(
        section: &OptimizerSection,
        learning_rate: f64,
        grad_norm: f64,
        updates: u64,
    ) -> Self {
        assert!(updates > 0, "updates count from 1");
        let rule = match section.kind {
            OptimizerKind::AdamW {
                betas: [first, second],
                eps,
                weight_decay,
            } => {
                let exponent = i32::try_from(updates).unwrap_or(i32::MAX);
                UpdateRule::AdamW {
                    keep_first: first as f32,
                    add_first: (1.0 - first) as f32,
                    keep_second: second as f32,
                    add_second: (1.0 - second) as f32,
                    step_size: (learning_rate / (1.0 - first.powi(exponent))) as f32,
                    root_correction: (1.0 / (1.0 - second.powi(exponent)).sqrt()) as f32,
                    eps: eps as f32,
                    keep_weight: (1.0 - learning_rate * weight_decay) as f32,
                }
            }
            OptimizerKind::RmsProp { alpha, eps } => UpdateRule::RmsProp {
                keep: alpha as f32,
                add: (1.0 - alpha) as f32,
                step_size: learning_rate as f32,
                eps: eps as f32,
            },
        };
        Self {
            clip: clip_scale(section.max_grad_norm, grad_norm) as f32,
            rule,
        }
    }

    /// What the gradient is multiplied by.
    pub fn clip(&self) -> f32 {
        self.clip
    }

    /// The rule for parameters that are decayed, or are not.
    pub fn rule(&self, decay: bool) -> UpdateRule {
        let mut rule = self.rule;
        if let UpdateRule::AdamW { keep_weight, .. } = &mut rule
            && !decay
        {
            *keep_weight = 1.0;
        }
        rule
    }

    /// Moves `weights` and their moments; all slices have one length, but `first` is empty for a rule without it. `decay` for
    /// parameters that are decayed.
    pub fn apply(
        &self,
        weights: &mut [f32],
        first: &mut [f32],
        second: &mut [f32],
        gradient: &[f32],
        decay: bool,
    ) {
        let len = weights.len();
        let lens = [second.len(), gradient.len()];
        assert_eq!(lens, [len; 2], "moments and gradient of {len} weights");
        let clip = self.clip;
        let moved = weights.iter_mut().zip(gradient);
        match self.rule(decay) {
            UpdateRule::AdamW {
                keep_first,
                add_first,
                keep_second,
                add_second,
                step_size,
                root_correction,
                eps,
                keep_weight,
            } => {
                assert_eq!(first.len(), len, "first moments of {len} weights");
                for ((weight, gradient), (first, second)) in moved.zip(first.iter_mut().zip(second))
                {
                    let gradient = gradient * clip;
                    *first = keep_first * *first + add_first * gradient;
                    *second = keep_second * *second + add_second * gradient * gradient;
                    let root = second.sqrt() * root_correction + eps;
                    *weight = *weight * keep_weight - step_size * (*first / root);
                }
            }
            UpdateRule::RmsProp {
                keep,
                add,
                step_size,
                eps,
            } => {
                for ((weight, gradient), second) in moved.zip(second) {
                    let gradient = gradient * clip;
                    *second = keep * *second + add * gradient * gradient;
                    *weight -= step_size * (gradient / (second.sqrt() + eps));
                }
            }
        }
    }
}

/// Factor that brings a gradient of norm `norm` down to `max_norm` (0: no clipping), as torch's `clip_grad_norm_`.
pub fn clip_scale(max_norm: f64, norm: f64) -> f64 {
    if max_norm == 0.0 {
        return 1.0;
    }
    (max_norm / (norm + 1e-6)).min(1.0)
}

#[cfg(test)]
mod tests {
    use spec::{OptimizerKind, OptimizerSection};

    use super::{Update, clip_scale, has_first_moment};

    fn adamw(weight_decay: f64) -> OptimizerSection {
        OptimizerSection {
            kind: OptimizerKind::AdamW {
                betas: [0.9, 0.999],
                eps: 1e-8,
                weight_decay,
            },
            max_grad_norm: 0.0,
            ..OptimizerSection::default()
        }
    }

    /// Algorithm 2 in f64, written out.
    fn oracle(
        section: &OptimizerSection,
        gradients: &[f64],
        learning_rate: f64,
        decay: bool,
    ) -> f64 {
        let OptimizerKind::AdamW {
            betas,
            eps,
            weight_decay,
        } = section.kind
        else {
            panic!("AdamW");
        };
        let (mut weight, mut first, mut second) = (0.7, 0.0, 0.0);
        for (index, gradient) in gradients.iter().enumerate() {
            let time = index as i32 + 1;
            if decay {
                weight -= learning_rate * weight_decay * weight;
            }
            first = betas[0] * first + (1.0 - betas[0]) * gradient;
            second = betas[1] * second + (1.0 - betas[1]) * gradient * gradient;
            let first_hat = first / (1.0 - betas[0].powi(time));
            let second_hat: f64 = second / (1.0 - betas[1].powi(time));
            weight -= learning_rate * first_hat / (second_hat.sqrt() + eps);
        }
        weight
    }

    fn run(section: &OptimizerSection, gradients: &[f64], rate: f64, decay: bool) -> f64 {
        let (mut weight, mut first, mut second) = ([0.7f32], vec![], [0.0]);
        if has_first_moment(section) {
            first.push(0.0);
        }
        for (index, &gradient) in gradients.iter().enumerate() {
            Update::new(section, rate, gradient.abs(), index as u64 + 1).apply(
                &mut weight,
                &mut first,
                &mut second,
                &[gradient as f32],
                decay,
            );
        }
        f64::from(weight[0])
    }

    #[test]
    fn updates_follow_the_papers_algorithm_with_and_without_decay() {
        let section = adamw(0.1);
        let gradients = [0.3, -1.2, 5e-4, 7.0, 0.0, -0.01];
        for decay in [true, false] {
            let (got, expected) = (
                run(&section, &gradients, 0.01, decay),
                oracle(&section, &gradients, 0.01, decay),
            );
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
    }

    #[test]
    fn the_first_update_moves_by_the_rate_whatever_the_gradients_size() {
        let section = adamw(0.0);
        for gradient in [1e-3, 1.0, 1e6] {
            let moved = 0.7 - run(&section, &[gradient], 1e-3, true);
            assert!((moved - 1e-3).abs() < 2e-7, "{gradient} moved {moved}");
        }
    }

    #[test]
    fn rmsprop_is_that_of_torch() {
        // torch 2.15 in f64: RMSprop(lr=0.01, alpha=0.99, eps=1e-8) from 0.7.
        let section = OptimizerSection {
            kind: OptimizerKind::RmsProp {
                alpha: 0.99,
                eps: 1e-8,
            },
            max_grad_norm: 0.0,
            ..OptimizerSection::default()
        };
        let gradients = [0.3, -1.2, 5e-4, 7.0, 0.0, -0.01];
        let found = run(&section, &gradients, 0.01, true);
        assert!((found - 0.598_639_375_246_847_7).abs() < 1e-6, "{found}");
    }

    #[test]
    fn a_norm_above_the_bound_is_scaled_down_to_it_and_one_below_is_left() {
        assert!((clip_scale(1.0, 1201.58) * 1201.58 - 1.0).abs() < 1e-8);
        assert_eq!(clip_scale(1.0, 0.5), 1.0);
        assert_eq!(clip_scale(0.0, 1e9), 1.0);
    }
}

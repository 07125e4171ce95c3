//! How far two sets of weights lie apart, tensor by tensor: of two checkpoints, whatever world sizes wrote them, or of a
//! checkpoint and a Hugging Face model directory. Streamed; only differences are kept.

use std::path::Path;

use serde::Serialize;

use crate::{
    digest::Watch,
    export::{Base, ExportError, has_weights},
    parts::{Kind, TensorSpec},
    read::{Checkpoint, CheckpointError},
};

/// Elements read of either side at once.
const BLOCK: usize = 256 << 10;

/// Sums kept apart, so that the additions of one need not wait for each other.
const LANES: usize = 8;

/// One of the two that are compared.
pub struct Side(Source);

enum Source {
    Checkpoint(Box<Checkpoint>),
    Model(Base),
}

/// Why nothing was compared.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// A checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A model directory cannot be used.
    #[error(transparent)]
    Model(#[from] ExportError),
}

/// Two tensors, or two sums over tensors. Norms are Euclidean, in f64; what is not finite is null in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Difference {
    /// Number of elements.
    pub elements: u64,
    /// Elements whose bits differ.
    pub different: u64,
    /// Norm of the first side.
    pub norm_a: f64,
    /// Norm of the second side.
    pub norm_b: f64,
    /// Norm of the difference. Elements with the same bits differ by 0, also where they are not finite.
    pub norm_difference: f64,
    /// Norm of the difference by that of the first side; 0 where both are 0.
    pub relative: f64,
    /// Largest absolute difference of an element; NaN where one is not a number.
    pub max_abs: f64,
}

/// A tensor that both sides have in one shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    /// Its name.
    pub tensor: String,
    /// Which of its values.
    pub kind: Kind,
    /// How they differ.
    #[serde(flatten)]
    pub difference: Difference,
}

/// All tensors that were compared, of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Total {
    /// Which of their values.
    pub kind: Kind,
    /// How they differ together.
    #[serde(flatten)]
    pub difference: Difference,
}

/// A tensor that the sides have in different shapes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shapes {
    /// Its name.
    pub tensor: String,
    /// Its shape on the first side.
    pub a: Vec<usize>,
    /// Its shape on the second side.
    pub b: Vec<usize>,
}

/// What [`diff`] found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Diff {
    /// Whether both sides have the same tensors with the same bits.
    pub identical: bool,
    /// Of each kind, over all tensors that were compared.
    pub totals: Vec<Total>,
    /// By kind, in the first side's order.
    pub tensors: Vec<Compared>,
    /// Names that only the first side has; a moment that it alone has as `first moment of all tensors`.
    pub only_a: Vec<String>,
    /// The same of the second side.
    pub only_b: Vec<String>,
    /// Tensors that could not be compared.
    pub shapes: Vec<Shapes>,
}

impl Side {
    /// The checkpoint in the folder `path`, or the model in it.
    pub fn open(path: &Path) -> Result<Self, DiffError> {
        if has_weights(path) {
            return Ok(Self(Source::Model(Base::open(path)?)));
        }
        Ok(Self(Source::Checkpoint(Box::new(Checkpoint::open(path)?))))
    }

    /// Bytes that [`diff`] reads of it, as f32.
    pub fn bytes(&self, kinds: &[Kind]) -> u64 {
        let elements: usize = self.specs().iter().filter_map(TensorSpec::elements).sum();
        let kinds = kinds.iter().filter(|&&kind| self.has(kind)).count();
        (4 * elements * kinds) as u64
    }

    /// The checkpoint, where it is one.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.0 {
            Source::Checkpoint(checkpoint) => Some(checkpoint),
            Source::Model(_) => None,
        }
    }

    fn specs(&self) -> &[TensorSpec] {
        match &self.0 {
            Source::Checkpoint(checkpoint) => &checkpoint.manifest().tensors,
            Source::Model(base) => base.specs(),
        }
    }

    fn has(&self, kind: Kind) -> bool {
        match &self.0 {
            Source::Checkpoint(checkpoint) => checkpoint.has(kind),
            Source::Model(_) => kind == Kind::Weight,
        }
    }

    fn find(&self, tensor: &str) -> Option<&TensorSpec> {
        self.specs().iter().find(|spec| spec.name == tensor)
    }

    fn read(
        &self,
        tensor: &str,
        kind: Kind,
        start: usize,
        out: &mut [f32],
    ) -> Result<(), DiffError> {
        match &self.0 {
            Source::Checkpoint(checkpoint) => Ok(checkpoint.read(tensor, kind, start, out)?),
            Source::Model(base) => Ok(base.read(tensor, start, out)?),
        }
    }
}

/// Compares the tensors of `a` and `b` in `kinds`. `watch` hears of the bytes of either side.
pub fn diff(a: &Side, b: &Side, kinds: &[Kind], watch: Watch<'_>) -> Result<Diff, DiffError> {
    let mut diff = Diff::default();
    let mut both = Vec::new();
    for spec in a.specs() {
        match b.find(&spec.name) {
            None => diff.only_a.push(spec.name.clone()),
            Some(other) if other.shape == spec.shape => both.push(spec),
            Some(other) => diff.shapes.push(Shapes {
                tensor: spec.name.clone(),
                a: spec.shape.clone(),
                b: other.shape.clone(),
            }),
        }
    }
    let only = b.specs().iter().filter(|spec| a.find(&spec.name).is_none());
    diff.only_b.extend(only.map(|spec| spec.name.clone()));
    for &kind in kinds {
        let all = || format!("{kind} of all tensors");
        match (a.has(kind), b.has(kind)) {
            (true, true) => {}
            (true, false) => {
                diff.only_a.push(all());
                continue;
            }
            (false, true) => {
                diff.only_b.push(all());
                continue;
            }
            (false, false) => continue,
        }
        let mut total = Sums::default();
        for spec in &both {
            let sums = compare(a, b, spec, kind, watch)?;
            total.merge(&sums);
            diff.tensors.push(Compared {
                tensor: spec.name.clone(),
                kind,
                difference: sums.finish(),
            });
        }
        diff.totals.push(Total {
            kind,
            difference: total.finish(),
        });
    }
    let same = diff.totals.iter().all(|it| it.difference.different == 0);
    diff.identical =
        same && diff.only_a.is_empty() && diff.only_b.is_empty() && diff.shapes.is_empty();
    Ok(diff)
}

fn compare(
    a: &Side,
    b: &Side,
    spec: &TensorSpec,
    kind: Kind,
    watch: Watch<'_>,
) -> Result<Sums, DiffError> {
    let len = spec.elements().unwrap_or(0);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    let mut sums = Sums::default();
    for start in (0..len).step_by(BLOCK) {
        let count = BLOCK.min(len - start);
        for (side, values) in [(a, &mut left), (b, &mut right)] {
            values.resize(count, 0.0);
            side.read(&spec.name, kind, start, values)?;
            watch(4 * count as u64);
        }
        sums.add(&left, &right);
    }
    Ok(sums)
}

/// Squares and extremes, lane by lane: element i of a tensor belongs to lane i mod [`LANES`].
#[derive(Default)]
struct Sums {
    elements: u64,
    different: u64,
    a: [f64; LANES],
    b: [f64; LANES],
    difference: [f64; LANES],
    max_abs: [f64; LANES],
}

impl Sums {
    /// Takes in values, a multiple of [`LANES`] except at a tensor's end.
    fn add(&mut self, a: &[f32], b: &[f32]) {
        self.elements += a.len() as u64;
        for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
            for (lane, (&a, &b)) in a.iter().zip(b).enumerate() {
                let same = a.to_bits() == b.to_bits();
                let (a, b) = (f64::from(a), f64::from(b));
                let difference = if same { 0.0 } else { a - b };
                self.different += u64::from(!same);
                self.a[lane] += a * a;
                self.b[lane] += b * b;
                self.difference[lane] += difference * difference;
                self.max_abs[lane] = larger(self.max_abs[lane], difference.abs());
            }
        }
    }

    fn merge(&mut self, other: &Self) {
        self.elements += other.elements;
        self.different += other.different;
        for lane in 0..LANES {
            self.a[lane] += other.a[lane];
            self.b[lane] += other.b[lane];
            self.difference[lane] += other.difference[lane];
            self.max_abs[lane] = larger(self.max_abs[lane], other.max_abs[lane]);
        }
    }

    fn finish(&self) -> Difference {
        let norm = |lanes: &[f64; LANES]| lanes.iter().sum::<f64>().sqrt();
        let (norm_a, norm_difference) = (norm(&self.a), norm(&self.difference));
        Difference {
            elements: self.elements,
            different: self.different,
            norm_a,
            norm_b: norm(&self.b),
            norm_difference,
            relative: if norm_difference == 0.0 {
                0.0
            } else {
                norm_difference / norm_a
            },
            max_abs: self.max_abs.into_iter().fold(0.0, larger),
        }
    }
}

/// The larger one; not a number if one is not. (`f64::max` would drop it.)
fn larger(one: f64, other: f64) -> f64 {
    if other > one || other.is_nan() {
        other
    } else {
        one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(a: &[f32], b: &[f32], expected: Difference) {
        // In one piece and, lanes being what they are, in two.
        for cut in [0, LANES.min(a.len())] {
            let mut sums = Sums::default();
            sums.add(&a[..cut], &b[..cut]);
            sums.add(&a[cut..], &b[cut..]);
            let found = format!("{:?}", sums.finish());
            assert_eq!(found, format!("{expected:?}"), "{a:?} and {b:?}");
        }
    }

    #[test]
    fn norms_are_those_of_the_definition() {
        let (mut a, mut b) = ([0.0; 9], [0.0; 9]);
        (a[0], a[8]) = (3.0, 4.0);
        (b[0], b[8]) = (-5.0, 12.0);
        let expected = Difference {
            elements: 9,
            different: 2,
            norm_a: 5.0,
            norm_b: 13.0,
            norm_difference: 128f64.sqrt(),
            relative: 128f64.sqrt() / 5.0,
            max_abs: 8.0,
        };
        check(&a, &b, expected);
        check(&[], &[], Difference::default());
        // From nothing to something: no ratio.
        let expected = Difference {
            elements: 1,
            different: 1,
            norm_b: 2.0,
            norm_difference: 2.0,
            relative: f64::INFINITY,
            max_abs: 2.0,
            ..Difference::default()
        };
        check(&[0.0], &[2.0], expected);
    }

    #[test]
    fn what_is_not_finite_is_seen_and_equal_to_itself() {
        let mut sums = Sums::default();
        sums.add(&[f32::NAN, f32::INFINITY], &[f32::NAN, f32::INFINITY]);
        let found = sums.finish();
        assert_eq!(
            (found.different, found.norm_difference, found.max_abs),
            (0, 0.0, 0.0)
        );
        let mut sums = Sums::default();
        sums.add(&[1.0, f32::NAN, 1.0], &[1.0, 2.0, 5.0]);
        let found = sums.finish();
        assert_eq!(found.different, 2);
        assert!(found.max_abs.is_nan() && found.norm_difference.is_nan());
        // The two zeros are different bits and no distance apart.
        let mut sums = Sums::default();
        sums.add(&[0.0], &[-0.0]);
        let found = sums.finish();
        assert_eq!(
            (found.different, found.norm_difference, found.relative),
            (1, 0.0, 0.0)
        );
    }
}

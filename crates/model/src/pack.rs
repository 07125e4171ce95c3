//! Packs: several pairs in one row of tokens, each prompt once with both completions behind it. Which pairs share a pack
//! is decided elsewhere (`data`); here is only the arrangement and what the log-prob head has to predict.

/// One pair's rows: its prompt and its two completions (chosen, rejected); either completion may be empty.
pub use kernels::AttentionSegment as Segment;

/// The tokens of one pair.
#[derive(Clone, Copy, Debug)]
pub struct PairTokens<'a> {
    /// Shared prompt.
    pub prompt: &'a [u32],
    /// Preferred completion.
    pub chosen: &'a [u32],
    /// Other completion; empty for plain completion data.
    pub rejected: &'a [u32],
}

/// Tokens, their positions, and the pairs they belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pack {
    /// Token ids: per pair the prompt, the chosen and the rejected completion.
    pub tokens: Vec<u32>,
    /// Position of every token: 0.. over the prompt, and both completions go on at its end.
    pub positions: Vec<u32>,
    /// One per pair, in the order given.
    pub segments: Vec<Segment>,
}

impl Pack {
    /// Arranges `pairs` one after another.
    pub fn new<'a>(pairs: impl IntoIterator<Item = PairTokens<'a>>) -> Self {
        let mut pack = Self {
            tokens: Vec::new(),
            positions: Vec::new(),
            segments: Vec::new(),
        };
        for pair in pairs {
            let prompt = pack.extend(pair.prompt, 0);
            let chosen = pack.extend(pair.chosen, pair.prompt.len());
            let rejected = pack.extend(pair.rejected, pair.prompt.len());
            pack.segments.push(Segment {
                prompt,
                completions: [chosen, rejected],
            });
        }
        pack
    }

    /// Number of tokens, prompts counted once.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    fn extend(&mut self, tokens: &[u32], position: usize) -> std::ops::Range<usize> {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions
            .extend((position..position + tokens.len()).map(|position| position as u32));
        start..self.tokens.len()
    }

    /// What the head predicts: for every completion token the row whose hidden state predicts it.
    ///
    /// A completion's first token is predicted by the prompt's last row, which therefore occurs twice in a pair. With an
    /// empty prompt nothing precedes a first token, so it is not scored.
    pub(crate) fn predictions(&self) -> Predictions {
        let mut predictions = Predictions {
            rows: Vec::new(),
            targets: Vec::new(),
            counts: Vec::new(),
        };
        for segment in &self.segments {
            let counts = segment.completions.clone().map(|completion| {
                let before = predictions.rows.len();
                for row in completion.clone() {
                    let previous = if row > completion.start {
                        Some(row - 1)
                    } else {
                        segment.prompt.clone().next_back()
                    };
                    if let Some(previous) = previous {
                        predictions.rows.push(previous);
                        predictions.targets.push(self.tokens[row]);
                    }
                }
                (predictions.rows.len() - before) as u32
            });
            predictions.counts.push(counts);
        }
        predictions
    }
}

/// Rows that predict, the tokens they predict, and how many belong to each completion, in order.
pub(crate) struct Predictions {
    pub rows: Vec<usize>,
    pub targets: Vec<u32>,
    pub counts: Vec<[u32; 2]>,
}

impl Predictions {
    /// Spreads one value per completion over its predictions.
    pub fn spread(&self, values: &[[f32; 2]]) -> Vec<f32> {
        assert_eq!(values.len(), self.counts.len(), "derivatives and segments");
        let pairs = values.iter().zip(&self.counts);
        pairs
            .flat_map(|(values, counts)| values.iter().zip(counts))
            .flat_map(|(&value, &count)| std::iter::repeat_n(value, count as usize))
            .collect()
    }

    /// Cuts one value per prediction into one list per completion.
    pub fn split(&self, values: &[f32]) -> Vec<[Vec<f32>; 2]> {
        assert_eq!(values.len(), self.rows.len(), "values and predictions");
        let mut rest = values;
        self.counts
            .iter()
            .map(|counts| {
                counts.map(|count| {
                    let (own, others) = rest.split_at(count as usize);
                    rest = others;
                    own.to_vec()
                })
            })
            .collect()
    }
}

//! The table, and what has to be known to read it.

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use protocol::{RunFacts, Statistics};

use super::run::{Measured, Run};
use crate::{
    numbers::{grouped, plain, signed},
    objective::Objective,
};

/// How a digest is read from what the workers found.
type Digest = fn(&RunFacts) -> &str;

/// Where there is nothing to show.
const NOTHING: &str = "–";

/// A loss term is a column where it is the same function for all runs: only then are its numbers comparable.
const TERMS: [Term; 2] = [
    Term {
        name: "pairwise loss",
        same: Objective::same_pairwise,
        of: |row| row.loss_pairwise,
    },
    Term {
        name: "calibration loss",
        same: Objective::same_calibration,
        of: |row| row.loss_calibration,
    },
];

struct Term {
    name: &'static str,
    same: fn(&Objective, &Objective) -> bool,
    of: fn(&Statistics) -> f64,
}

impl Term {
    fn is_comparable(&self, runs: &[Run]) -> bool {
        let first = &runs[0].objective;
        runs.iter().all(|run| (self.same)(first, &run.objective))
    }
}

/// A row per run. There is at least one.
pub(super) fn table(runs: &[Run]) -> Table {
    let terms: Vec<_> = TERMS
        .iter()
        .filter(|term| term.is_comparable(runs))
        .collect();
    let mut header = vec![
        "run",
        "objective",
        "steps",
        "measured",
        "chosen",
        "rejected",
        "margin",
        "accuracy",
    ];
    header.extend(terms.iter().map(|term| term.name));
    header.extend(["pairs/s", "outcome"]);
    let outcome = header.len() - 1;

    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(header);
    for run in runs {
        table.add_row(cells(run, &terms));
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        if (4..outcome).contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn cells(run: &Run, terms: &[&Term]) -> Vec<String> {
    let measured = run.measured();
    let rewards = measured.filter(|_| run.objective.has_rewards());
    let show = |of: &dyn Fn(&Statistics) -> String| {
        rewards.map_or_else(|| NOTHING.into(), |measured| of(measured.statistics()))
    };
    let mut cells = vec![
        run.label.clone(),
        run.objective.label(),
        steps(run),
        match measured {
            None => NOTHING.into(),
            Some(Measured::HeldOut(row)) => format!("held-out, step {}", row.step),
            Some(Measured::Training { first, last, .. }) => format!("training, {first} – {last}"),
        },
        show(&|row| signed(row.log_ratios_chosen)),
        show(&|row| signed(row.log_ratios_rejected)),
        show(&|row| signed(row.log_ratios_chosen - row.log_ratios_rejected)),
        show(&|row| format!("{:.3}", row.rewards_accuracies)),
    ];
    for term in terms {
        cells.push(measured.map_or_else(
            || NOTHING.into(),
            |measured| plain((term.of)(measured.statistics())),
        ));
    }
    cells.push(if run.totals.steps > 0 {
        plain(run.totals.pairs_per_second)
    } else {
        NOTHING.into()
    });
    cells.push(run.outcome.clone());
    cells
}

fn steps(run: &Run) -> String {
    let done = run.totals.steps;
    match run.facts.as_ref().map(|facts| facts.steps_total) {
        Some(total) if total != done => format!("{} of {}", grouped(done), grouped(total)),
        _ => grouped(done),
    }
}

/// What the numbers mean, and where they do not compare.
pub(super) fn notes(runs: &[Run]) -> Vec<String> {
    let mut notes =
        vec!["chosen, rejected, margin: mean log-ratios to the reference, in nats".into()];
    let names = |chosen: &dyn Fn(&Run) -> bool| {
        let named = runs.iter().filter(|run| chosen(run));
        named
            .map(|run| run.label.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let trained = names(&|run| matches!(run.measured(), Some(Measured::Training { .. })));
    if !trained.is_empty() {
        notes.push(format!(
            "no evaluation after a step, so these are means over the last training batches: {trained}"
        ));
    }
    let left_out: Vec<_> = TERMS
        .iter()
        .filter(|term| {
            let has_it = |run: &Run| (term.same)(&run.objective, &run.objective);
            !term.is_comparable(runs) && runs.iter().any(has_it)
        })
        .map(|term| term.name)
        .collect();
    if !left_out.is_empty() {
        notes.push(format!(
            "left out, because the objectives define it differently: {}",
            left_out.join(", ")
        ));
    }
    let inputs: [(&str, Digest); 2] = [
        ("starting weights", |facts| &facts.model_digest),
        ("data", |facts| &facts.data_digest),
    ];
    for (what, digest) in inputs {
        let known = |run: &Run| Some(digest(run.facts.as_ref()?).to_owned());
        let Some((first, value)) = runs.iter().find_map(|run| Some((run, known(run)?))) else {
            continue;
        };
        let others = names(&|run| known(run).is_some_and(|other| other != value));
        if !others.is_empty() {
            notes.push(format!("other {what} than {}: {others}", first.label));
        }
    }
    for run in runs {
        if let Some(reason) = &run.reason {
            notes.push(format!("{}: {reason}", run.label));
        }
    }
    notes
}

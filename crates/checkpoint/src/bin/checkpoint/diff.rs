//! `checkpoint diff`.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use anyhow::Result;
use checkpoint::{Diff, Difference, Kind, Side, has_weights};
use serde_json::json;

use crate::{
    DONE, FAILED,
    print::print,
    progress::Progress,
    target::{check_there, is_one, resolve},
};

/// What to compare.
#[derive(clap::Args)]
pub struct DiffArgs {
    /// A checkpoint, a directory of checkpoints, or a Hugging Face model directory.
    a: PathBuf,
    /// The same.
    b: PathBuf,
    /// Compare the optimizer's moments too.
    #[arg(long)]
    all: bool,
    /// Exit with 1 where the two are not the same to the bit.
    #[arg(long)]
    exit_code: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub fn diff(args: &DiffArgs) -> Result<u8> {
    let (a, b) = (open(&args.a)?, open(&args.b)?);
    let kinds: &[Kind] = if args.all {
        &Kind::ALL
    } else {
        &[Kind::Weight]
    };
    let progress = Progress::new("compare", a.bytes(kinds) + b.bytes(kinds));
    let found = checkpoint::diff(&a, &b, kinds, &|bytes| progress.add(bytes))?;
    drop(progress);
    if args.json {
        let all = json!({ "a": about(&args.a, &a), "b": about(&args.b, &b), "diff": found });
        print(&all.to_string())?;
    } else {
        print(text(&found).trim_end())?;
    }
    Ok(if args.exit_code && !found.identical {
        FAILED
    } else {
        DONE
    })
}

fn open(dir: &Path) -> Result<Side> {
    check_there(dir)?;
    if is_one(dir) || has_weights(dir) {
        return Ok(Side::open(dir)?);
    }
    Ok(Side::open(&resolve(dir)?)?)
}

/// What a side is.
fn about(dir: &Path, side: &Side) -> serde_json::Value {
    match side.checkpoint() {
        None => json!({ "path": dir }),
        Some(checkpoint) => json!({
            "path": checkpoint.path(),
            "step": checkpoint.manifest().state.step,
            "world": checkpoint.manifest().world,
        }),
    }
}

fn text(found: &Diff) -> String {
    let mut rows = vec![row_of_words()];
    for compared in &found.tensors {
        let name = match compared.kind {
            Kind::Weight => compared.tensor.clone(),
            kind => format!("{} ({kind})", compared.tensor),
        };
        rows.push(row(name, &compared.difference));
    }
    for total in &found.totals {
        rows.push(row(format!("all ({})", total.kind), &total.difference));
    }
    let mut text = table(&rows);
    for name in &found.only_a {
        writeln!(text, "only in A: {name}").expect("writing to a string succeeds");
    }
    for name in &found.only_b {
        writeln!(text, "only in B: {name}").expect("writing to a string succeeds");
    }
    for shapes in &found.shapes {
        let (name, a, b) = (&shapes.tensor, &shapes.a, &shapes.b);
        writeln!(text, "{name} is {a:?} in A and {b:?} in B")
            .expect("writing to a string succeeds");
    }
    if found.identical {
        text.push_str("the same to the bit\n");
    }
    text
}

type Row = [String; 7];

fn row_of_words() -> Row {
    ["", "|A|", "|B|", "|A - B|", "relative", "max", "different"].map(Into::into)
}

fn row(name: String, difference: &Difference) -> Row {
    let Difference {
        elements,
        different,
        norm_a,
        norm_b,
        norm_difference,
        relative,
        max_abs,
    } = difference;
    let number = |value: &f64| format!("{value:.4e}");
    [
        name,
        number(norm_a),
        number(norm_b),
        number(norm_difference),
        number(relative),
        number(max_abs),
        format!("{different} of {elements}"),
    ]
}

/// Names to the left, numbers to the right.
fn table(rows: &[Row]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        write!(text, "{:width$}", row[0], width = width(0)).expect("writing to a string succeeds");
        for (column, cell) in row.iter().enumerate().skip(1) {
            let width = width(column);
            write!(text, "  {cell:>width$}").expect("writing to a string succeeds");
        }
        text.push('\n');
    }
    text
}

//! What the panels share: legend, text, axis labels.

use plotters::{
    coord::Shift,
    prelude::{DrawingArea, DrawingBackend, IntoFont, PathElement},
    style::{
        RGBColor, ShapeStyle, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};

use super::{PlotError, render::FONT};
use crate::numbers::plain;

/// Of text.
pub(super) const INK: RGBColor = RGBColor(38, 42, 48);
/// Of axes and other lines that stay behind the curves.
pub(super) const SOFT: RGBColor = RGBColor(110, 116, 124);
/// Of the mesh.
pub(super) const GRID: RGBColor = RGBColor(232, 234, 237);

/// A legend's entry.
pub(super) struct Key {
    pub text: String,
    pub style: ShapeStyle,
    pub dashed: bool,
}

/// Entries side by side, from `(x, y)`, the middle of the first line.
pub(super) fn legend<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    keys: &[Key],
    (mut x, y): (i32, i32),
    size: f64,
) -> Result<(), PlotError> {
    const SWATCH: i32 = 46;
    /// Letters without descenders sit above the middle of their line.
    const RAISED: i32 = 2;
    let style = text_style(size, INK, HPos::Left, VPos::Center);
    for key in keys {
        let dash = |from: i32, to: i32| {
            area.draw(&PathElement::new(
                vec![(x + from, y - RAISED), (x + to, y - RAISED)],
                key.style,
            ))
            .map_err(PlotError::drawing)
        };
        if key.dashed {
            dash(0, 12)?;
            dash(17, 29)?;
            dash(34, SWATCH)?;
        } else {
            dash(0, SWATCH)?;
        }
        area.draw_text(&key.text, &style, (x + SWATCH + 12, y))
            .map_err(PlotError::drawing)?;
        let (width, _) = area
            .estimate_text_size(&key.text, &style)
            .map_err(PlotError::drawing)?;
        x += SWATCH + 12 + width as i32 + 42;
    }
    Ok(())
}

pub(super) fn text_style(
    size: f64,
    color: RGBColor,
    across: HPos,
    down: VPos,
) -> TextStyle<'static> {
    (FONT, size)
        .into_font()
        .color(&color)
        .pos(Pos::new(across, down))
}

/// A step below its tick; nothing at ticks between steps, which short runs have.
pub(super) fn axis_step(step: f64) -> String {
    if (step - step.round()).abs() < 1e-6 {
        return format!("{step:.0}");
    }
    String::new()
}

/// An axis label: short, with a real minus.
pub(super) fn axis_number(value: f64) -> String {
    if value < 0.0 {
        return format!("−{}", plain(-value));
    }
    plain(value)
}

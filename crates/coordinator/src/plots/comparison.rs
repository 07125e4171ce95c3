//! Several runs in one picture: a hue per run, chosen solid, rejected dashed.

use plotters::{
    coord::{
        Shift,
        ranged1d::{Ranged, ValueFormatter},
        types::RangedCoordf64,
    },
    prelude::{ChartBuilder, Circle, DashedLineSeries, DrawingArea, DrawingBackend, LineSeries},
    style::{
        Color, HSLColor, RGBColor, WHITE,
        text_anchor::{HPos, VPos},
    },
};

use super::{
    Drawing, PlotError,
    parts::{GRID, INK, Key, SOFT, axis_number, axis_step, legend, text_style},
    render::{Picture, render},
    scale::reward_range,
    signed_log::SignedLog,
};
use crate::numbers::signed;

const WIDTH: u32 = 1800;
const BODY_HEIGHT: u32 = 1000;
/// The title and the key of the line styles.
const HEAD_HEIGHT: u32 = 152;
/// Of a run's line in the legend.
const LEGEND_HEIGHT: u32 = 42;
/// Where the largest run reaches so many times as far as the smallest, a linear axis would flatten that one.
const LINEAR_TIMES_MAX: f64 = 5.0;
/// Beyond the outermost points of a logarithmic axis.
const ROOM: f64 = 1.3;
/// Dots of so many points would hide the line.
const DOTS_MAX: usize = 40;
/// Between the middles of two labels at the curves' ends.
const LABEL_DISTANCE: i32 = 32;
/// Okabe and Ito's colors, told apart by most color-blind people, without their yellow; more come from the color circle.
const HUES: [RGBColor; 10] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(60, 60, 60),
    RGBColor(128, 84, 220),
    RGBColor(140, 30, 50),
    RGBColor(128, 128, 0),
];

/// A run's line of the legend and its curves.
pub struct ComparedCurve {
    /// Such as the run's name and objective.
    pub name: String,
    /// Whether the points are evaluations, else training batches.
    pub held_out: bool,
    /// Step, chosen and rejected log-ratio.
    pub points: Vec<(f64, f64, f64)>,
}

/// Draws all `curves` as PNG and SVG.
pub fn draw_comparison(curves: &[ComparedCurve]) -> Result<Drawing, PlotError> {
    let picture = Comparison { curves };
    let height = picture.head_height() + BODY_HEIGHT;
    render(&picture, (WIDTH, height))
}

struct Comparison<'a> {
    curves: &'a [ComparedCurve],
}

/// Text at a curve's end.
struct EndLabel {
    x: i32,
    y: i32,
    text: String,
    color: RGBColor,
}

impl Picture for Comparison<'_> {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<(), PlotError> {
        area.fill(&WHITE).map_err(PlotError::drawing)?;
        let (head, body) = area.split_vertically(self.head_height());
        self.head(&head)?;
        let Some(scale) = self.scale() else {
            let axis = RangedCoordf64::from(reward_range(self.values(), None));
            return self.panel(&body, axis, "log-ratio to the reference (nats)");
        };
        let finite = self.values().filter(|value| value.is_finite());
        let (low, high) = finite.fold((-scale, scale), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        let axis = SignedLog::new(low * ROOM..high * ROOM, scale);
        let description = "log-ratio to the reference (nats, signed log scale)";
        self.panel(&body, axis, description)
    }
}

impl Comparison<'_> {
    fn head_height(&self) -> u32 {
        let lines = self.curves.len().div_ceil(self.columns());
        HEAD_HEIGHT + LEGEND_HEIGHT * lines as u32
    }

    /// Of the legend.
    fn columns(&self) -> usize {
        if self.curves.len() > 4 { 2 } else { 1 }
    }

    fn values(&self) -> impl Iterator<Item = f64> {
        let points = self.curves.iter().flat_map(|curve| &curve.points);
        points.flat_map(|&(_, chosen, rejected)| [chosen, rejected])
    }

    /// Where the axis turns logarithmic; `None` where all runs are readable on a linear one.
    fn scale(&self) -> Option<f64> {
        let reach = |curve: &ComparedCurve| {
            let values = curve.points.iter().flat_map(|at| [at.1.abs(), at.2.abs()]);
            values.filter(|value| value.is_finite()).fold(0.0, f64::max)
        };
        let reaches = self.curves.iter().map(reach).filter(|reach| *reach > 0.0);
        let (low, high) = reaches.fold((f64::INFINITY, 0.0_f64), |(low, high), reach| {
            (low.min(reach), high.max(reach))
        });
        (high > low * LINEAR_TIMES_MAX).then_some(low / 2.0)
    }

    fn hue(&self, index: usize) -> RGBColor {
        if self.curves.len() <= HUES.len() {
            return HUES[index];
        }
        let turn = index as f64 / self.curves.len() as f64;
        let light = if index.is_multiple_of(2) { 0.36 } else { 0.55 };
        let color = HSLColor(turn, 0.75, light).to_backend_color();
        RGBColor(color.rgb.0, color.rgb.1, color.rgb.2)
    }

    fn head<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<(), PlotError> {
        let title = text_style(44.0, INK, HPos::Left, VPos::Top);
        let held_out = self.curves.iter().filter(|curve| curve.held_out).count();
        let pairs = match held_out {
            0 => "training pairs",
            count if count == self.curves.len() => "held-out pairs",
            _ => "held-out or training pairs",
        };
        area.draw_text(&format!("Log-ratios of {pairs}"), &title, (60, 28))
            .map_err(PlotError::drawing)?;
        let style = |dashed| Key {
            text: if dashed { "rejected" } else { "chosen" }.into(),
            style: SOFT.stroke_width(5),
            dashed,
        };
        legend(area, &[style(false), style(true)], (62, 106), 27.0)?;
        let columns = self.columns();
        for (index, curve) in self.curves.iter().enumerate() {
            let room = (WIDTH as usize - 120) / columns;
            let x = 62 + (room * (index % columns)) as i32;
            let y = 152 + LEGEND_HEIGHT as i32 * (index / columns) as i32;
            let key = Key {
                text: fitting(area, curve, room as u32 - 90)?,
                style: self.hue(index).stroke_width(7),
                dashed: false,
            };
            legend(area, &[key], (x, y), 27.0)?;
        }
        Ok(())
    }

    fn panel<B: DrawingBackend, Y>(
        &self,
        area: &DrawingArea<B, Shift>,
        axis: Y,
        description: &str,
    ) -> Result<(), PlotError>
    where
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let last = self.curves.iter().flat_map(|curve| &curve.points);
        let last = last.map(|at| at.0).fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(area)
            .margin_left(36)
            .margin_right(130)
            .margin_top(8)
            .margin_bottom(12)
            .x_label_area_size(80)
            .y_label_area_size(110)
            .build_cartesian_2d(0.0..last, axis)
            .map_err(PlotError::drawing)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc(description)
            .x_labels(12)
            .y_labels(12)
            .x_label_formatter(&|step| axis_step(*step))
            .y_label_formatter(&|value| axis_number(*value))
            .bold_line_style(GRID)
            .light_line_style(WHITE)
            .axis_style(SOFT)
            .label_style(text_style(26.0, INK, HPos::Center, VPos::Center))
            .axis_desc_style(text_style(28.0, INK, HPos::Center, VPos::Center))
            .draw()
            .map_err(PlotError::drawing)?;
        let zero = [(0.0, 0.0), (last, 0.0)];
        chart
            .draw_series(LineSeries::new(zero, SOFT.stroke_width(2)))
            .map_err(PlotError::drawing)?;

        let mut labels = Vec::new();
        for (index, curve) in self.curves.iter().enumerate() {
            let color = self.hue(index);
            let width = if curve.held_out { 5 } else { 3 };
            let finite = |points: Vec<(f64, f64)>| -> Vec<_> {
                points.into_iter().filter(|at| at.1.is_finite()).collect()
            };
            let chosen = finite(curve.points.iter().map(|at| (at.0, at.1)).collect());
            let rejected = finite(curve.points.iter().map(|at| (at.0, at.2)).collect());
            let dashes = DashedLineSeries::new(rejected.clone(), 16, 11, color.stroke_width(width));
            chart.draw_series(dashes).map_err(PlotError::drawing)?;
            let line = LineSeries::new(chosen.clone(), color.stroke_width(width));
            chart.draw_series(line).map_err(PlotError::drawing)?;
            if curve.held_out && curve.points.len() <= DOTS_MAX {
                // Hollow, like the dashes.
                for (size, fill) in [(8, color), (4, WHITE)] {
                    let dots = rejected
                        .iter()
                        .map(|&at| Circle::new(at, size, fill.filled()));
                    chart.draw_series(dots).map_err(PlotError::drawing)?;
                }
                let dots = chosen.iter().map(|&at| Circle::new(at, 8, color.filled()));
                chart.draw_series(dots).map_err(PlotError::drawing)?;
            }
            for at in [chosen.last(), rejected.last()].into_iter().flatten() {
                let (x, y) = chart.backend_coord(at);
                let text = signed(at.1);
                labels.push(EndLabel { x, y, text, color });
            }
        }
        spread(&mut labels);
        let (left, top) = area.get_base_pixel();
        for label in &labels {
            let style = text_style(28.0, label.color, HPos::Left, VPos::Center);
            area.draw_text(&label.text, &style, (label.x + 18 - left, label.y - top))
                .map_err(PlotError::drawing)?;
        }
        Ok(())
    }
}

/// The legend's text of a curve, cut to `width` pixels.
fn fitting<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    curve: &ComparedCurve,
    width: u32,
) -> Result<String, PlotError> {
    let style = text_style(27.0, INK, HPos::Left, VPos::Center);
    let note = if curve.held_out { "" } else { " · training" };
    let mut name = curve.name.clone();
    let mut text = format!("{name}{note}");
    while area
        .estimate_text_size(&text, &style)
        .map_err(PlotError::drawing)?
        .0
        > width
    {
        if name.pop().is_none() {
            break;
        }
        text = format!("{name}…{note}");
    }
    Ok(text)
}

/// Moves labels that would overlap apart, keeping their order.
fn spread(labels: &mut [EndLabel]) {
    const WIDTH: i32 = 110;
    labels.sort_by_key(|label| label.y);
    // Runs of different lengths end beside each other; only labels above each other are in each other's way.
    for _ in 0..100 {
        let mut moved = false;
        for upper in 0..labels.len() {
            for lower in upper + 1..labels.len() {
                let beside = (labels[upper].x - labels[lower].x).abs() >= WIDTH;
                let missing = LABEL_DISTANCE - (labels[lower].y - labels[upper].y);
                if !beside && missing > 0 {
                    labels[upper].y -= (missing + 1) / 2;
                    labels[lower].y += missing / 2;
                    moved = true;
                }
            }
        }
        if !moved {
            return;
        }
    }
}

//! The three panels: log-ratios with their targets, accuracy, loss terms.

use plotters::{
    coord::Shift,
    prelude::{
        ChartBuilder, Circle, DashedLineSeries, DrawingArea, DrawingBackend, EmptyElement,
        IntoLogRange, LineSeries, Text,
    },
    style::{
        Color, RGBColor, WHITE,
        text_anchor::{HPos, VPos},
    },
};
use protocol::Statistics;
use spec::Targets;

use super::{
    PlotError, RewardPlot,
    parts::{GRID, INK, Key, SOFT, axis_number, axis_step, legend, text_style},
    scale::{log_range, reward_range, targets_fit},
};
use crate::{
    numbers::{plain, signed},
    objective::{both, symmetric},
};

const CHOSEN: RGBColor = RGBColor(0, 128, 96);
const REJECTED: RGBColor = RGBColor(200, 60, 48);
const PAIRWISE: RGBColor = RGBColor(58, 96, 176);
const CALIBRATION: RGBColor = RGBColor(214, 138, 24);
const ACCURACY: RGBColor = RGBColor(96, 72, 160);
/// Training curves are noisy; they stay behind the held-out ones.
const FAINT: f64 = 0.38;

impl RewardPlot<'_> {
    pub(super) fn reward_panel<B: DrawingBackend>(
        &self,
        head: &DrawingArea<B, Shift>,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), PlotError> {
        let chosen = |row: &Statistics| row.log_ratios_chosen;
        let rejected = |row: &Statistics| row.log_ratios_rejected;
        let curves = [
            ("chosen", CHOSEN, chosen as fn(&Statistics) -> f64),
            ("rejected", REJECTED, rejected),
        ];
        let all = || {
            curves
                .iter()
                .flat_map(|(_, _, of)| self.training(*of).chain(self.held_out(*of)))
        };
        let values = || all().map(|(_, value)| value);
        let range = reward_range(values(), self.targets);
        let steps = 0.0..self.last_step();
        let mut chart = ChartBuilder::on(area)
            .margin_left(36)
            .margin_right(130)
            .margin_top(8)
            .x_label_area_size(76)
            .y_label_area_size(104)
            .build_cartesian_2d(steps.clone(), range.clone())
            .map_err(PlotError::drawing)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("log-ratio to the reference (nats)")
            .x_labels(12)
            .y_labels(11)
            .x_label_formatter(&|step| axis_step(*step))
            .y_label_formatter(&|value| axis_number(*value))
            .bold_line_style(GRID)
            .light_line_style(WHITE)
            .axis_style(SOFT)
            .label_style(text_style(26.0, INK, HPos::Center, VPos::Center))
            .axis_desc_style(text_style(28.0, INK, HPos::Center, VPos::Center))
            .draw()
            .map_err(PlotError::drawing)?;

        let zero = [(0.0, 0.0), (steps.end, 0.0)];
        chart
            .draw_series(LineSeries::new(zero, SOFT.stroke_width(2)))
            .map_err(PlotError::drawing)?;
        let mut keys = Vec::new();
        let observed = values().filter(|value| value.is_finite());
        let (low, high) = observed.fold((0.0_f64, 0.0_f64), |(l, h), v| (l.min(v), h.max(v)));
        let near = |targets: &Targets| targets_fit(low, high, *targets);
        if let Some(targets) = self.targets.filter(near) {
            for (value, color, above) in [
                (targets.chosen, CHOSEN, -24),
                (targets.rejected, REJECTED, 24),
            ] {
                let line = [(0.0, value), (steps.end, value)];
                chart
                    .draw_series(DashedLineSeries::new(line, 14, 10, color.stroke_width(3)))
                    .map_err(PlotError::drawing)?;
                // The curves begin at zero, so the lines' left ends are free.
                let style = text_style(26.0, color, HPos::Left, VPos::Center);
                let text = format!("target {}", signed(value));
                let label = EmptyElement::at((0.0, value)) + Text::new(text, (14, above), style);
                chart
                    .plotting_area()
                    .draw(&label)
                    .map_err(PlotError::drawing)?;
            }
        }
        for (name, color, of) in curves {
            let training = LineSeries::new(self.training(of), color.mix(FAINT).stroke_width(2));
            chart.draw_series(training).map_err(PlotError::drawing)?;
            let held_out: Vec<_> = self.held_out(of).collect();
            let line = LineSeries::new(held_out.clone(), color.stroke_width(5));
            chart.draw_series(line).map_err(PlotError::drawing)?;
            let dots = held_out
                .iter()
                .map(|&at| Circle::new(at, 7, color.filled()));
            chart.draw_series(dots).map_err(PlotError::drawing)?;
            if !held_out.is_empty() {
                keys.push(Key {
                    text: format!("{name}, held-out"),
                    style: color.stroke_width(5),
                    dashed: false,
                });
            }
            if self.training(of).next().is_some() {
                keys.push(Key {
                    text: format!("{name}, training"),
                    style: color.mix(FAINT).stroke_width(3),
                    dashed: false,
                });
            }
        }
        let ends = curves
            .map(|(_, color, of)| (self.held_out(of).last().or(self.training(of).last()), color));
        for (at, color) in ends {
            let Some(at) = at else { continue };
            let style = text_style(30.0, color, HPos::Left, VPos::Center);
            let label = EmptyElement::at(at) + Text::new(signed(at.1), (16, 0), style);
            chart
                .plotting_area()
                .draw(&label)
                .map_err(PlotError::drawing)?;
        }
        if let Some(targets) = self.targets {
            let text = if !targets_fit(low, high, targets) {
                format!("targets {}, far outside this scale", both(targets))
            } else if let Some(target) = symmetric(targets) {
                format!("targets ±1/(2β) = ±{}", plain(target))
            } else {
                format!("targets (1−s)/β and −s/β = {}", both(targets))
            };
            keys.push(Key {
                text,
                style: SOFT.stroke_width(3),
                dashed: true,
            });
        }
        legend(head, &keys, (62, 106), 27.0)
    }

    pub(super) fn accuracy_panel<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), PlotError> {
        let of = |row: &Statistics| row.rewards_accuracies;
        let (head, body) = area.split_vertically(56);
        let mut chart = ChartBuilder::on(&body)
            .margin_left(36)
            .margin_right(40)
            .margin_bottom(16)
            .x_label_area_size(76)
            .y_label_area_size(104)
            .build_cartesian_2d(0.0..self.last_step(), 0.0..1.04)
            .map_err(PlotError::drawing)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("share of pairs ranked right")
            .x_labels(6)
            .y_labels(6)
            .x_label_formatter(&|step| axis_step(*step))
            .y_label_formatter(&|value| format!("{value:.1}"))
            .bold_line_style(GRID)
            .light_line_style(WHITE)
            .axis_style(SOFT)
            .label_style(text_style(24.0, INK, HPos::Center, VPos::Center))
            .axis_desc_style(text_style(26.0, INK, HPos::Center, VPos::Center))
            .draw()
            .map_err(PlotError::drawing)?;
        let training = LineSeries::new(self.training(of), ACCURACY.mix(FAINT).stroke_width(2));
        chart.draw_series(training).map_err(PlotError::drawing)?;
        let held_out: Vec<_> = self.held_out(of).collect();
        let line = LineSeries::new(held_out.clone(), ACCURACY.stroke_width(4));
        chart.draw_series(line).map_err(PlotError::drawing)?;
        let dots = held_out
            .iter()
            .map(|&at| Circle::new(at, 6, ACCURACY.filled()));
        chart.draw_series(dots).map_err(PlotError::drawing)?;
        let mut keys = Vec::new();
        if !held_out.is_empty() {
            keys.push(Key {
                text: "accuracy, held-out".into(),
                style: ACCURACY.stroke_width(4),
                dashed: false,
            });
        }
        if self.training(of).next().is_some() {
            let style = ACCURACY.mix(FAINT).stroke_width(3);
            keys.push(Key {
                text: "accuracy, training".into(),
                style,
                dashed: false,
            });
        }
        legend(&head, &keys, (140, 34), 25.0)
    }

    pub(super) fn loss_panel<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), PlotError> {
        let terms = [
            (
                "pairwise loss, training",
                PAIRWISE,
                (|row| row.loss_pairwise) as fn(&Statistics) -> f64,
            ),
            ("calibration loss, training", CALIBRATION, |row| {
                row.loss_calibration
            }),
        ];
        let positive =
            |of: fn(&Statistics) -> f64| self.training(of).filter(|(_, value)| *value > 0.0);
        let range = log_range(
            terms
                .iter()
                .flat_map(|(_, _, of)| positive(*of))
                .map(|(_, value)| value),
        );
        let lowest = range.start;
        let (head, body) = area.split_vertically(56);
        let mut chart = ChartBuilder::on(&body)
            .margin_left(10)
            .margin_right(130)
            .margin_bottom(16)
            .x_label_area_size(76)
            .y_label_area_size(104)
            .build_cartesian_2d(0.0..self.last_step(), range.log_scale())
            .map_err(PlotError::drawing)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("loss (log scale)")
            .x_labels(6)
            .y_labels(5)
            .x_label_formatter(&|step| axis_step(*step))
            .y_label_formatter(&|value| axis_number(*value))
            .bold_line_style(GRID)
            .light_line_style(WHITE)
            .axis_style(SOFT)
            .label_style(text_style(24.0, INK, HPos::Center, VPos::Center))
            .axis_desc_style(text_style(26.0, INK, HPos::Center, VPos::Center))
            .draw()
            .map_err(PlotError::drawing)?;
        let mut keys = Vec::new();
        for (name, color, of) in terms {
            if positive(of).next().is_none() {
                continue;
            }
            let floor = |(step, value): (f64, f64)| (step, value.max(lowest));
            let line = LineSeries::new(positive(of).map(floor), color.stroke_width(3));
            chart.draw_series(line).map_err(PlotError::drawing)?;
            keys.push(Key {
                text: name.into(),
                style: color.stroke_width(4),
                dashed: false,
            });
        }
        legend(&head, &keys, (114, 34), 25.0)
    }
}

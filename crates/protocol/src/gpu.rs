//! How members' GPUs fare. Like phases, each member's own: no vote compares them.

use serde::{Deserialize, Serialize};

/// What a member tells of its GPU with its vote; in a row, of all members that have one. `None` is what nobody measured, and all
/// of it on CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuFigures {
    /// Model FLOPs utilization, 0 to 1; in a row the mean.
    #[serde(rename = "gpu/mfu", skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Memory that is taken, in GiB; in a row the most.
    #[serde(rename = "gpu/memory_gib", skip_serializing_if = "Option::is_none")]
    pub memory_gib: Option<f64>,
    /// Share of the last sampling period in which a kernel ran, 0 to 1; in a row the mean.
    #[serde(rename = "gpu/utilization", skip_serializing_if = "Option::is_none")]
    pub utilization: Option<f64>,
    /// Of the chip, in °C; in a row the most.
    #[serde(
        rename = "gpu/temperature_celsius",
        skip_serializing_if = "Option::is_none"
    )]
    pub temperature_celsius: Option<f64>,
    /// Power draw of the board, in watts; in a row the mean.
    #[serde(rename = "gpu/power_watts", skip_serializing_if = "Option::is_none")]
    pub power_watts: Option<f64>,
    /// Clock of the multiprocessors, in MHz; in a row the least.
    #[serde(rename = "gpu/sm_clock_mhz", skip_serializing_if = "Option::is_none")]
    pub sm_clock_mhz: Option<f64>,
}

impl GpuFigures {
    /// Every figure with its name, as in a row.
    pub fn values(&self) -> [(&'static str, Option<f64>); 6] {
        [
            ("gpu/mfu", self.mfu),
            ("gpu/memory_gib", self.memory_gib),
            ("gpu/utilization", self.utilization),
            ("gpu/temperature_celsius", self.temperature_celsius),
            ("gpu/power_watts", self.power_watts),
            ("gpu/sm_clock_mhz", self.sm_clock_mhz),
        ]
    }

    /// What a row says of these members: of a slow step the hottest, the fullest and the slowest GPU matter.
    pub fn of(members: &[Self]) -> Self {
        let told = |figure: fn(&Self) -> Option<f64>| members.iter().filter_map(figure);
        let mean = |figure| {
            let (sum, count) =
                told(figure).fold((0.0, 0u32), |(sum, count), it| (sum + it, count + 1));
            (count > 0).then(|| sum / f64::from(count))
        };
        Self {
            mfu: mean(|it| it.mfu),
            memory_gib: told(|it| it.memory_gib).reduce(f64::max),
            utilization: mean(|it| it.utilization),
            temperature_celsius: told(|it| it.temperature_celsius).reduce(f64::max),
            power_watts: mean(|it| it.power_watts),
            sm_clock_mhz: told(|it| it.sm_clock_mhz).reduce(f64::min),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::GpuFigures;

    #[test]
    fn a_row_has_means_of_use_and_the_worst_of_memory_heat_and_clock() {
        let one = GpuFigures {
            mfu: Some(0.5),
            memory_gib: Some(30.0),
            utilization: Some(1.0),
            temperature_celsius: Some(60.0),
            power_watts: Some(500.0),
            sm_clock_mhz: Some(1980.0),
        };
        let other = GpuFigures {
            mfu: Some(0.25),
            memory_gib: Some(20.0),
            utilization: None,
            temperature_celsius: Some(80.0),
            power_watts: Some(300.0),
            sm_clock_mhz: Some(1200.0),
        };
        let cpu = GpuFigures::default();
        let row = GpuFigures::of(&[one, cpu, other]);
        let expected = GpuFigures {
            mfu: Some(0.375),
            memory_gib: Some(30.0),
            utilization: Some(1.0),
            temperature_celsius: Some(80.0),
            power_watts: Some(400.0),
            sm_clock_mhz: Some(1200.0),
        };
        assert_eq!(row, expected);
        assert_eq!(GpuFigures::of(&[cpu]), cpu);
    }
}

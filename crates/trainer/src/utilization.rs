//! Model FLOPs utilization (MFU; Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B): operations that training needs, by
//! the time that a step takes, over what the device can do at most. Recompute and padding are not needed, so they do not count.

use model::{Model, Operations, Precision};

use crate::batch::Batch;
use crate::phases::Phases;

/// Peaks in units of 10¹² operations by second: dense bf16 with f32 sums on the tensor cores, and f32 outside of them. From NVIDIA's
/// data sheets of the boards, halved where they count sparse operands; of GeForce boards from the architectures' white papers (Ampere
/// GA102, Ada, Blackwell RTX). The names are whole: a part of a device (MIG) calls itself otherwise, and its peak is not known.
const PEAKS: &[(&str, f64, f64)] = &[
    ("NVIDIA GH200 120GB", 989.4, 66.9),
    ("NVIDIA GH200 480GB", 989.4, 66.9),
    ("NVIDIA H200", 989.4, 66.9),
    ("NVIDIA H200 NVL", 835.5, 60.0),
    ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
    ("NVIDIA H100 NVL", 835.5, 60.0),
    ("NVIDIA H100 PCIe", 756.5, 51.2),
    ("NVIDIA A100-SXM4-40GB", 312.0, 19.5),
    ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
    ("NVIDIA A100-PCIE-40GB", 312.0, 19.5),
    ("NVIDIA A100 80GB PCIe", 312.0, 19.5),
    ("NVIDIA A30", 165.0, 10.3),
    ("NVIDIA A40", 149.7, 37.4),
    ("NVIDIA A10", 125.0, 31.2),
    ("NVIDIA L40S", 362.05, 91.6),
    ("NVIDIA L40", 181.05, 90.5),
    ("NVIDIA L4", 121.0, 30.3),
    ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
    ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ("NVIDIA GeForce RTX 3090", 71.0, 35.6),
];

/// Operations by second that a device of this name can do at most with operands of `precision`; `None` where it is not known.
pub(crate) fn peak(device: &str, precision: Precision) -> Option<f64> {
    let &(_, bf16, f32) = PEAKS.iter().find(|(name, _, _)| *name == device)?;
    let tera = match precision {
        Precision::Bf16 => bf16,
        // No TF32: `kernels` does not use it.
        Precision::F32 => f32,
    };
    Some(tera * 1e12)
}

/// The peak of the device that has `model`, in the model's precision.
pub(crate) fn peak_of(model: &Model) -> Option<f64> {
    let device = model.device();
    if !device.is_gpu() {
        return None;
    }
    peak(&device.class(String::new()), model.precision())
}

/// Operations that a forward over a rank's own packs and its backward need.
pub(crate) fn needed(model: &Model, batch: &Batch<'_>) -> f64 {
    let own = batch.own.iter().flatten().map(|&slot| batch.pairs[slot]);
    let lengths = own.map(|it| (it.prompt.len(), [it.chosen.len(), it.rejected.len()]));
    let operations = Operations::of(model.config(), &lengths.collect::<Vec<_>>());
    if model.trains_itself() {
        operations.training()
    } else {
        // The weights below an adapter get no gradient; its own products are a percent of theirs.
        2.0 * operations.forward()
    }
}

/// What a rank reached of its device's `peak` in a step whose packs need `needed` operations, waiting for others included,
/// evaluation, checkpoints and the job's control not. `None` where no time was measured.
pub(crate) fn mfu(needed: f64, peak: f64, times: &Phases) -> Option<f64> {
    let Phases {
        data,
        forward,
        head,
        backward,
        reduce,
        update,
        evaluate: _,
        checkpoint: _,
        wait: _,
    } = times;
    let seconds = data + forward + head + backward + reduce + update;
    (seconds > 0.0).then(|| needed / seconds / peak)
}

#[cfg(test)]
mod tests {
    use model::Precision;

    use super::{PEAKS, mfu, peak};
    use crate::phases::Phases;

    #[test]
    fn a_peak_is_known_by_the_whole_name_alone() {
        let h100 = "NVIDIA H100 80GB HBM3";
        assert_eq!(peak(h100, Precision::Bf16), Some(989.4 * 1e12));
        assert_eq!(peak(h100, Precision::F32), Some(66.9 * 1e12));
        for unknown in [
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            "NVIDIA H100",
            "Quadro 9",
            "",
        ] {
            assert_eq!(peak(unknown, Precision::Bf16), None, "{unknown}");
        }
        for (index, (name, bf16, f32)) in PEAKS.iter().enumerate() {
            assert!(bf16 > f32, "{name}: tensor cores are the faster ones");
            assert!(
                PEAKS[..index].iter().all(|(other, _, _)| other != name),
                "{name} twice"
            );
        }
    }

    #[test]
    fn what_is_not_the_steps_work_takes_nothing_from_its_utilization() {
        let mut times = Phases {
            data: 0.1,
            forward: 0.3,
            head: 0.1,
            backward: 1.0,
            reduce: 0.3,
            update: 0.2,
            ..Phases::default()
        };
        let alone = mfu(1e15, 1e15, &times);
        assert_eq!(alone, Some(0.5));
        (times.evaluate, times.checkpoint, times.wait) = (10.0, 20.0, 30.0);
        assert_eq!(mfu(1e15, 1e15, &times), alone);
        assert_eq!(mfu(1e15, 1e15, &Phases::default()), None);
    }
}

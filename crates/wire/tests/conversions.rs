//! Every message survives the wire bit for bit, and what breaks the protocol's rules is refused by the name of its field.

#![allow(clippy::unwrap_used, reason = "a test's unwrap is an assertion")]

use prost::Message as _;
use protocol::{
    Activity, Afterwards, Awaits, Cause, CoordinatorMessage, Copies, EvaluationRow, Fence,
    FromWorker, Generation, GpuFigures, Held, Incarnation, JobId, Layout, MetricsRow, Phases, Rank,
    RunFacts, Sample, Statistics, Step, StepReport, Terms, ToWorker, Work, WorkerMessage,
    WorkerProfile,
};
use wire::{WireError, proto};

/// Values that expose a float that went through text, f32 or a comparison.
fn statistics() -> Statistics {
    let odd = [
        0.1 + 0.2,
        -0.0,
        f64::MIN_POSITIVE / 4.0,
        f64::MAX,
        f64::INFINITY,
        f64::NEG_INFINITY,
        -1.0 / 3.0,
        1e-300,
        16777217.0,
        -2.5,
        core::f64::consts::PI,
    ];
    Statistics::from_values(odd)
}

fn report() -> StepReport {
    StepReport {
        step: 7,
        epoch: 2,
        finite: true,
        statistics: statistics(),
        grad_norm: 1.5,
        learning_rate: 5e-7,
        tokens: u64::MAX,
        pairs: 32,
    }
}

fn gpu() -> GpuFigures {
    GpuFigures {
        mfu: Some(0.0),
        memory_gib: Some(34.5),
        utilization: Some(1.0),
        temperature_celsius: None,
        power_watts: Some(650.5),
        sm_clock_mhz: Some(1980.0),
    }
}

fn phases() -> Phases {
    Phases::from_values(core::array::from_fn(|i| i as f64 + 0.1))
}

fn facts() -> RunFacts {
    RunFacts {
        steps_total: 100,
        pairs: 3200,
        eval_pairs: 64,
        parameters: 134_515_008,
        model_digest: "aa".into(),
        tokenizer_digest: "bb".into(),
        data_digest: "cc".into(),
        committed: 40,
    }
}

fn worker_messages() -> Vec<WorkerMessage> {
    let mut all = vec![
        WorkerMessage::Join(WorkerProfile {
            build: "0.1.0+abc".into(),
            wire_version: wire::WIRE_VERSION,
            address: "[::1]:4711".into(),
            name: "node-7.gpu_0".into(),
            device: "cpu, 2 threads".into(),
        }),
        WorkerMessage::Progress {
            phase: "load model".into(),
            done: 3,
            total: 9,
        },
        WorkerMessage::Ready {
            facts: facts(),
            reference_reused: 5,
            reference_computed: 6,
            workers_min: 7,
        },
        WorkerMessage::Prepared {
            report: report(),
            gpu: gpu(),
            phases: phases(),
        },
        WorkerMessage::Evaluated {
            row: EvaluationRow {
                step: 0,
                pairs: 64,
                statistics: statistics(),
            },
            samples: vec![Sample {
                prompt: "Why?".into(),
                text: String::new(),
            }],
        },
        WorkerMessage::Saved {
            step: Step(10),
            asked: Generation(2),
            shard: "{}".into(),
        },
        WorkerMessage::SaveFailed {
            step: Step(10),
            asked: Generation(2),
            reason: "disk full".into(),
        },
        WorkerMessage::Finished,
        WorkerMessage::DataReport {
            text: "all good".into(),
        },
        WorkerMessage::Leave {
            reason: "SIGTERM".into(),
        },
    ];
    for awaits in [
        Awaits::Nothing,
        Awaits::Form,
        Awaits::Go,
        Awaits::Commit,
        Awaits::End,
    ] {
        all.push(WorkerMessage::Beat {
            committed: Step(3),
            awaits,
            activity: Activity::default(),
        });
    }
    for work in [Work::Untold, Work::Computes, Work::Exchanges, Work::Waits] {
        let activity = Activity {
            step: Step(4),
            work,
            progress: 17,
        };
        all.push(WorkerMessage::Beat {
            committed: Step(3),
            awaits: Awaits::Nothing,
            activity,
        });
    }
    let cut = |generation, gradient| Held {
        generation: Generation(generation),
        rank: Rank(1),
        world: 3,
        applied: Step(40),
        gradient,
    };
    for held in [vec![], vec![cut(4, false), cut(3, true)]] {
        let workers_min = held.len() as u32;
        all.push(WorkerMessage::Held { held, workers_min });
    }
    all.push(WorkerMessage::Loaded { facts: facts() });
    for suspect in [None, Some(Rank(0))] {
        let reason = "no word for 20 s".into();
        all.push(WorkerMessage::CollectiveFailed { suspect, reason });
    }
    for cause in [Cause::Config, Cause::Temporary, Cause::Fatal] {
        all.push(WorkerMessage::Failed {
            cause,
            reason: "why".into(),
        });
    }
    all
}

/// Three shards on the two members that are left.
fn layout() -> Layout {
    let copies = |owner: Option<u32>, mirror: Option<u32>| Copies {
        owner: owner.map(Rank),
        mirror: mirror.map(Rank),
    };
    Layout {
        generation: Generation(3),
        shards: vec![
            copies(Some(0), Some(1)),
            copies(Some(1), None),
            copies(None, Some(0)),
        ],
    }
}

fn coordinator_messages() -> Vec<CoordinatorMessage> {
    let form = |committed, resume| CoordinatorMessage::Form {
        rank: Rank(1),
        addresses: ["127.0.0.1:1", "worker-1.train:65535"]
            .map(Into::into)
            .into(),
        secret: core::array::from_fn(|i| i as u8),
        committed: Step(committed),
        resume,
        apply: false,
        base: None,
    };
    let moved = CoordinatorMessage::Form {
        rank: Rank(0),
        addresses: ["127.0.0.1:1", "127.0.0.1:2"].map(Into::into).into(),
        secret: [3; 32],
        committed: Step(40),
        resume: None,
        apply: true,
        base: Some(layout().into()),
    };
    let commit = |bit: u32| CoordinatorMessage::Commit {
        step: Step(9),
        apply: bit == 0,
        save: bit == 1,
        evaluate: bit == 2,
        last: bit == 3,
    };
    let mut all = vec![
        CoordinatorMessage::Welcome {
            config_toml: "a = 1".into(),
            checkpoint_dir: "c".into(),
            probe: ".probe-1".into(),
            spare: false,
            job: JobId("run".into()),
            terms: Terms {
                mirror: false,
                shard_gradients: false,
                offload: false,
                collective_timeout_ms: 1,
                silence_ms: 1,
            },
        },
        form(0, None),
        form(40, Some("checkpoints/step-00000040".into())),
        CoordinatorMessage::Go {
            step: Step(41),
            evaluate: true,
            save: false,
            last: false,
        },
        CoordinatorMessage::Finish,
        CoordinatorMessage::Stale { committed: Step(0) },
        moved,
        CoordinatorMessage::Go {
            step: Step(41),
            evaluate: false,
            save: true,
            last: true,
        },
        CoordinatorMessage::Abort {
            reason: "rank 1 was lost".into(),
        },
        CoordinatorMessage::Heard { committed: Step(7) },
        CoordinatorMessage::Welcome {
            config_toml: String::new(),
            checkpoint_dir: "c".into(),
            probe: String::new(),
            spare: true,
            job: JobId("run".into()),
            terms: Terms {
                mirror: true,
                shard_gradients: true,
                offload: true,
                collective_timeout_ms: 5_000,
                silence_ms: 10_000,
            },
        },
    ];
    all.extend((0..4).map(commit));
    let afterwards = [
        Afterwards::Rejoin,
        Afterwards::Return,
        Afterwards::Restart,
        Afterwards::Leave,
        Afterwards::Refused,
    ];
    all.extend(afterwards.map(|afterwards| CoordinatorMessage::Stop {
        reason: "because".into(),
        afterwards,
    }));
    all
}

fn said(message: WorkerMessage) -> FromWorker {
    FromWorker {
        job: JobId("run".into()),
        incarnation: Incarnation(u64::MAX),
        generation: Generation(3),
        message,
    }
}

fn told(message: CoordinatorMessage) -> ToWorker {
    ToWorker {
        incarnation: Incarnation(1),
        fence: Fence(5),
        generation: Generation(3),
        message,
    }
}

#[test]
fn every_message_of_a_worker_survives_the_wire() {
    for message in worker_messages() {
        let said = said(message);
        let bytes = proto::FromWorker::from(said.clone()).encode_to_vec();
        let sent = proto::FromWorker::decode(bytes.as_slice()).unwrap();
        assert_eq!(FromWorker::try_from(sent), Ok(said));
    }
}

#[test]
fn every_message_of_the_coordinator_survives_the_wire() {
    for message in coordinator_messages() {
        let told = told(message);
        let bytes = proto::ToWorker::from(told.clone()).encode_to_vec();
        let sent = proto::ToWorker::decode(bytes.as_slice()).unwrap();
        assert_eq!(ToWorker::try_from(sent), Ok(told));
    }
}

#[test]
fn a_report_keeps_its_bits_whatever_nan_or_zero_they_spell() {
    let odd = [
        f64::NAN,
        -f64::NAN,
        f64::from_bits(0x7ff0_0000_dead_beef),
        -0.0,
        0.0,
    ];
    for (place, value) in odd.into_iter().enumerate() {
        let mut values = statistics().values().map(|(_, value)| value);
        values[place * 2] = value;
        let report = StepReport {
            grad_norm: value,
            learning_rate: value,
            finite: false,
            statistics: Statistics::from_values(values),
            ..report()
        };
        let bytes = proto::StepReport::from(report).encode_to_vec();
        let back = proto::StepReport::decode(bytes.as_slice()).unwrap();
        let back = StepReport::try_from(back).unwrap();
        assert_eq!(back.first_difference(&report), None, "{value:?}");
        assert_eq!(back.grad_norm.to_bits(), value.to_bits());
    }
}

#[test]
fn each_statistic_arrives_under_its_own_name() {
    let values = core::array::from_fn(|i| i as f64 + 0.5);
    let sent = proto::Statistics::from(Statistics::from_values(values));
    let sent = proto::Statistics::decode(sent.encode_to_vec().as_slice()).unwrap();
    assert_eq!(
        Statistics::try_from(sent)
            .unwrap()
            .values()
            .map(|(_, value)| value),
        values
    );
}

#[test]
fn a_metrics_row_survives_the_wire() {
    let row = MetricsRow {
        report: report(),
        tokens_per_second: 1234.5,
        world_size: 4,
        generation: 2,
        seconds: 0.25,
        gpu: gpu(),
        phases: phases(),
    };
    let bytes = proto::MetricsRow::from(row).encode_to_vec();
    let sent = proto::MetricsRow::decode(bytes.as_slice()).unwrap();
    assert_eq!(MetricsRow::try_from(sent), Ok(row));
}

#[test]
fn phases_that_are_not_sent_are_all_0_and_a_gpus_figures_all_absent() {
    let message = WorkerMessage::Prepared {
        report: report(),
        gpu: gpu(),
        phases: phases(),
    };
    let mut sent = proto::FromWorker::from(said(message));
    let Some(proto::from_worker::Message::Prepared(prepared)) = sent.message.as_mut() else {
        panic!("{sent:?}");
    };
    prepared.phases = None;
    prepared.gpu = None;
    let expected = WorkerMessage::Prepared {
        report: report(),
        gpu: GpuFigures::default(),
        phases: Phases::default(),
    };
    assert_eq!(FromWorker::try_from(sent), Ok(said(expected)));

    let row = proto::MetricsRow {
        report: Some(report().into()),
        ..proto::MetricsRow::default()
    };
    let row = MetricsRow::try_from(row).unwrap();
    assert_eq!(row.phases, Phases::default());
    assert_eq!(row.gpu, GpuFigures::default());
}

#[test]
fn figures_that_no_gpu_can_have_are_refused_by_field() {
    type Spoil = fn(&mut proto::GpuFigures, f64);
    let fields: [(&str, Spoil); 6] = [
        ("GpuFigures.mfu", |it, value| it.mfu = Some(value)),
        ("GpuFigures.memory_gib", |it, value| {
            it.memory_gib = Some(value);
        }),
        ("GpuFigures.utilization", |it, value| {
            it.utilization = Some(value);
        }),
        ("GpuFigures.temperature_celsius", |it, value| {
            it.temperature_celsius = Some(value);
        }),
        ("GpuFigures.power_watts", |it, value| {
            it.power_watts = Some(value);
        }),
        ("GpuFigures.sm_clock_mhz", |it, value| {
            it.sm_clock_mhz = Some(value);
        }),
    ];
    for (field, spoil) in fields {
        for value in [f64::NAN, f64::INFINITY, -1.0] {
            let sent = proto::GpuFigures::from(gpu());
            refused::<_, GpuFigures>(sent, |it| spoil(it, value), field);
        }
    }
}

#[test]
fn phases_that_no_clock_can_tell_are_refused_by_field() {
    type Spoil = fn(&mut proto::Phases, f64);
    let fields: [(&str, Spoil); 9] = [
        ("Phases.data", |it, value| it.data = value),
        ("Phases.forward", |it, value| it.forward = value),
        ("Phases.head", |it, value| it.head = value),
        ("Phases.backward", |it, value| it.backward = value),
        ("Phases.reduce", |it, value| it.reduce = value),
        ("Phases.update", |it, value| it.update = value),
        ("Phases.evaluate", |it, value| it.evaluate = value),
        ("Phases.checkpoint", |it, value| it.checkpoint = value),
        ("Phases.wait", |it, value| it.wait = value),
    ];
    for (field, spoil) in fields {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-9] {
            let sent = proto::Phases::from(phases());
            refused::<_, Phases>(sent, |it| spoil(it, value), field);
        }
        let mut sent = proto::Phases::from(phases());
        spoil(&mut sent, 0.0);
        assert!(Phases::try_from(sent).is_ok(), "{field} is 0");
    }
}

/// Breaks a valid message and expects the refusal to name `field`.
fn refused<P, M>(mut sent: P, spoil: impl FnOnce(&mut P), field: &str)
where
    M: TryFrom<P, Error = WireError> + core::fmt::Debug,
    P: Clone,
{
    assert!(
        M::try_from(sent.clone()).is_ok(),
        "{field}: the unspoilt message is valid"
    );
    spoil(&mut sent);
    let error = M::try_from(sent).expect_err(field);
    assert!(
        error.to_string().starts_with(field),
        "{error} does not name {field}"
    );
}

#[test]
fn a_workers_message_that_breaks_a_rule_is_refused_by_field() {
    use proto::from_worker::Message as M;
    let at = |place: usize| proto::FromWorker::from(said(worker_messages()[place].clone()));
    /// Spoils the message at a place of `worker_messages`, which must be of the named kind.
    macro_rules! spoil {
        ($place:expr, $kind:ident, |$it:ident| $spoil:expr, $field:expr) => {
            let spoil = |it: &mut proto::FromWorker| match it.message.as_mut() {
                Some(M::$kind($it)) => $spoil,
                other => panic!("{other:?} is not what the case spoils"),
            };
            refused::<_, FromWorker>(at($place), spoil, $field);
        };
    }
    refused::<_, FromWorker>(at(0), |it| it.incarnation = 0, "FromWorker.incarnation");
    refused::<_, FromWorker>(at(0), |it| it.message = None, "FromWorker.message");
    spoil!(0, Join, |it| it.build.clear(), "Join.build");
    spoil!(0, Join, |it| it.address = "nowhere".into(), "Join.address");
    spoil!(
        0,
        Join,
        |it| it.address = "127.0.0.1:0".into(),
        "Join.address"
    );
    spoil!(0, Join, |it| it.address = ":80".into(), "Join.address");
    spoil!(0, Join, |it| it.name.clear(), "Join.name");
    spoil!(0, Join, |it| it.name = "a b".into(), "Join.name");
    spoil!(1, Progress, |it| it.phase.clear(), "Progress.phase");
    spoil!(2, Ready, |it| it.facts = None, "Ready.facts");
    let no_digest = "RunFacts.data_digest";
    spoil!(
        2,
        Ready,
        |it| it.facts.as_mut().unwrap().data_digest.clear(),
        no_digest
    );
    spoil!(3, Prepared, |it| it.report = None, "Prepared.report");
    spoil!(
        3,
        Prepared,
        |it| it.report.as_mut().unwrap().step = 0,
        "StepReport.step"
    );
    let no_statistics = "StepReport.statistics";
    spoil!(
        3,
        Prepared,
        |it| it.report.as_mut().unwrap().statistics = None,
        no_statistics
    );
    spoil!(
        3,
        Prepared,
        |it| it.phases.as_mut().unwrap().wait = -1.0,
        "Phases.wait"
    );
    spoil!(4, Evaluated, |it| it.row = None, "Evaluated.row");
    spoil!(5, Saved, |it| it.step = 0, "Saved.step");
    spoil!(5, Saved, |it| it.shard.clear(), "Saved.shard");
    spoil!(6, SaveFailed, |it| it.step = 0, "SaveFailed.step");
    spoil!(8, DataReport, |it| it.text.clear(), "DataReport.text");
    spoil!(10, Beat, |it| it.awaits = 0, "Beat.awaits");
    spoil!(10, Beat, |it| it.awaits = 99, "Beat.awaits");
    spoil!(
        15,
        Beat,
        |it| it.activity.as_mut().unwrap().work = 4,
        "Activity.work"
    );
    spoil!(20, Held, |it| it.cuts[0].rank = 3, "HeldShards.rank");
    spoil!(
        20,
        Held,
        |it| it.cuts[1].generation = 0,
        "HeldShards.generation"
    );
    spoil!(20, Held, |it| it.cuts.push(it.cuts[0]), "Held.cuts");
    spoil!(21, Loaded, |it| it.facts = None, "Loaded.facts");
    spoil!(24, Failed, |it| it.cause = 0, "Failed.cause");
    spoil!(24, Failed, |it| it.cause = -1, "Failed.cause");
}

#[test]
fn a_coordinators_message_that_breaks_a_rule_is_refused_by_field() {
    use proto::to_worker::Message as M;
    let at = |place: usize| proto::ToWorker::from(told(coordinator_messages()[place].clone()));
    let form = |spoil: fn(&mut proto::Form), field| {
        let spoil = |it: &mut proto::ToWorker| match it.message.as_mut() {
            Some(M::Form(form)) => spoil(form),
            other => panic!("{other:?} is not the Form that the case spoils"),
        };
        refused::<_, ToWorker>(at(2), spoil, field);
    };
    let moved = |spoil: fn(&mut proto::Layout), field| {
        let spoil = |it: &mut proto::ToWorker| match it.message.as_mut() {
            Some(M::Form(form)) => spoil(form.base.as_mut().unwrap()),
            other => panic!("{other:?} is not the Form that the case spoils"),
        };
        refused::<_, ToWorker>(at(6), spoil, field);
    };
    moved(|it| it.generation = 0, "Layout.generation");
    moved(|it| it.shards.clear(), "Layout.shards");
    moved(|it| it.shards[1].owner = None, "Copies.owner");
    moved(|it| it.shards[1].owner = Some(2), "Copies");
    form(|it| it.rank = 2, "Form.rank");
    form(|it| it.addresses.clear(), "Form.rank");
    form(|it| it.addresses[0].clear(), "Form.addresses");
    form(|it| it.secret.truncate(31), "Form.secret");
    form(|it| it.secret.push(0), "Form.secret");
    form(|it| it.resume = None, "Form.resume");
    form(|it| it.resume = Some(String::new()), "Form.resume");
    refused::<_, ToWorker>(at(0), |it| it.incarnation = 0, "ToWorker.incarnation");
    refused::<_, ToWorker>(at(0), |it| it.message = None, "ToWorker.message");
    refused::<_, ToWorker>(
        at(3),
        |it| it.message = Some(M::Go(proto::Go::default())),
        "Go.step",
    );
    refused::<_, ToWorker>(
        at(3),
        |it| it.message = Some(M::Commit(proto::Commit::default())),
        "Commit.step",
    );
    refused::<_, ToWorker>(
        at(0),
        |it| it.message = Some(M::Welcome(proto::Welcome::default())),
        "Welcome.checkpoint_dir",
    );
}

#[test]
fn a_refusal_is_an_invalid_argument_to_the_caller() {
    let error = WireError::Missing {
        field: "FromWorker.message",
    };
    let status = tonic::Status::from(error);
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("FromWorker.message"));
}

#[test]
fn a_report_without_one_of_its_floats_is_refused() {
    refused::<_, StepReport>(
        proto::StepReport::from(report()),
        |it| it.grad_norm = None,
        "StepReport.grad_norm",
    );
    refused::<_, Statistics>(
        proto::Statistics::from(statistics()),
        |it| it.logps_rejected = None,
        "Statistics.logps_rejected",
    );
}

#[test]
fn the_secret_is_not_printed() {
    let told = told(CoordinatorMessage::Form {
        rank: Rank(0),
        addresses: ["127.0.0.1:1".into()].into(),
        secret: [0xd7; 32],
        committed: Step(0),
        resume: None,
        apply: false,
        base: None,
    });
    let printed = format!("{told:?} {:?}", proto::ToWorker::from(told.clone()));
    assert!(
        printed.contains("Form") && !printed.contains("215"),
        "{printed}"
    );
}

#[test]
fn the_descriptor_set_holds_both_services_for_reflection() {
    let bytes = wire::FILE_DESCRIPTOR_SET;
    for name in [
        "caldpo/v1/workers.proto",
        "caldpo/v1/cluster.proto",
        "Workers",
        "Cluster",
    ] {
        let found = bytes
            .windows(name.len())
            .any(|window| window == name.as_bytes());
        assert!(found, "{name} is not in the descriptor set");
    }
}

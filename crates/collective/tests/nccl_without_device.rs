//! Everything around NCCL without a device and without NCCL: loading, versions, polling, deadlines, errors and aborts against a
//! stand-in of both libraries in C (`fake/nccl.c`), which runs on the memory of the host and is told what to do by the id.
//! Needs a C compiler under the name `cc`.
#![allow(missing_docs, clippy::unwrap_used)]

mod suite;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::{Barrier, LazyLock},
    time::{Duration, Instant},
};

use collective::{
    Collective, CollectiveError, Element, Op, Region,
    nccl::{
        Device, Driver, Library, Member, Nccl, Pair, UniqueId, Version, deterministic_environment,
        has_left_a_thread,
    },
    tcp::Rendezvous,
};
use suite::{Sums, soon, within};

const GENERATION: u64 = 3;

fn folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The stand-in, compiled with `flags` under a name of its own.
fn fake(name: &str, flags: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/nccl.c");
    let library = folder().join(format!("libfake-{name}.so"));
    let built = folder().join(format!("libfake-{name}-{}.so", std::process::id()));
    let status = Command::new("cc")
        .args([
            "-O1", "-g", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
        ])
        .arg(format!("-DLOG_DIR=\"{}\"", folder().display()))
        .args(flags)
        .arg("-o")
        .arg(&built)
        .arg(source)
        .arg("-lpthread")
        .status();
    let status = status.expect("these tests need a C compiler under the name cc");
    assert!(status.success(), "the stand-in does not compile");
    fs::rename(built, &library).unwrap();
    library
}

static FAKE: LazyLock<PathBuf> = LazyLock::new(|| fake("plain", &[]));

fn library() -> Library {
    Library::open(Some(&FAKE)).unwrap()
}

fn device(rank: usize) -> Device {
    Device::open(Driver::open(Some(&FAKE)).unwrap(), rank).unwrap()
}

/// An id that makes the stand-in follow `script`; names tell tests apart.
fn id(name: &str, script: &str) -> UniqueId {
    let mut bytes = format!("name={name};{script}").into_bytes();
    assert!(bytes.len() < 128, "{} bytes", bytes.len());
    bytes.resize(128, 0);
    UniqueId::try_from(&bytes[..]).unwrap()
}

/// What rank `rank` of a test asked the stand-in to do.
fn log(name: &str, rank: usize) -> Vec<String> {
    let log = fs::read_to_string(folder().join(format!("{name}.{rank}"))).unwrap();
    log.lines().map(str::to_owned).collect()
}

fn count(name: &str, rank: usize, start: &str) -> usize {
    let lines = log(name, rank);
    lines.iter().filter(|line| line.starts_with(start)).count()
}

fn connect(
    name: &str,
    script: &str,
    rank: usize,
    world: usize,
    deadline: Instant,
) -> Result<Nccl, CollectiveError> {
    let member = Member {
        rank,
        world,
        generation: GENERATION,
    };
    Nccl::connect(library(), &device(rank), member, id(name, script), deadline)
}

/// Runs `body` once per rank, each on its thread; the results in order of ranks.
fn group<R: Send>(
    name: &str,
    script: &str,
    world: usize,
    body: impl Fn(Nccl) -> R + Sync,
) -> Vec<R> {
    let body = &body;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..world)
            .map(|rank| {
                scope.spawn(move || body(connect(name, script, rank, world, soon()).unwrap()))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

fn floats(len: usize) -> Region {
    Region::HostF32(vec![1.0; len])
}

#[test]
fn worlds_of_one_to_four_follow_the_suite() {
    for world in 1..=4 {
        let name = format!("suite-{world}");
        group(&name, "", world, |mut nccl| {
            let device = device(nccl.rank());
            suite::healthy(&mut nccl, Sums::InTheOrderOfRanks);
            suite::device::healthy(&mut nccl, &device, Sums::InTheOrderOfRanks);
            Box::new(nccl).close(soon()).unwrap();
        });
        for rank in 0..world {
            let end = log(&name, rank).split_off(log(&name, rank).len() - 2);
            assert_eq!(end, ["finalize", "destroy"], "no abort after a close");
        }
    }
}

#[test]
fn an_operation_that_nccl_puts_on_the_stream_late_is_waited_for() {
    group("slow", "slow=20", 2, |mut nccl| {
        let device = device(nccl.rank());
        suite::sums(&mut nccl, Sums::InTheOrderOfRanks);
        suite::device::sums(&mut nccl, &device, Sums::InTheOrderOfRanks);
        suite::device::flights(&mut nccl, &device);
    });
}

#[test]
fn shards_of_unequal_lengths_are_one_group_and_equal_ones_one_call() {
    group("shards", "", 3, |mut nccl| {
        for op in [Op::ReduceScatterSum, Op::AllGather] {
            for len in [7, 9, 2] {
                nccl.run(op, floats(len), soon()).unwrap();
            }
        }
    });
    let expected = [
        "operation 0: r of 3, type 7, root 0",
        "operation 0: r of 2, type 7, root 1",
        "operation 0: r of 2, type 7, root 2",
        "operation 1: s of 3, type 7, root 0",
        "operation 2: r of 1, type 7, root 0",
        "operation 2: r of 1, type 7, root 1",
        "operation 3: b of 3, type 7, root 0",
        "operation 3: b of 2, type 7, root 1",
        "operation 3: b of 2, type 7, root 2",
        "operation 4: g of 3, type 7, root 0",
        "operation 5: b of 1, type 7, root 0",
        "operation 5: b of 1, type 7, root 1",
    ];
    for rank in 0..3 {
        assert_eq!(log("shards", rank)[1..13], expected);
    }
}

#[test]
fn a_silent_peer_ends_at_the_deadline_and_the_group_is_over() {
    let gate = Barrier::new(2);
    let errors = group("silent", "", 2, |mut nccl| {
        suite::silent_peer(&mut nccl, &gate)
    });
    let error = errors.into_iter().flatten().next().unwrap();
    assert_eq!(
        error.to_string(),
        "the deadline passed on rank 0 of 2, generation 3, while AllGather of 100 f32 (operation 0): under way; \
         NCCL does not say which rank is late"
    );
    for rank in 0..2 {
        assert_eq!(count("silent", rank, "abort"), 1, "once, also in the drop");
        assert_eq!(count("silent", rank, "destroy"), 0);
    }
}

#[test]
fn an_abort_of_another_thread_wakes_the_waiter_and_reaches_the_communicator() {
    let gate = Barrier::new(2);
    group("abort", "", 2, |mut nccl| {
        suite::abort_while_waiting(&mut nccl, &gate);
    });
    assert_eq!(count("abort", 0, "abort"), 1);
}

/// A world of one whose operation 1 fails as `script` says; its error.
fn failure(name: &str, script: &str) -> CollectiveError {
    let mut nccl = connect(name, script, 0, 1, soon()).unwrap();
    nccl.run(Op::AllReduceSum, floats(5), soon()).unwrap();
    let buffer = device(0).allocate(40).unwrap();
    let region = Region::Device(buffer.region(10, Element::F32));
    let error = nccl.run(Op::AllReduceSum, region.clone(), soon());
    let error = error.unwrap_err();
    let again = nccl.start(Op::AllReduceSum, region, GENERATION);
    assert_eq!(again.unwrap_err(), error, "a dead communicator says so");
    drop(nccl);
    assert_eq!(count(name, 0, "abort"), 1);
    assert_eq!(count(name, 0, "destroy") + count(name, 0, "finalize"), 0);
    error
}

const DURING: &str = "rank 0 of 1, generation 3, AllReduceSum of 10 device f32 (operation 1): ";

#[test]
fn an_error_at_any_place_is_told_with_its_function_and_ends_in_one_abort() {
    let remote = "NCCL says \"remote process exited or there was a network error\" (6)";
    for (name, script, expected) in [
        ("call", "call=6@1", format!("ncclAllReduce: {remote}")),
        ("end", "end=6@1", format!("ncclGroupEnd: {remote}")),
        (
            "late",
            "late=6@1",
            format!("ncclCommGetAsyncError: {remote}"),
        ),
        (
            "async",
            "async=6@1;say=peer closed the connection",
            format!(
                "ncclCommGetAsyncError: {remote}; its last message: peer closed the connection"
            ),
        ),
        // A code that no header of today knows.
        (
            "unknown",
            "async=77@1",
            "ncclCommGetAsyncError: NCCL says \"unknown result code\" (77)".into(),
        ),
        (
            "negative",
            "call=-5@1",
            "ncclAllReduce: NCCL says \"unknown result code\" (-5)".into(),
        ),
        // An abort that fails changes nothing for the caller.
        (
            "abort-fails",
            "end=6@1;abort=2",
            format!("ncclGroupEnd: {remote}"),
        ),
    ] {
        let error = failure(name, script);
        assert!(matches!(error, CollectiveError::Device { .. }));
        assert_eq!(error.to_string(), format!("{DURING}{expected}"));
    }
}

#[test]
fn a_failure_on_one_rank_leaves_the_other_to_its_deadline() {
    let errors = group("one-fails", "only=1;async=6@0", 2, |mut nccl| {
        nccl.run(Op::AllReduceSum, floats(5), within(300))
            .unwrap_err()
    });
    assert!(
        matches!(errors[0], CollectiveError::Stalled { .. }),
        "{}",
        errors[0]
    );
    assert!(
        matches!(errors[1], CollectiveError::Device { .. }),
        "{}",
        errors[1]
    );
}

#[test]
fn a_device_that_hangs_is_let_go_by_the_abort() {
    let mut nccl = connect("hang", "hang=1", 0, 1, soon()).unwrap();
    nccl.run(Op::AllReduceSum, floats(5), soon()).unwrap();
    let buffer = device(0).allocate(40).unwrap();
    let region = Region::Device(buffer.region(10, Element::F32));
    // The memory is the region's alone: the stand-in dies if it is freed while an operation has it.
    drop(buffer);
    let error = nccl.run(Op::AllReduceSum, region, within(50)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the deadline passed on rank 0 of 1, generation 3, while AllReduceSum of 10 device f32 (operation 1): on the device; \
         NCCL does not say which rank is late"
    );
    drop(nccl);
    assert_eq!(count("hang", 0, "abort"), 1);
}

#[test]
fn memory_that_the_device_never_lets_go_is_never_freed() {
    let mut nccl = connect("hold", "hang=0;hold=1", 0, 1, soon()).unwrap();
    let error = nccl.run(Op::AllReduceSum, floats(10), within(50));
    assert!(matches!(error, Err(CollectiveError::Stalled { .. })));
    drop(nccl);
    assert_eq!(count("hold", 0, "abort"), 1);
}

#[test]
fn a_call_that_blocks_inside_nccl_does_not_keep_the_waiter() {
    let mut nccl = connect("stuck", "stuck=1500@0", 0, 1, soon()).unwrap();
    let started = Instant::now();
    let error = nccl.run(Op::AllReduceSum, floats(10), within(50));
    assert!(matches!(error, Err(CollectiveError::Stalled { .. })));
    assert!(started.elapsed() < Duration::from_secs(1));
    drop(nccl);
    assert_eq!(
        count("stuck", 0, "abort"),
        1,
        "as soon as the call returned"
    );
}

#[test]
fn a_call_that_never_returns_is_left_behind_and_the_process_knows() {
    let mut nccl = connect("left", "stuck=30000@0", 0, 1, soon()).unwrap();
    let error = nccl.run(Op::AllReduceSum, floats(10), within(50));
    assert!(matches!(error, Err(CollectiveError::Stalled { .. })));
    assert!(!has_left_a_thread(), "it may still come back");
    let started = Instant::now();
    drop(nccl);
    assert!(has_left_a_thread());
    assert!((9..20).contains(&started.elapsed().as_secs()));
}

#[test]
fn a_failed_connection_is_told_and_aborted() {
    let failed = |name, script| connect(name, script, 0, 2, within(100)).err().unwrap();
    let during = "rank 0 of 2, generation 3, connecting with the other ranks: ";
    let system = "NCCL says \"unhandled system error (run with NCCL_DEBUG=INFO for details)\" (2)";
    assert_eq!(
        failed("init", "init=2").to_string(),
        format!("{during}ncclCommInitRankConfig: {system}")
    );
    assert_eq!(
        failed("init-late", "init_late=2;say=no route").to_string(),
        format!("{during}ncclCommGetAsyncError: {system}; its last message: no route")
    );
    assert_eq!(count("init-late", 0, "abort"), 1);
    // Rank 1 never comes.
    assert_eq!(
        failed("init-alone", "").to_string(),
        "the deadline passed on rank 0 of 2, generation 3, while connecting with the other ranks; NCCL does not say which \
         rank is late"
    );
    assert_eq!(count("init-alone", 0, "abort"), 1);
}

#[test]
#[ignore = "needs NCCL, but no device"]
fn nccl_itself_fails_in_words_where_no_other_rank_is() {
    // Without a device at its first call of CUDA, with one at the deadline.
    let library = Library::open(None).unwrap_or_else(|error| panic!("there is {error}"));
    let id = library.unique_id().unwrap();
    let member = Member {
        rank: 0,
        world: 2,
        generation: GENERATION,
    };
    let error = Nccl::connect(library, &device(0), member, id, within(2_000));
    let text = error.err().unwrap().to_string();
    println!("{text}");
    assert!(
        text.contains("NCCL says \"") || text.contains("deadline"),
        "{text}"
    );
}

#[test]
fn a_rank_outside_the_world_is_refused_before_nccl_sees_it() {
    let error = connect("outside", "", 2, 2, soon()).err().unwrap();
    assert_eq!(error.to_string(), "connect: rank 2 of a world of 2");
}

#[test]
fn a_close_that_the_others_do_not_join_ends_at_the_deadline_in_an_abort() {
    let nccl = connect("leave", "leave_hang=1", 0, 1, soon()).unwrap();
    let error = Box::new(nccl).close(within(50)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("leaving the group with the other ranks"),
        "{text}"
    );
    assert_eq!(log("leave", 0), ["init", "finalize", "abort"]);
}

#[test]
fn a_close_after_a_failure_tells_the_failure() {
    let mut nccl = connect("close-dead", "", 0, 1, soon()).unwrap();
    nccl.abort(GENERATION);
    let error = Box::new(nccl).close(soon()).unwrap_err();
    assert!(matches!(error, CollectiveError::Aborted { .. }), "{error}");
    assert_eq!(log("close-dead", 0), ["init", "abort"]);
}

#[test]
fn a_ticket_is_good_for_one_wait() {
    let mut nccl = connect("tickets", "", 0, 1, soon()).unwrap();
    let other = {
        let mut nccl = connect("tickets-other", "", 0, 1, soon()).unwrap();
        nccl.start(Op::AllGather, floats(1), GENERATION).unwrap()
    };
    let unknown = nccl.wait(other, soon());
    assert_eq!(unknown, Err(CollectiveError::UnknownTicket { sequence: 0 }));
    // Which did not end the group.
    nccl.run(Op::AllGather, floats(1), soon()).unwrap();
}

#[test]
fn too_large_a_region_is_the_devices_error() {
    let error = device(0).allocate(1 << 50).err().unwrap().to_string();
    assert_eq!(
        error,
        "allocate device memory on CUDA device 0: CUDA says \"out of memory\" (2)"
    );
    let driver = Driver::open(Some(&FAKE)).unwrap();
    let error = Device::open(driver, 99).err().unwrap().to_string();
    assert_eq!(
        error,
        "open CUDA device 99: CUDA says \"invalid device ordinal\" (101)"
    );
    assert_eq!(driver.devices().unwrap(), 8);
}

#[test]
fn the_id_travels_over_a_door_of_tcp() {
    let listeners = [(); 3].map(|()| Rendezvous::bind([127, 0, 0, 1].into()).unwrap());
    let addresses: Vec<String> = listeners.iter().map(Rendezvous::address).collect();
    std::thread::scope(|scope| {
        for (rank, listener) in listeners.into_iter().enumerate() {
            let addresses = &addresses;
            scope.spawn(move || {
                let mut door = listener
                    .connect(rank, addresses, GENERATION, [5; 32], soon())
                    .unwrap();
                let mut nccl =
                    Nccl::connect_over(&mut door, library(), &device(rank), soon()).unwrap();
                suite::healthy(&mut nccl, Sums::InTheOrderOfRanks);
                let buffer = device(rank).allocate(4).unwrap();
                let region = Region::Device(buffer.region(1, Element::F32));
                let refused = door.start(Op::AllReduceSum, region, GENERATION);
                let refused = refused.unwrap_err().to_string();
                assert!(refused.contains("needs NCCL"), "{refused}");
                Box::new(nccl).close(soon()).unwrap();
            });
        }
    });
}

#[test]
fn an_end_of_the_door_ends_a_connection_that_waits_for_a_rank() {
    let listeners = [(); 2].map(|()| Rendezvous::bind([127, 0, 0, 1].into()).unwrap());
    let addresses: Vec<String> = listeners.iter().map(Rendezvous::address).collect();
    let [first, second] = listeners;
    std::thread::scope(|scope| {
        let addresses = &addresses;
        let waiting = scope.spawn(move || {
            let door = first.connect(0, addresses, GENERATION, [5; 32], soon());
            let mut door = door.unwrap();
            let aborter = door.aborter();
            let ending = scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                aborter.abort(GENERATION, "the coordinator says so");
            });
            let late = Instant::now() + Duration::from_mins(5);
            let error = Nccl::connect_over(&mut door, library(), &device(0), late).err();
            ending.join().unwrap();
            error.unwrap()
        });
        // It takes the id, and never connects.
        let mut door = second
            .connect(1, addresses, GENERATION, [5; 32], soon())
            .unwrap();
        let empty = Region::HostBytes(Vec::new());
        door.run(Op::Broadcast { root: 0 }, empty, soon()).unwrap();
        let start = Instant::now();
        let error = waiting.join().unwrap();
        assert!(start.elapsed() < Duration::from_secs(5), "{error}");
        assert!(matches!(error, CollectiveError::Aborted { .. }), "{error}");
    });
}

#[test]
fn versions_that_do_not_work_are_refused_with_a_cure() {
    for (code, expected) in [
        (
            "21704",
            "NCCL 2.17.4 in LIB is too old: 2.18.0 is the oldest that works",
        ),
        (
            "22501",
            "NCCL 2.25.1 in LIB is known to be faulty (2.25.1): use 2.25.2 or newer, or an older release",
        ),
        (
            "22807",
            "NCCL 2.28.7 in LIB is known to be faulty (2.28.3 to 2.28.8): use 2.28.9 or newer, or an older release",
        ),
        ("-3", "NCCL -3 in LIB is of no version that there is"),
    ] {
        let path = fake(code, &[&format!("-DVERSION={code}")]);
        let error = Library::open(Some(&path)).err().unwrap().to_string();
        assert_eq!(error, expected.replace("LIB", &path.display().to_string()));
    }
    assert_eq!(library().version(), Version::new(2, 30, 7));
}

#[test]
fn a_library_without_a_needed_function_is_refused() {
    let path = fake("incomplete", &["-DWITHOUT_ABORT"]);
    let error = Library::open(Some(&path)).err().unwrap();
    let text = CollectiveError::from(error).to_string();
    assert!(text.contains("has no function ncclCommAbort"), "{text}");
}

#[test]
fn the_environment_for_equal_bits_leaves_nccl_no_choice() {
    let names = deterministic_environment().map(|(name, _)| name);
    assert_eq!(names, ["NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE"]);
}

/// [`group`] with a door of TCP kept beside NCCL.
fn pairs<R: Send>(
    name: &str,
    script: &str,
    world: usize,
    body: impl Fn(Pair) -> R + Sync,
) -> Vec<R> {
    let doors: Vec<_> = (0..world)
        .map(|_| Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap())
        .collect();
    let addresses: Vec<String> = doors.iter().map(Rendezvous::address).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = doors
            .into_iter()
            .enumerate()
            .map(|(rank, door)| {
                let (addresses, body) = (&addresses, &body);
                scope.spawn(move || {
                    let tcp = door.connect(rank, addresses, GENERATION, [2; 32], soon());
                    let nccl = connect(name, script, rank, world, soon()).unwrap();
                    body(Pair::new(tcp.unwrap(), nccl))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

#[test]
fn a_pair_follows_the_suite_with_regions_of_both_kinds() {
    for world in 1..=4 {
        let name = format!("pair-{world}");
        pairs(&name, "", world, |mut pair| {
            assert!(pair.takes_devices());
            let device = device(pair.rank());
            suite::healthy(&mut pair, Sums::InTheOrderOfRanks);
            suite::sends(&mut pair);
            suite::device::sums(&mut pair, &device, Sums::InTheOrderOfRanks);
            suite::device::gathers(&mut pair, &device);
            suite::device::mirrors(&mut pair, &device);
            suite::device::broadcasts(&mut pair, &device);
            Box::new(pair).close(soon()).unwrap();
        });
        for rank in 0..world {
            assert_eq!(count(&name, rank, "abort"), 0);
            // What lies on the host has gone over TCP: bytes travel over NCCL once, in the device's broadcasts.
            let bytes = log(&name, rank)
                .iter()
                .filter(|it| it.contains("type 1,"))
                .count();
            assert_eq!(bytes, 1, "{:?}", log(&name, rank));
        }
    }
}

#[test]
fn a_peer_that_is_gone_ends_both_ways_with_the_next_operation_over_tcp() {
    let results = pairs("pair-lost", "hang=0", 2, |mut pair| {
        let device = device(pair.rank());
        let buffer = device.allocate(400).unwrap();
        let region = Region::Device(buffer.region(100, Element::F32));
        let ticket = pair.start(Op::AllReduceSum, region, GENERATION).unwrap();
        if pair.rank() == 1 {
            return None;
        }
        let error = pair.run(Op::AllReduceSum, floats(10), within(60_000));
        Some((
            error.unwrap_err(),
            pair.wait(ticket, within(60_000)).unwrap_err(),
        ))
    });
    let (lost, other) = results.into_iter().flatten().next().unwrap();
    assert_eq!(lost.suspect().map(|peer| peer.rank), Some(1), "{lost}");
    assert!(
        other.to_string().contains("the other way failed"),
        "{other}"
    );
}

#[test]
fn an_abort_ends_both_ways_and_gives_the_hosts_regions_back() {
    pairs("pair-abort", "hang=0", 2, |mut pair| {
        let device = device(pair.rank());
        let buffer = device.allocate(400).unwrap();
        let region = Region::Device(buffer.region(100, Element::F32));
        let there = pair.start(Op::AllReduceSum, region, GENERATION).unwrap();
        let here = pair.start(Op::AllReduceSum, floats(10), GENERATION);
        drop(here.unwrap());
        pair.aborter().abort(GENERATION + 1, "another generation");
        pair.aborter().abort(GENERATION, "the job stops");
        let error = pair.wait(there, soon()).unwrap_err().to_string();
        assert!(error.contains("the job stops"), "{error}");
        assert!(pair.check().is_err());
        let regions = Box::new(pair).reclaim();
        assert_eq!(regions.len(), 1);
        assert_eq!(regions[0].len(), 10);
    });
}

//! NCCL on a device. Only here do NCCL and CUDA themselves run; everything around them is tested without a device in
//! `nccl_without_device.rs`. To run it, `cargo test -p collective --features nccl --test nccl -- --ignored --test-threads=1`.
//!
//! Ranks are processes, as in a job: this program starts itself once per rank. With fewer GPUs than ranks they share one, which
//! is slow; one test at a time keeps the tests from sharing it too.
#![allow(missing_docs, clippy::unwrap_used)]

mod suite;

use std::{
    env,
    fmt::Write,
    net::{IpAddr, Ipv4Addr},
    process::{Command, Stdio},
    time::Instant,
};

use collective::{
    Collective, CollectiveError, Element, Op, Region,
    nccl::{Device, Driver, Library, Member, Nccl, UniqueId, Version, deterministic_environment},
    tcp::Rendezvous,
};
use suite::{Sums, soon, within};

/// How a process learns which rank it is: `rank world id-in-hex what`.
const RANK: &str = "COLLECTIVE_TEST_RANK";
const GENERATION: u64 = 7;

fn library() -> Library {
    Library::open(None)
        .unwrap_or_else(|error| panic!("this test was asked for, but there is {error}"))
}

fn driver() -> Driver {
    Driver::open(None)
        .unwrap_or_else(|error| panic!("this test was asked for, but there is {error}"))
}

fn device(rank: usize) -> Device {
    let devices = driver().devices().unwrap();
    assert!(
        devices > 0,
        "this test was asked for and needs a CUDA device"
    );
    Device::open(driver(), rank % devices).unwrap()
}

fn alone(id: UniqueId) -> Nccl {
    let member = Member {
        rank: 0,
        world: 1,
        generation: GENERATION,
    };
    Nccl::connect(library(), &device(0), member, id, soon()).unwrap()
}

#[test]
#[ignore = "needs NCCL, but no device"]
fn nccl_is_found_by_its_name_and_makes_ids() {
    let library = library();
    println!("NCCL {}", library.version());
    let [one, other] = [(); 2].map(|()| library.unique_id().unwrap());
    assert!(one != other, "{one:?}, {other:?}");
}

#[test]
#[ignore = "needs a CUDA device and NCCL"]
fn a_world_of_one_follows_the_suite() {
    let mut nccl = alone(library().unique_id().unwrap());
    suite::healthy(&mut nccl, Sums::InTheOrderOfRanks);
    suite::device::healthy(&mut nccl, &device(0), Sums::InTheOrderOfRanks);
    Box::new(nccl).close(soon()).unwrap();
}

#[test]
#[ignore = "needs a CUDA device and NCCL"]
fn generations_follow_each_other_whether_closed_or_dropped() {
    for round in 0..4 {
        let mut nccl = alone(library().unique_id().unwrap());
        let sum = nccl.run(Op::AllReduceSum, Region::HostF64(vec![2.5]), soon());
        assert_eq!(sum.unwrap().into_f64(), [2.5]);
        if round % 2 == 0 {
            Box::new(nccl).close(soon()).unwrap();
        }
    }
}

#[test]
#[ignore = "needs a CUDA device and NCCL"]
fn a_rank_that_never_comes_ends_at_the_deadline() {
    let member = Member {
        rank: 0,
        world: 2,
        generation: GENERATION,
    };
    let started = Instant::now();
    let id = library().unique_id().unwrap();
    let error = Nccl::connect(library(), &device(0), member, id, within(3_000));
    let error = error.err().unwrap();
    assert!(matches!(error, CollectiveError::Stalled { .. }), "{error}");
    assert!(
        started.elapsed().as_secs() < 15,
        "the abort took {:?}",
        started.elapsed()
    );
    // The device is as good as before.
    let nccl = alone(library().unique_id().unwrap());
    Box::new(nccl).close(soon()).unwrap();
}

#[test]
#[ignore = "needs a CUDA device and NCCL"]
fn the_id_travels_over_a_door_of_tcp() {
    let listener = Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let addresses = [listener.address()];
    let mut door = listener
        .connect(0, &addresses, GENERATION, [1; 32], soon())
        .unwrap();
    let mut nccl = Nccl::connect_over(&mut door, library(), &device(0), soon()).unwrap();
    assert_eq!((nccl.world(), nccl.generation()), (1, GENERATION));
    suite::doubles(&mut nccl);
    Box::new(nccl).close(soon()).unwrap();
}

#[test]
#[ignore = "needs a CUDA device and NCCL"]
fn two_processes_follow_the_suite() {
    processes(2, "healthy");
}

#[test]
#[ignore = "needs a CUDA device and NCCL"]
fn three_processes_follow_the_suite() {
    processes(3, "healthy");
}

#[test]
#[ignore = "needs a CUDA device and NCCL"]
fn a_killed_process_ends_the_other_at_its_deadline() {
    processes(2, "killed");
}

/// Runs [`a_rank_of_a_group`] in `world` processes, and expects all to succeed.
fn processes(world: usize, what: &str) {
    let devices = driver().devices().unwrap();
    // Ranks that share a GPU: since 2.30 NCCL lets them when told to. Before, it refuses two ranks on one GPU of one host, so each
    // is told a host of its own, and they talk over sockets.
    let shared = devices < world;
    let allowed = library().version() >= Version::new(2, 30, 0);
    // The id waits for its ranks in this process.
    let id = library().unique_id().unwrap();
    let mut hex = String::new();
    for byte in id.as_bytes() {
        write!(hex, "{byte:02x}").unwrap();
    }
    let children: Vec<_> = (0..world)
        .map(|rank| {
            let mut command = Command::new(env::current_exe().unwrap());
            if shared && !allowed {
                command.env("NCCL_HOSTID", format!("rank-{rank}"));
            } else if shared {
                command.env("NCCL_MULTI_RANK_GPU_ENABLE", "1");
            }
            command
                .args(["--ignored", "--exact", "a_rank_of_a_group", "--nocapture"])
                .env(RANK, format!("{rank} {world} {hex} {what}"))
                .envs(deterministic_environment())
                .stdin(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    let ends: Vec<_> = children
        .into_iter()
        .map(|mut child| child.wait().unwrap())
        .collect();
    let last = ends.len() - 1;
    for (rank, end) in ends.into_iter().enumerate() {
        let killed = what == "killed" && rank == last;
        assert!(end.success() != killed, "rank {rank} of {world}: {end}");
    }
}

/// Does nothing by itself: the tests of processes start it.
#[test]
#[ignore = "needs a CUDA device and NCCL"]
fn a_rank_of_a_group() {
    let Ok(told) = env::var(RANK) else {
        println!("this process is no rank of a group: nothing to do");
        return;
    };
    let told: Vec<&str> = told.split(' ').collect();
    let [rank, world, hex, what] = told[..] else {
        panic!("{RANK} is {told:?}")
    };
    let (rank, world) = (rank.parse().unwrap(), world.parse().unwrap());
    let id: Vec<u8> = (0..hex.len() / 2)
        .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap())
        .collect();
    let member = Member {
        rank,
        world,
        generation: GENERATION,
    };
    let id = UniqueId::try_from(&id[..]).unwrap();
    let device = device(rank);
    let mut nccl = Nccl::connect(library(), &device, member, id, soon()).unwrap();
    if what == "killed" {
        suite::doubles(&mut nccl);
        if rank == world - 1 {
            std::process::abort();
        }
        let buffer = device.allocate(4000).unwrap();
        let region = Region::Device(buffer.region(1000, Element::F32));
        let started = Instant::now();
        let error = nccl.run(Op::AllReduceSum, region, within(5_000));
        println!("rank {rank}: {}", error.unwrap_err());
        drop(nccl);
        assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
        return;
    }
    suite::healthy(&mut nccl, Sums::InAnyOrder);
    suite::device::healthy(&mut nccl, &device, Sums::InAnyOrder);
    Box::new(nccl).close(soon()).unwrap();
}

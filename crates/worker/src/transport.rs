//! What the ranks of a generation reduce over: TCP, or TCP and NCCL together among workers with a GPU each. NCCL's id travels
//! over TCP's connections, so that the coordinator knows nothing of it.

use std::time::Instant;

use clap::ValueEnum;
use collective::tcp::Tcp;
use collective::{Collective, CollectiveError, Op, Region};
use model::Device;

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Choice {
    /// NCCL where every worker has a GPU of its own and the library, else TCP.
    #[default]
    Auto,
    /// TCP, through the host's memory.
    Tcp,
    /// NCCL, or an error that says what is missing.
    Nccl,
}

/// What is there.
#[derive(Clone)]
pub(crate) struct Transport {
    #[cfg(feature = "cuda")]
    nccl: Option<(collective::nccl::Library, collective::nccl::Device)>,
    offer: Offer,
}

/// What one rank tells the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Offer {
    /// It can use NCCL.
    can: bool,
    /// It must.
    must: bool,
    /// Which GPU of all machines it has: equal for one and the same.
    gpu: u64,
}

/// Bits of a GPU's number, which travels as an f64.
#[cfg(any(feature = "cuda", test))]
const GPU_BITS: u32 = 52;

/// What all ranks do, by what they all have told.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Agreement {
    Nccl,
    /// With the reason if some of them could have used NCCL.
    Tcp(Option<String>),
    Refused(String),
}

impl Transport {
    /// Finds the libraries of `choice` for a worker on `device`.
    ///
    /// # Errors
    /// What NCCL lacks if it is asked for, with the cure.
    pub(crate) fn open(choice: Choice, device: &Device) -> anyhow::Result<Self> {
        match choice {
            Choice::Auto if !device.is_gpu() => Ok(Self::tcp()),
            Choice::Auto => Ok(Self::nccl(device, false).unwrap_or_else(|error| {
                tracing::warn!("gradients go over TCP and not over NCCL: {error:#}");
                Self::tcp()
            })),
            Choice::Tcp => Ok(Self::tcp()),
            Choice::Nccl => Self::nccl(device, true),
        }
    }

    fn tcp() -> Self {
        Self {
            #[cfg(feature = "cuda")]
            nccl: None,
            offer: Offer::default(),
        }
    }

    #[cfg(feature = "cuda")]
    fn nccl(device: &Device, must: bool) -> anyhow::Result<Self> {
        use anyhow::Context;
        use collective::nccl::{Device, Driver, Library};

        let gpu = device.gpu();
        let gpu = gpu.context("--collective nccl: this worker does not compute on a GPU")?;
        let library = Library::open(None)?;
        let opened = Device::open(Driver::open(None)?, gpu.ordinal())?;
        let uuid = gpu.uuid()?;
        Ok(Self {
            nccl: Some((library, opened)),
            offer: Offer {
                can: true,
                must,
                gpu: (uuid >> (u128::BITS - GPU_BITS)) as u64,
            },
        })
    }

    #[cfg(not(feature = "cuda"))]
    fn nccl(_: &Device, _: bool) -> anyhow::Result<Self> {
        anyhow::bail!(
            "--collective nccl: this program was built without CUDA; build with --features cuda, or leave it out"
        )
    }

    /// The ranks' collective, once all of them have told each other over `door` what they have.
    ///
    /// # Errors
    /// What the collective says; at all ranks if one of them must use NCCL and another cannot.
    pub(crate) fn connect(
        &self,
        mut door: Tcp,
        deadline: Instant,
    ) -> Result<Box<dyn Collective>, CollectiveError> {
        let offers = tell(&mut door, self.offer, deadline)?;
        match agree(&offers) {
            Agreement::Tcp(reason) => {
                if let Some(reason) = reason {
                    tracing::info!("gradients go over TCP: {reason}");
                }
                Ok(Box::new(door))
            }
            Agreement::Refused(cause) => Err(CollectiveError::Local {
                what: "agree on a collective".into(),
                cause,
            }),
            Agreement::Nccl => self.pair(door, deadline),
        }
    }

    #[cfg(feature = "cuda")]
    fn pair(
        &self,
        mut door: Tcp,
        deadline: Instant,
    ) -> Result<Box<dyn Collective>, CollectiveError> {
        use collective::nccl::{Nccl, Pair};

        let (library, device) = self.nccl.as_ref().expect("all ranks can");
        let nccl = Nccl::connect_over(&mut door, *library, device, deadline)?;
        tracing::info!(version = %library.version(), "gradients go over NCCL");
        Ok(Box::new(Pair::new(door, nccl)))
    }

    #[cfg(not(feature = "cuda"))]
    #[allow(
        clippy::unused_self,
        clippy::needless_pass_by_value,
        reason = "as with the feature"
    )]
    fn pair(&self, _: Tcp, _: Instant) -> Result<Box<dyn Collective>, CollectiveError> {
        unreachable!("this rank has told the others that it cannot")
    }
}

/// Every rank's offer, in their order.
fn tell(
    door: &mut dyn Collective,
    own: Offer,
    deadline: Instant,
) -> Result<Vec<Offer>, CollectiveError> {
    let (rank, world) = (door.rank(), door.world());
    let mut slots = vec![0.0; 3 * world];
    slots[3 * rank] = f64::from(u8::from(own.can));
    slots[3 * rank + 1] = f64::from(u8::from(own.must));
    slots[3 * rank + 2] = own.gpu as f64;
    let slots = door.run(Op::AllReduceSum, Region::HostF64(slots), deadline)?;
    let offers = slots.into_f64();
    let offers = offers.chunks_exact(3).map(|slots| Offer {
        can: slots[0] != 0.0,
        must: slots[1] != 0.0,
        gpu: slots[2] as u64,
    });
    Ok(offers.collect())
}

/// The same at all ranks, as they hear the same.
fn agree(offers: &[Offer]) -> Agreement {
    let (world, can) = (offers.len(), offers.iter().filter(|it| it.can).count());
    let must = offers.iter().filter(|it| it.must).count();
    if can < world {
        let reason = format!("{can} of {world} workers can use NCCL");
        return if must > 0 {
            Agreement::Refused(format!(
                "{reason}, and {must} were started with --collective nccl; start all of them on GPUs with it, or none"
            ))
        } else {
            Agreement::Tcp((can > 0).then_some(reason))
        };
    }
    let twins = (0..world).find_map(|rank| {
        let mut before = offers[..rank].iter();
        let twin = before.position(|it| it.gpu == offers[rank].gpu)?;
        Some((twin, rank))
    });
    match twins {
        // NCCL's newest versions allow it where they are told to: who must, may try.
        Some((one, other)) if must == 0 => {
            Agreement::Tcp(Some(format!("ranks {one} and {other} share a GPU")))
        }
        _ => Agreement::Nccl,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};
    use std::time::Duration;

    use collective::tcp::Rendezvous;

    use super::*;

    fn offer(can: bool, must: bool, gpu: u64) -> Offer {
        Offer { can, must, gpu }
    }

    #[test]
    fn nccl_is_taken_where_every_rank_has_it_and_a_gpu_of_its_own() {
        let nothing = Offer::default();
        let can = |gpu| offer(true, false, gpu);
        let must = |gpu| offer(true, true, gpu);
        assert_eq!(agree(&[can(1), can(2), must(3)]), Agreement::Nccl);
        assert_eq!(agree(&[must(1), must(1)]), Agreement::Nccl);
        assert_eq!(agree(&[nothing, nothing]), Agreement::Tcp(None));
        let reason = |offers: &[Offer]| match agree(offers) {
            Agreement::Tcp(Some(reason)) | Agreement::Refused(reason) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            reason(&[can(4), can(1), can(4)]),
            "ranks 0 and 2 share a GPU"
        );
        assert_eq!(reason(&[can(4), nothing]), "1 of 2 workers can use NCCL");
        let refused = agree(&[must(4), nothing, can(5)]);
        assert!(matches!(refused, Agreement::Refused(_)), "{refused:?}");
        let words = reason(&[must(4), nothing, can(5)]);
        assert!(words.contains("2 of 3 workers can"), "{words}");
        assert!(words.contains("--collective nccl"), "{words}");
    }

    #[test]
    fn every_rank_hears_every_offer() {
        let own = |rank: usize| offer(rank != 1, rank == 2, (1 << GPU_BITS) - 1 - rank as u64);
        let doors: Vec<_> = (0..3)
            .map(|_| Rendezvous::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).expect("a door"))
            .collect();
        let addresses: Vec<String> = doors.iter().map(Rendezvous::address).collect();
        let addresses = &addresses;
        std::thread::scope(|scope| {
            for (rank, door) in doors.into_iter().enumerate() {
                scope.spawn(move || {
                    let deadline = Instant::now() + Duration::from_secs(30);
                    let door = door.connect(rank, addresses, 1, [7; 32], deadline);
                    let heard = tell(&mut door.expect("the others"), own(rank), deadline);
                    let expected: Vec<_> = (0..3).map(own).collect();
                    assert_eq!(heard.expect("an answer"), expected);
                });
            }
        });
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_refuses_nccl_and_does_not_miss_it() {
        let refused = Transport::open(Choice::Nccl, &Device::flex());
        let error = refused.err().expect("no CUDA in this build");
        assert!(error.to_string().contains("--features cuda"), "{error}");
        for choice in [Choice::Auto, Choice::Tcp] {
            assert!(
                !Transport::open(choice, &Device::flex())
                    .expect("TCP")
                    .offer
                    .can
            );
        }
    }
}

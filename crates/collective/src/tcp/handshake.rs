//! Both sides of a new connection prove that they hold the generation's secret, by keyed BLAKE3 over fresh nonces. Nothing
//! secret travels, and a recorded handshake is worth nothing later.
//!
//! ```text
//! dialer  ─► hello: magic 8 · generation 8 · from 8 · to 8 · world 8 · nonce 32
//! acceptor─► nonce 32 · MAC(secret, "accept" ‖ hello ‖ nonce)          the dialer checks
//! dialer  ─► MAC(secret, "dial" ‖ hello ‖ nonce)                       the acceptor checks
//! acceptor─► verdict 1 · own generation 8
//! ```
//! The two MACs differ in their label, so neither side's answer can be played back as the other's.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

const HELLO_BYTES: usize = 72;
const MAGIC: &[u8; 8] = b"CALDPOh1";

const WELCOME: u8 = 0;
const WRONG_SECRET: u8 = 1;
const WRONG_GENERATION: u8 = 2;
const WRONG_RANK: u8 = 3;

/// Who this process is in which group.
pub(super) struct Group {
    pub(super) generation: u64,
    pub(super) world: usize,
    pub(super) rank: usize,
    pub(super) secret: [u8; 32],
}

impl Group {
    fn proof(&self, label: &str, hello: &[u8; HELLO_BYTES], nonce: &[u8; 32]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(b"caldpo collective ");
        hasher.update(label.as_bytes());
        hasher.update(hello);
        hasher.update(nonce);
        hasher.finalize()
    }
}

/// Proves this rank to rank `to` and checks it; the reason if there is no understanding.
pub(super) fn dial(
    group: &Group,
    to: usize,
    stream: &TcpStream,
    deadline: Instant,
) -> Result<(), String> {
    let mut wire = Timed { stream, deadline };
    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(MAGIC);
    let numbers = [
        group.generation,
        group.rank as u64,
        to as u64,
        group.world as u64,
    ];
    hello[8..40].copy_from_slice(bytemuck::cast_slice(&numbers));
    hello[40..].copy_from_slice(&nonce()?);
    wire.send(&hello)?;
    let challenge: [u8; 32] = wire.receive()?;
    let answer = blake3::Hash::from_bytes(wire.receive()?);
    // `Hash` compares in constant time.
    if answer != group.proof("accept", &hello, &challenge) {
        return Err("the other side does not hold this generation's secret".into());
    }
    wire.send(group.proof("dial", &hello, &challenge).as_bytes())?;
    let [verdict] = wire.receive()?;
    let theirs = u64::from_le_bytes(wire.receive()?);
    match verdict {
        WELCOME => Ok(()),
        WRONG_SECRET => Err("the other side does not take this rank's secret".into()),
        WRONG_GENERATION => Err(format!(
            "stale generation: it is in generation {theirs}, this rank in {}",
            group.generation
        )),
        _ => Err(format!(
            "it does not expect rank {} of {} at its address",
            group.rank, group.world
        )),
    }
}

/// Checks a caller; its rank, or the reason for turning it away.
pub(super) fn accept(
    group: &Group,
    stream: &TcpStream,
    deadline: Instant,
) -> Result<usize, String> {
    let mut wire = Timed { stream, deadline };
    let hello: [u8; HELLO_BYTES] = wire.receive()?;
    if &hello[..8] != MAGIC {
        return Err("it does not speak this protocol".into());
    }
    let challenge = nonce()?;
    wire.send(&challenge)?;
    wire.send(group.proof("accept", &hello, &challenge).as_bytes())?;
    let answer = blake3::Hash::from_bytes(wire.receive()?);
    let mut numbers = [0u64; 4];
    bytemuck::cast_slice_mut(&mut numbers).copy_from_slice(&hello[8..40]);
    let [generation, from, to, world] = numbers;
    let expected = group.rank + 1..group.world;
    let (verdict, reason) = if answer != group.proof("dial", &hello, &challenge) {
        (WRONG_SECRET, "wrong secret".into())
    } else if generation != group.generation {
        (WRONG_GENERATION, format!("generation {generation}"))
    } else if to != group.rank as u64
        || world != group.world as u64
        || !expected.contains(&(from as usize))
    {
        let reason = format!("rank {from} of {world} calling rank {to}");
        (WRONG_RANK, reason)
    } else {
        (WELCOME, String::new())
    };
    // A stranger learns nothing; only who proved the secret is told the generation.
    let told = if verdict == WRONG_SECRET {
        0
    } else {
        group.generation
    };
    wire.send(&[verdict])?;
    wire.send(&told.to_le_bytes())?;
    if verdict == WELCOME {
        Ok(from as usize)
    } else {
        Err(reason)
    }
}

fn nonce() -> Result<[u8; 32], String> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(|error| format!("no random bytes: {error}"))?;
    Ok(nonce)
}

/// A stream whose reads and writes together end by one deadline, however slowly the other side drips.
struct Timed<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> Result<Duration, String> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err("no handshake within the deadline".into());
        }
        Ok(left)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        let left = self.left()?;
        self.stream
            .set_write_timeout(Some(left))
            .and_then(|()| self.stream.write_all(bytes))
            .map_err(|error| explain(&error))
    }

    fn receive<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        let mut filled = 0;
        while filled < N {
            let left = self.left()?;
            self.stream
                .set_read_timeout(Some(left))
                .map_err(|error| error.to_string())?;
            match self.stream.read(&mut bytes[filled..]) {
                Ok(0) => return Err("it closed the connection during the handshake".into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(explain(&error)),
            }
        }
        Ok(bytes)
    }
}

fn explain(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "no handshake within the deadline".into(),
        _ => error.to_string(),
    }
}

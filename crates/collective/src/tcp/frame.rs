//! The header before every payload: what the sender thinks the ranks are doing. It exists so that ranks which run different
//! operations find out at the first byte instead of adding unrelated numbers.
//!
//! ```text
//! offset  bytes
//!      0      8  magic "CALDPOc1"
//!      8      8  generation                     little-endian, as all numbers
//!     16      8  sequence: operations since the rendezvous
//!     24      8  elements of the whole region
//!     32      8  bytes of payload that follow
//!     40      1  operation   0 all-reduce, 1 reduce-scatter, 2 all-gather, 3 broadcast, 4 mirror, 5 send
//!     41      1  phase       0 parts to their owner, 1 sums or whole regions from their owner
//!     42      1  element     4 f32, 8 f64, 2 bf16, 1 bytes
//!     43      5  zero
//!     48      8  root of a broadcast; of a send the receiver, and 2³² times the sender; else 0
//! ```

use std::fmt;

use crate::Op;

pub(super) const FRAME_BYTES: usize = 56;
const MAGIC: u64 = u64::from_le_bytes(*b"CALDPOc1");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) generation: u64,
    pub(super) sequence: u64,
    pub(super) elements: u64,
    pub(super) payload_bytes: u64,
    pub(super) op: Op,
    pub(super) phase: u8,
    pub(super) element_bytes: u8,
}

impl Frame {
    pub(super) fn encode(&self) -> [u8; FRAME_BYTES] {
        let (op, root) = match self.op {
            Op::AllReduceSum => (0, 0),
            Op::ReduceScatterSum => (1, 0),
            Op::AllGather => (2, 0),
            Op::Broadcast { root } => (3, root as u64),
            Op::Mirror => (4, 0),
            Op::Send { from, to } => (5, (from as u64) << 32 | to as u64),
        };
        let kind = u64::from_le_bytes([op, self.phase, self.element_bytes, 0, 0, 0, 0, 0]);
        let words = [
            MAGIC,
            self.generation,
            self.sequence,
            self.elements,
            self.payload_bytes,
            kind,
            root,
        ];
        let mut bytes = [0; FRAME_BYTES];
        bytes.copy_from_slice(bytemuck::cast_slice(&words));
        bytes
    }

    /// The frame, or what stands there instead.
    pub(super) fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, String> {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
            u64::from_le_bytes(word)
        };
        if word(0) != MAGIC {
            return Err("bytes that are no frame".into());
        }
        let [op, phase, element_bytes, ..] = word(5).to_le_bytes();
        let op = match op {
            0 => Op::AllReduceSum,
            1 => Op::ReduceScatterSum,
            2 => Op::AllGather,
            3 => Op::Broadcast {
                root: word(6) as usize,
            },
            4 => Op::Mirror,
            5 => Op::Send {
                from: (word(6) >> 32) as usize,
                to: word(6) as u32 as usize,
            },
            other => return Err(format!("a frame of the unknown operation {other}")),
        };
        Ok(Self {
            generation: word(1),
            sequence: word(2),
            elements: word(3),
            payload_bytes: word(4),
            op,
            phase,
            element_bytes,
        })
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "operation {} of generation {} ({:?} of {} elements of {} bytes, phase {}, {} bytes)",
            self.sequence,
            self.generation,
            self.op,
            self.elements,
            self.element_bytes,
            self.phase,
            self.payload_bytes
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_frame_survives_its_bytes_and_foreign_bytes_are_refused() {
        let frame = Frame {
            generation: 7,
            sequence: 8,
            elements: 9,
            payload_bytes: 10,
            op: Op::Broadcast { root: 3 },
            phase: 1,
            element_bytes: 4,
        };
        assert_eq!(Frame::decode(&frame.encode()).unwrap(), frame);
        assert!(Frame::decode(&[0; FRAME_BYTES]).is_err());
        let mut unknown = frame.encode();
        unknown[40] = 9;
        assert!(Frame::decode(&unknown).unwrap_err().contains("unknown"));
    }
}

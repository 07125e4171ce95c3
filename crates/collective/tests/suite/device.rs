//! What a collective of GPUs must do with regions of device memory; needs the feature `nccl`.
#![cfg(feature = "nccl")]

use collective::{
    Collective, CollectiveError, Element, Op, Region,
    nccl::{Buffer, Device, Nccl},
    shard_range,
};

use super::{LENS, Sums, bits, check_equal_everywhere, check_sums, soon, values};

/// All bodies.
pub fn healthy(nccl: &mut Nccl, device: &Device, rule: Sums) {
    sums(nccl, device, rule);
    gathers(nccl, device);
    mirrors(nccl, device);
    broadcasts(nccl, device);
    flights(nccl, device);
    refusals(nccl, device);
}

fn buffer_of(device: &Device, bytes: &[u8]) -> Buffer {
    let buffer = device.allocate(bytes.len()).unwrap();
    buffer.write(bytes).unwrap();
    buffer
}

fn floats(device: &Device, values: &[f32]) -> Buffer {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    buffer_of(device, &bytes)
}

fn read(buffer: &Buffer, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    buffer.read(&mut bytes).unwrap();
    bytes
}

fn read_floats(buffer: &Buffer, len: usize) -> Vec<f32> {
    read(buffer, len * 4)
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

pub fn sums(nccl: &mut dyn Collective, device: &Device, rule: Sums) {
    let (rank, world) = (nccl.rank(), nccl.world());
    for len in LENS {
        let buffer = floats(device, &values(rank, len));
        let region = buffer.region_when_ready(len, Element::F32).unwrap();
        assert!(region.ready().is_some());
        let all = nccl.run(Op::AllReduceSum, Region::Device(region.clone()), soon());
        let all = all.unwrap().into_device();
        assert!(all == region && all.ready().is_none());
        let all = read_floats(&buffer, len);
        check_sums(&all, 0..len, len, world, rule);
        check_equal_everywhere(nccl, &all);

        let buffer = floats(device, &values(rank, len));
        let region = Region::Device(buffer.region(len, Element::F32));
        nccl.run(Op::ReduceScatterSum, region, soon()).unwrap();
        let shard = shard_range(len, world, rank);
        let own = &read_floats(&buffer, len)[shard.clone()];
        check_sums(own, shard, len, world, rule);
    }
    let buffer = buffer_of(device, &(rank as f64 + 0.5).to_le_bytes());
    let region = Region::Device(buffer.region(1, Element::F64));
    nccl.run(Op::AllReduceSum, region, soon()).unwrap();
    let expected: f64 = (0..world).map(|rank| rank as f64 + 0.5).sum();
    assert_eq!(read(&buffer, 8), expected.to_le_bytes());
}

/// Bytes of `len` elements of bf16, any two of them different at neighbours.
fn halves(len: usize) -> Vec<u8> {
    (0..len)
        .flat_map(|index| (index as u16).to_le_bytes())
        .collect()
}

pub fn gathers(nccl: &mut dyn Collective, device: &Device) {
    for len in LENS {
        let mut mine = vec![0xff; len * 2];
        let own = shard_range(len, nccl.world(), nccl.rank());
        let own = own.start * 2..own.end * 2;
        mine[own.clone()].copy_from_slice(&halves(len)[own]);
        let buffer = buffer_of(device, &mine);
        let region = Region::Device(buffer.region(len, Element::Bf16));
        nccl.run(Op::AllGather, region, soon()).unwrap();
        assert!(read(&buffer, len * 2) == halves(len), "{len} elements");
    }
}

pub fn mirrors(nccl: &mut dyn Collective, device: &Device) {
    let (rank, world) = (nccl.rank(), nccl.world());
    for len in LENS {
        let mut mine = vec![0xff; len * 4];
        let all: Vec<u8> = values(9, len)
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let bytes = |shard: std::ops::Range<usize>| shard.start * 4..shard.end * 4;
        let own = bytes(shard_range(len, world, rank));
        mine[own.clone()].copy_from_slice(&all[own.clone()]);
        let buffer = buffer_of(device, &mine);
        let region = Region::Device(buffer.region(len, Element::F32));
        nccl.run(Op::Mirror, region, soon()).unwrap();
        let two = read(&buffer, len * 4);
        for shard in [
            own,
            bytes(shard_range(len, world, (rank + world - 1) % world)),
        ] {
            assert!(two[shard.clone()] == all[shard], "{len} elements");
        }
    }
}

pub fn broadcasts(nccl: &mut dyn Collective, device: &Device) {
    let op = Op::Broadcast {
        root: nccl.world() - 1,
    };
    let message = if nccl.rank() == nccl.world() - 1 {
        halves(501)
    } else {
        vec![0; 1002]
    };
    for (element, elements) in [(Element::Bf16, 501), (Element::Byte, 1001)] {
        let buffer = buffer_of(device, &message);
        let region = Region::Device(buffer.region(elements, element));
        nccl.run(op, region, soon()).unwrap();
        assert!(read(&buffer, 1001) == halves(501)[..1001]);
    }
}

/// Several on the stream at once, with one of the host among them, each with its event, waited for from the last to the first.
pub fn flights(nccl: &mut Nccl, device: &Device) {
    const COUNT: usize = 6;
    let (rank, world, generation) = (nccl.rank(), nccl.world(), nccl.generation());
    let buffers: Vec<Buffer> = (0..COUNT)
        .map(|index| floats(device, &[(rank + index) as f32; 333]))
        .collect();
    let mut tickets = Vec::new();
    for buffer in &buffers {
        let region = Region::Device(buffer.region_when_ready(333, Element::F32).unwrap());
        tickets.push(nccl.start(Op::AllReduceSum, region, generation).unwrap());
        if tickets.len() == COUNT / 2 {
            let norms = Region::HostF64(vec![rank as f64]);
            tickets.push(nccl.start(Op::AllReduceSum, norms, generation).unwrap());
        }
    }
    for ticket in &tickets {
        nccl.event(ticket, soon()).unwrap();
    }
    let ranks = (0..world).sum::<usize>();
    for ticket in tickets.into_iter().rev() {
        if let Region::HostF64(norms) = nccl.wait(ticket, soon()).unwrap() {
            assert_eq!(norms, [ranks as f64]);
        }
    }
    for (index, buffer) in buffers.iter().enumerate() {
        let expected = [(ranks + world * index) as f32; 333];
        assert_eq!(bits(&read_floats(buffer, 333)), bits(&expected));
    }
}

pub fn refusals(nccl: &mut Nccl, device: &Device) {
    let buffer = device.allocate(8).unwrap();
    let generation = nccl.generation();
    for (op, element) in [
        (Op::AllReduceSum, Element::Bf16),
        (Op::ReduceScatterSum, Element::Bf16),
        (Op::AllGather, Element::Byte),
    ] {
        let region = Region::Device(buffer.region(2, element));
        let refused = nccl.start(op, region, generation);
        assert!(matches!(refused, Err(CollectiveError::Unsupported { .. })));
    }
}

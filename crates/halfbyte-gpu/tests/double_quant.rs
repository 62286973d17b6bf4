//! `quantize_absmax` equals the core's, bit for bit, on every device at hand.

mod common;
mod placed;

use halfbyte::BlockSize;
use halfbyte_gpu::{DeviceBuffer, Error, Stream, ops};
use placed::{Placed, Random, assert_same, nowhere};

fn check(absmax: &[f32], blocksize: BlockSize, shift: usize) {
    let len = absmax.len();
    let (mut codes, mut absmax2) = (vec![0; len], vec![0.0; blocksize.over(len).count()]);
    let offset = halfbyte::quantize_absmax(absmax, blocksize, &mut codes, &mut absmax2).unwrap();
    for device in common::portable_devices() {
        let stream = Stream::new(device).unwrap();
        let x = Placed::new(&stream, absmax, shift);
        let q = Placed::unwritten(&stream, len, shift);
        let scales = Placed::unwritten(&stream, absmax2.len(), shift);
        let mean = Placed::unwritten(&stream, 1, shift);
        // What lies in the workspace before does not matter.
        let rubbish = vec![0xA5u8; ops::quantize_absmax_workspace(len)];
        let workspace = DeviceBuffer::from_slice(&stream, &rubbish).unwrap();
        ops::quantize_absmax(
            &stream,
            x.slice(),
            blocksize,
            q.slice(),
            scales.slice(),
            mean.slice(),
            workspace.slice(),
        )
        .unwrap();
        let at = format!("{device} {len} in {blocksize:?} shift {shift}");
        assert_same(&mean.read(&stream), &[offset], &format!("offset: {at}"));
        assert_same(&scales.read(&stream), &absmax2, &at);
        assert!(q.read(&stream) == codes, "{at}");
    }
}

#[test]
fn every_block_size_and_length() {
    for (b, blocksize) in BlockSize::ALL.into_iter().enumerate() {
        for len in [0, 1, 31, 255, 256, 257, 1024, 1025, 4096, 4099, 20_000] {
            let absmax: Vec<f32> = (0..len).map(|i| 0.02 + 0.01 * (i as f32).sin()).collect();
            check(&absmax, blocksize, (b + len) % 4);
        }
    }
}

/// More scales than one round of all groups of the sum takes.
#[test]
fn many_scales() {
    let absmax: Vec<f32> = (0..300_001).map(|i| 0.02 + 0.01 * (i as f32 * 0.37).sin()).collect();
    check(&absmax, BlockSize::B256, 0);
}

#[test]
fn means_at_the_edges() {
    let tiny = f32::from_bits(1);
    let (nan, infinity) = (f32::NAN, f32::INFINITY);
    for values in [
        &[0.0][..],
        &[-0.0, 0.0],
        &[-0.0],
        &[tiny],
        &[tiny, 0.0],
        &[tiny, tiny, 0.0],
        &[-tiny, -tiny, 0.0],
        &[f32::MIN_POSITIVE, 0.0],
        &[f32::MIN_POSITIVE, -tiny],
        &[1.0, 1.0f32.next_up()],
        &[1.0f32.next_up(), 1.0f32.next_up().next_up()],
        &[1.0, 1.0f32.next_up(), tiny],
        &[f32::MAX; 7],
        &[f32::MIN; 7],
        // More bits than a float's exponents span.
        &[f32::MAX; 4000],
        &[f32::MIN; 4000],
        &[f32::MAX, f32::MIN, tiny],
        &[f32::MAX, f32::MIN, -tiny, -tiny],
        &[1e30, 1.0, -1e30],
        &[-1.0, -3.0, 1e-30],
        &[1.0, infinity],
        &[-infinity, f32::MAX],
        &[-infinity, 1.0, infinity],
        &[1.0, nan],
        &[nan, infinity],
    ] {
        check(values, BlockSize::B256, 0);
    }
    // The exceptions in other threads and groups than the rest.
    for special in [infinity, -infinity, nan, tiny, f32::MAX] {
        for at in [0, 127, 128, 2047, 2999] {
            let mut values = vec![1.5; 3000];
            values[at] = special;
            check(&values, BlockSize::B256, 0);
        }
    }
}

/// Sums that only an exact accumulator gets right: values of any size, close neighbours.
#[test]
fn any_scales() {
    let mut random = Random(5);
    for round in 0..60 {
        let len = random.below(700) + 1;
        let base = random.bits() % 0x7F7F_0000;
        let values: Vec<f32> = (0..len)
            .map(|_| match round % 3 {
                0 => f32::from_bits(random.bits()),
                1 => f32::from_bits(base + random.bits() % 0x1_0000),
                _ => f32::from_bits(0x3A00_0000 + random.bits() % 0x0600_0000),
            })
            .map(|x| if x.is_finite() { x } else { 1.0 })
            .collect();
        check(&values, BlockSize::ALL[random.below(8)], 0);
    }
}

#[test]
fn buffers_of_another_length_are_refused() {
    let stream = Stream::new(common::portable_devices()[0]).unwrap();
    let (floats, codes) = (nowhere::<f32>, nowhere::<u8>);
    for (len, q, scales, offset, workspace, what) in [
        (10, 9, 1, 1, 1000, "codes"),
        (10, 10, 0, 1, 1000, "absmax2"),
        (10, 10, 2, 1, 1000, "absmax2"),
        (10, 10, 1, 0, 1000, "offset"),
        (10, 10, 1, 1, 50, "workspace"),
        (1 << 31, 1 << 31, 1 << 23, 1, 1 << 20, "absmax"),
    ] {
        let result = ops::quantize_absmax(
            &stream,
            floats(len),
            BlockSize::B256,
            codes(q),
            floats(scales),
            floats(offset),
            codes(workspace),
        );
        let named = match &result {
            Err(Error::Length { what, .. } | Error::Argument { what, .. }) => *what,
            _ => panic!("{what}: {result:?}"),
        };
        assert_eq!(named, what, "{result:?}");
    }
}

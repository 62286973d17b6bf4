//! `quantize_4bit` equals the core's, bit for bit, on every device at hand.

mod common;
mod placed;

use halfbyte::{BlockSize, Code4, Element, NonFinite};
use halfbyte_gpu::{Error, Stream, ops};
use placed::{
    Bits, Placed, Random, assert_same, cast, extreme_blocks, lengths, nowhere, padded, weights,
};

/// The same values on the CPU and on every device, buffers `shift` elements behind an aligned
/// address.
fn check<T: Element + Bits>(values: &[f32], blocksize: BlockSize, shift: usize) {
    let input: Vec<T> = cast(values);
    let blocks = blocksize.over(input.len());
    for code in Code4::ALL {
        let (mut packed, mut absmax) = (vec![0; blocks.packed_len()], vec![0.0; blocks.count()]);
        let rule = NonFinite::Propagate;
        halfbyte::quantize_4bit(&input, code, blocksize, rule, &mut packed, &mut absmax).unwrap();
        for device in common::portable_devices() {
            let stream = Stream::new(device).unwrap();
            let x = Placed::new(&stream, &input, shift);
            let q = Placed::unwritten(&stream, packed.len(), shift);
            let scales = Placed::unwritten(&stream, absmax.len(), shift);
            ops::quantize_4bit(&stream, x.floats(), code, blocksize, q.slice(), scales.slice())
                .unwrap();
            let at = format!("{device} {code} {} {blocks:?} shift {shift}", T::DTYPE);
            assert_same(&scales.read(&stream), &absmax, &at);
            let q = q.read(&stream);
            if let Some(i) = (0..q.len()).find(|&i| q[i] != packed[i]) {
                let pair = &input[2 * i..input.len().min(2 * i + 2)];
                panic!("byte {i} is {:02x}, not {:02x}: {pair:?} {at}", q[i], packed[i]);
            }
        }
    }
}

#[test]
fn every_block_size_dtype_and_length() {
    for blocksize in BlockSize::ALL {
        for (i, len) in lengths(blocksize.get()).into_iter().enumerate() {
            for_all_dtypes!(check(&weights(len), blocksize, i % 2));
        }
    }
}

/// Long enough for 16-byte loads, at every distance from an aligned address.
#[test]
fn any_alignment() {
    let values = weights(8192 + 511);
    for shift in 0..=16 {
        for_all_dtypes!(check(&values, BlockSize::B64, shift));
    }
}

/// A value next to each border, for scales that are not powers of two either.
#[test]
fn ties_and_their_neighbours() {
    let mut values = vec![];
    for absmax in [1.0f32, 0.75, 3.1, 1e-20, 6e4] {
        for code in Code4::ALL {
            let mut block = vec![absmax, -absmax, 0.0, -0.0, f32::from_bits(1), -f32::from_bits(1)];
            let mut ascending = *code.table();
            ascending.sort_by(f32::total_cmp);
            for pair in ascending.windows(2) {
                let x = (pair[0] + pair[1]) * 0.5 * absmax;
                block.extend([x, x.next_up(), x.next_down(), -x]);
            }
            block.resize(128, absmax);
            values.extend(block);
        }
    }
    for_all_dtypes!(check(&values, BlockSize::new(128).unwrap(), 0));
    for_all_dtypes!(check(&values, BlockSize::new(32).unwrap(), 1));
}

#[test]
fn extreme_values() {
    let blocks = extreme_blocks();
    for (size, shift) in [(64, 0), (64, 1), (512, 0)] {
        let blocksize = BlockSize::new(size).unwrap();
        for_all_dtypes!(check(&padded(&blocks, size), blocksize, shift));
    }
    // At the end of a tensor, with an odd last element.
    for block in blocks.iter().step_by(3) {
        for_all_dtypes!(check(block, BlockSize::B4096, 0));
        for_all_dtypes!(check(block, BlockSize::B64, 0));
    }
}

/// Every bfloat16 and every float16, in the company of a few different maxima.
#[test]
fn every_half() {
    for absmax in [1e-3, 0.7, 300.0] {
        let halves = (0..=u16::MAX).flat_map(|bits| {
            [halfbyte::bf16::from_bits(bits).to_f32(), halfbyte::f16::from_bits(bits).to_f32()]
        });
        let values: Vec<f32> = halves.map(|x| if x.abs() <= absmax { x } else { absmax }).collect();
        for_all_dtypes!(check(&values, BlockSize::B256, 0));
    }
}

#[test]
fn any_input() {
    let mut random = Random(7);
    for _ in 0..60 {
        let (values, size) = (random.values(1200), random.below(BlockSize::ALL.len()));
        for_all_dtypes!(check(&values, BlockSize::ALL[size], random.below(8)));
    }
}

#[test]
fn buffers_of_another_length_are_refused() {
    let stream = Stream::new(common::portable_devices()[0]).unwrap();
    let x = Placed::new(&stream, &[1.0f32; 65], 0);
    for (bytes, scales, what) in
        [(32, 2, "packed"), (34, 2, "packed"), (33, 1, "absmax"), (33, 3, "absmax")]
    {
        let (q, s) = (nowhere(bytes), nowhere(scales));
        let result = ops::quantize_4bit(&stream, x.floats(), Code4::Nf4, BlockSize::B64, q, s);
        assert!(matches!(result, Err(Error::Length { what: w, .. }) if w == what), "{result:?}");
    }
}

//! `quantize_blockwise` and `dequantize_blockwise` equal the core's, bit for bit, on every device
//! at hand.

mod common;
mod placed;

use halfbyte::code::{fp8_map, linear_map, normal_map};
use halfbyte::{BlockSize, Code8, Element, NonFinite};
use halfbyte_gpu::{Error, Stream, ops};
use placed::{
    Bits, Placed, Random, assert_same, bytes, cast, extreme_blocks, lengths, nowhere, padded,
    weights,
};

fn check_quantize<T: Element + Bits>(
    values: &[f32],
    code: &Code8,
    blocksize: BlockSize,
    shift: usize,
) {
    let input: Vec<T> = cast(values);
    let blocks = blocksize.over(input.len());
    let (mut expected, mut absmax) = (vec![0; input.len()], vec![0.0; blocks.count()]);
    let rule = NonFinite::Propagate;
    halfbyte::quantize_blockwise(&input, code, blocksize, rule, &mut expected, &mut absmax)
        .unwrap();
    for device in common::portable_devices() {
        let stream = Stream::new(device).unwrap();
        let x = Placed::new(&stream, &input, shift);
        let table = Placed::new(&stream, code.values(), shift);
        let q = Placed::unwritten(&stream, input.len(), shift);
        let scales = Placed::unwritten(&stream, absmax.len(), shift);
        ops::quantize_blockwise(
            &stream,
            x.floats(),
            table.slice(),
            blocksize,
            q.slice(),
            scales.slice(),
        )
        .unwrap();
        let at = format!("{device} {} {blocks:?} shift {shift}", T::DTYPE);
        assert_same(&scales.read(&stream), &absmax, &at);
        let q = q.read(&stream);
        if let Some(i) = (0..q.len()).find(|&i| q[i] != expected[i]) {
            panic!("code {i} is {}, not {}, for {:?}: {at}", q[i], expected[i], input[i]);
        }
    }
}

fn check_dequantize<T: Element + Bits>(
    len: usize,
    code: &[f32; 256],
    blocksize: BlockSize,
    shift: usize,
) {
    let codes = bytes(len);
    let mut random = Random(len as u64);
    let absmax: Vec<f32> = (0..blocksize.over(len).count())
        .map(|i| if i % 7 == 3 { f32::from_bits(random.bits()) } else { random.uniform() })
        .collect();
    let mut expected = vec![T::default(); len];
    halfbyte::dequantize_blockwise(&codes, &absmax, code, blocksize, &mut expected).unwrap();
    for device in common::portable_devices() {
        let stream = Stream::new(device).unwrap();
        let q = Placed::new(&stream, &codes, shift);
        let scales = Placed::new(&stream, &absmax, shift);
        let table = Placed::new(&stream, code, shift);
        let out = Placed::<T>::unwritten(&stream, len, shift);
        ops::dequantize_blockwise(
            &stream,
            q.slice(),
            scales.slice(),
            table.slice(),
            blocksize,
            out.floats(),
        )
        .unwrap();
        let at = format!("{device} {} {len} in {blocksize:?} shift {shift}", T::DTYPE);
        assert_same(&out.read(&stream), &expected, &at);
    }
}

/// The default maps, the others of the public API, and tables that no map makes.
fn codes() -> Vec<Code8> {
    let mut padded = [0.0; 256];
    padded[254..].copy_from_slice(&[0.5, 1.0]);
    let wide = std::array::from_fn::<f32, 256, _>(|i| (i as f32 - 100.0) * 1e36);
    let tiny = std::array::from_fn::<f32, 256, _>(|i| f32::from_bits(i as u32 / 3));
    let mut codes = vec![Code8::dynamic(true).clone(), Code8::dynamic(false).clone()];
    let maps = [
        linear_map(true, 8, true).unwrap(),
        linear_map(false, 8, true).unwrap(),
        normal_map(0.9677083, true).unwrap(),
        fp8_map(true, 4, 3, 8).unwrap(),
        padded,
        wide,
        tiny,
        [f32::MAX; 256],
    ];
    codes.extend(maps.iter().map(|map| Code8::new(map).unwrap()));
    codes
}

#[test]
fn every_block_size_dtype_and_length() {
    let codes = codes();
    for (b, blocksize) in BlockSize::ALL.into_iter().enumerate() {
        for (i, len) in lengths(blocksize.get()).into_iter().enumerate() {
            let code = &codes[if i % 2 == 0 { 0 } else { (b + i) % codes.len() }];
            for_all_dtypes!(check_quantize(&weights(len), code, blocksize, i % 2));
            for_all_dtypes!(check_dequantize(len, code.values(), blocksize, i % 2));
        }
    }
}

#[test]
fn any_alignment() {
    for shift in 0..=16 {
        for_all_dtypes!(check_quantize(
            &weights(8192 + 511),
            Code8::dynamic(true),
            BlockSize::B256,
            shift
        ));
        let values = Code8::dynamic(true).values();
        for_all_dtypes!(check_dequantize(8192 + 511, values, BlockSize::B256, shift));
    }
}

/// Every border of every code and its neighbours: the absmax is 1, so that y is x.
#[test]
fn borders_and_their_neighbours() {
    for code in codes() {
        let borders = code.midpoints().iter().flat_map(|&m| [m, m.next_up(), m.next_down(), -m]);
        let mut values: Vec<f32> = borders.filter(|m| m.abs() <= 1.0).collect();
        values.extend([0.0, -0.0]);
        let with_one: Vec<f32> = values.chunks(31).flat_map(|c| [&[1.0], c].concat()).collect();
        for_all_dtypes!(check_quantize(&with_one, &code, BlockSize::ALL[0], 0));
    }
}

/// All sizes of y, for the two default maps.
#[test]
fn all_magnitudes() {
    let mut values = vec![];
    for bits in (0x3000_0000u32..=0x3F80_0000).step_by(9973) {
        if values.len() % 64 == 0 {
            values.push(1.0);
        }
        values.push(if bits % 2 == 0 { f32::from_bits(bits) } else { -f32::from_bits(bits) });
    }
    for signed in [true, false] {
        for_all_dtypes!(check_quantize(&values, Code8::dynamic(signed), BlockSize::B64, 0));
    }
}

#[test]
fn extreme_values() {
    let blocks = extreme_blocks();
    for code in [Code8::dynamic(true), Code8::dynamic(false)] {
        for_all_dtypes!(check_quantize(&padded(&blocks, 64), code, BlockSize::B64, 0));
        for block in blocks.iter().step_by(9) {
            for_all_dtypes!(check_quantize(block, code, BlockSize::B4096, 1));
        }
    }
}

#[test]
fn any_input() {
    let (codes, mut random) = (codes(), Random(11));
    for _ in 0..40 {
        let (values, size) = (random.values(1200), random.below(BlockSize::ALL.len()));
        let code = &codes[random.below(codes.len())];
        for_all_dtypes!(check_quantize(&values, code, BlockSize::ALL[size], random.below(8)));
    }
}

/// A code of fewer than 256 values has no index past its end, and decodes those as its last.
#[test]
fn short_codes() {
    for device in common::portable_devices() {
        let stream = Stream::new(device).unwrap();
        let x: Vec<f32> = (0..=64).map(|i| i as f32 / 32.0 - 1.0).collect();
        let input = Placed::new(&stream, &x, 0);
        for count in [1, 2, 3, 17, 255] {
            let code: Vec<f32> = (0..count).map(|i| i as f32 / count as f32 - 0.3).collect();
            let table = Placed::new(&stream, &code, 0);
            let q = Placed::unwritten(&stream, x.len(), 0);
            let scales = Placed::unwritten(&stream, 1, 0);
            let blocksize = BlockSize::B4096;
            ops::quantize_blockwise(
                &stream,
                input.floats(),
                table.slice(),
                blocksize,
                q.slice(),
                scales.slice(),
            )
            .unwrap();
            for (x, q) in x.iter().zip(q.read(&stream)) {
                let below = |pair: &&[f32]| *x > (pair[0] + pair[1]) * 0.5;
                assert_eq!(usize::from(q), code.windows(2).filter(below).count(), "{x} {count}");
            }
            let all: Vec<u8> = (0..=255).collect();
            let all = Placed::new(&stream, &all, 0);
            let out = Placed::<f32>::unwritten(&stream, 256, 0);
            ops::dequantize_blockwise(
                &stream,
                all.slice(),
                scales.slice(),
                table.slice(),
                blocksize,
                out.floats(),
            )
            .unwrap();
            let mut expected = code.clone();
            expected.resize(256, code[count - 1]);
            assert_same(&out.read(&stream), &expected, &format!("{device} {count} values"));
        }
    }
}

#[test]
fn buffers_of_another_length_are_refused() {
    let stream = Stream::new(common::portable_devices()[0]).unwrap();
    let x = Placed::new(&stream, &[1.0f32; 65], 0);
    let (floats, codes) = (nowhere::<f32>, nowhere::<u8>);
    let b = BlockSize::B64;
    for (code, q, scales, what) in [
        (0, 65, 2, "code"),
        (257, 65, 2, "code"),
        (256, 64, 2, "out"),
        (256, 65, 1, "absmax"),
        (256, 65, 3, "absmax"),
    ] {
        let (code, q, scales) = (floats(code), codes(q), floats(scales));
        let result = ops::quantize_blockwise(&stream, x.floats(), code, b, q, scales);
        let dequantized = ops::dequantize_blockwise(&stream, q, scales, code, b, x.floats());
        for result in [result, dequantized] {
            let named = match &result {
                Err(Error::Length { what, .. } | Error::Argument { what, .. }) => *what,
                _ => panic!("{what}: {result:?}"),
            };
            assert!(named == what || (named == "codes" && what == "out"), "{result:?}");
        }
    }
}

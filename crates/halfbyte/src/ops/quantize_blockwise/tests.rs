//! Cases and properties over every available instruction set.

use super::*;
use crate::{Error, bf16, f16};
use proptest::prelude::*;

/// Sizes around groups of 64, around a block of `b` and, with a ragged end, several tasks' worth.
fn sizes(b: usize) -> impl Iterator<Item = usize> {
    let small = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130, 64 * 96];
    small.into_iter().chain([b - 1, b, b + 1, 2 * b + 63, 3 * TASK + b + 5])
}

/// Normally distributed numbers, some blocks of which are zero, tiny, huge, or sparse.
fn sample<T: Element>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut value = |i: usize| {
        let normal = (0..6).map(|_| uniform()).sum::<f32>() - 3.0;
        match i / 32 % 11 {
            3 => 0.0,
            5 => normal * 1e-42,
            6 => -0.0,
            7 => normal * 1e4,
            9 if !i.is_multiple_of(5) => normal * 1e-5,
            _ => normal,
        }
    };
    (0..len).map(|i| T::from_f32(value(i))).collect()
}

fn codes() -> Vec<Code8> {
    let wide = std::array::from_fn::<f32, 256, _>(|i| (i as f32 - 100.0) / 77.0);
    let steps = std::array::from_fn::<f32, 256, _>(|i| (i / 60) as f32 * 0.25 - 0.5);
    let mut codes = [wide, steps].map(|values| Code8::new(&values).unwrap()).to_vec();
    codes.extend([true, false].map(|signed| Code8::dynamic(signed).clone()));
    codes
}

fn quantize<T: Element>(isa: Isa, x: &[T], code: &Code8, b: BlockSize) -> (Vec<u8>, Vec<u32>) {
    let blocks = b.over(x.len());
    // Filled, so that what a kernel leaves out shows.
    let (mut out, mut absmax) = (vec![0xA5; x.len()], vec![-1.0; blocks.count()]);
    run(isa, x, code, blocks, &mut out, &mut absmax);
    (out, absmax.into_iter().map(f32::to_bits).collect())
}

fn every_isa_equals_scalar<T: Element>() {
    for (c, code) in codes().iter().enumerate() {
        for b in BlockSize::ALL {
            for len in sizes(b.get()) {
                let x = sample::<T>(len, (len + c) as u64);
                let want = quantize(Isa::Scalar, &x, code, b);
                for isa in isa::available() {
                    let got = quantize(isa, &x, code, b);
                    assert!(got == want, "{isa} {} code {c} block {} len {len}", T::DTYPE, b.get());
                }
            }
        }
    }
}

#[test]
fn every_isa_equals_scalar_f32() {
    every_isa_equals_scalar::<f32>();
}

#[test]
fn every_isa_equals_scalar_f16() {
    every_isa_equals_scalar::<f16>();
}

#[test]
fn every_isa_equals_scalar_bf16() {
    every_isa_equals_scalar::<bf16>();
}

#[test]
fn scalar_takes_the_nearest_code() {
    for code in codes() {
        let x = sample::<f32>(1000, 7);
        let (q, absmax) = quantize(Isa::Scalar, &x, &code, BlockSize::B64);
        for (i, (x, q)) in x.iter().zip(q).enumerate() {
            let absmax = f32::from_bits(absmax[i / 64]);
            if absmax < 1e-30 {
                continue; // has its own rule, tested in `normalize`
            }
            let y = f64::from((x * (1.0 / absmax)).clamp(-1.0, 1.0));
            let distance = |c: &f32| (f64::from(*c) - y).abs();
            let least = code.values().iter().map(distance).fold(f64::INFINITY, f64::min);
            assert_eq!(distance(&code.values()[q as usize]), least);
        }
    }
}

#[test]
fn special_values_in_every_lane() {
    let specials = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN, f32::MAX, 1e-45];
    for code in codes() {
        for special in specials {
            for lane in 0..70 {
                let mut x = sample::<f32>(140, 3);
                x[lane] = special;
                for b in [BlockSize::new(32).unwrap(), BlockSize::B64, BlockSize::B256] {
                    let want = quantize(Isa::Scalar, &x, &code, b);
                    for isa in isa::available() {
                        assert_eq!(quantize(isa, &x, &code, b), want, "{isa} {special} at {lane}");
                    }
                }
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let x = sample::<f32>(5 * TASK + 1234, 1);
    for code in [Code8::dynamic(true), Code8::dynamic(false)] {
        let results = [1, 2, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| quantize(isa::detect(), &x, code, BlockSize::B256))
        });
        assert!(results[0] == results[1] && results[0] == results[2]);
    }
}

#[test]
fn unaligned_slices() {
    let x = sample::<bf16>(1000, 5);
    for start in 1..40 {
        let x = &x[start..];
        for isa in isa::available() {
            let blocks = BlockSize::B64.over(x.len());
            let (mut out, mut absmax) = (vec![0; x.len() + start], vec![0.0; blocks.count()]);
            run(isa, x, Code8::dynamic(true), blocks, &mut out[start..], &mut absmax);
            assert_eq!(
                out[start..],
                quantize(Isa::Scalar, x, Code8::dynamic(true), BlockSize::B64).0
            );
            assert!(out[..start].iter().all(|&o| o == 0));
        }
    }
}

#[test]
fn wrong_lengths_and_bad_numbers_are_refused() {
    let code = Code8::dynamic(true);
    let call = |x: &[f32], rule, out: usize, absmax: usize| {
        let (mut out, mut absmax) = (vec![0; out], vec![0.0; absmax]);
        quantize_blockwise(x, code, BlockSize::B64, rule, &mut out, &mut absmax)
    };
    let x = [1.0; 65];
    assert!(call(&x, NonFinite::Refuse, 65, 2).is_ok());
    for (out, absmax, name) in
        [(64, 2, "out"), (66, 2, "out"), (65, 1, "absmax"), (65, 3, "absmax")]
    {
        match call(&x, NonFinite::Refuse, out, absmax) {
            Err(Error::Length { buffer, .. }) => assert_eq!(buffer, name),
            other => panic!("{other:?}"),
        }
    }
    let mut x = x;
    x[64] = f32::NAN;
    match call(&x, NonFinite::Refuse, 65, 2) {
        Err(Error::NonFinite { block: 1, start: 64, end: 65 }) => {}
        other => panic!("{other:?}"),
    }
    assert!(call(&x, NonFinite::Propagate, 65, 2).is_ok());
}

proptest! {
    #[test]
    fn any_bits_equal_scalar(bits in prop::collection::vec(any::<u32>(), 0..300), b in 0usize..8) {
        let b = BlockSize::ALL[b];
        let x: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        let h: Vec<f16> = bits.iter().map(|&b| f16::from_bits(b as u16)).collect();
        for code in [Code8::dynamic(true), Code8::dynamic(false), &codes()[0]] {
            for isa in isa::available() {
                prop_assert_eq!(quantize(isa, &x, code, b), quantize(Isa::Scalar, &x, code, b));
                prop_assert_eq!(quantize(isa, &h, code, b), quantize(Isa::Scalar, &h, code, b));
            }
        }
    }
}

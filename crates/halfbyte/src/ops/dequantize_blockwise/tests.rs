//! Cases and properties over every available instruction set.

use super::*;
use crate::{Code8, Error, bf16, f16};
use proptest::prelude::*;

fn sizes(b: usize) -> impl Iterator<Item = usize> {
    let small = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 64 * 96];
    small.into_iter().chain([b - 1, b, b + 1, 2 * b + 63, 3 * TASK + b + 5])
}

fn sample(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i as u32).wrapping_mul(0x9E37_79B9) >> 24) as u8).collect()
}

/// The bits of every decoded element.
fn dequantize<T: Element>(isa: Isa, q: &[u8], absmax: &[f32], b: BlockSize) -> Vec<u32> {
    let code = Code8::dynamic(true).values();
    let mut out = vec![T::from_f32(-7.0); q.len()];
    run(isa, q, absmax, code, b.over(q.len()), &mut out);
    out.into_iter().map(|x| x.to_f32().to_bits()).collect()
}

fn every_isa_equals_scalar<T: Element>() {
    for b in BlockSize::ALL {
        for len in sizes(b.get()) {
            let q = sample(len);
            let scale = |i| [1.0, 0.3, 0.0, 1e-40, 7e4, 3e38, f32::INFINITY, f32::NAN][i % 8];
            let absmax: Vec<f32> = (0..b.over(len).count()).map(scale).collect();
            let want = dequantize::<T>(Isa::Scalar, &q, &absmax, b);
            for isa in isa::available() {
                let got = dequantize::<T>(isa, &q, &absmax, b);
                assert!(got == want, "{isa} {} block {} len {len}", T::DTYPE, b.get());
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
fn any_number_of_threads_gives_the_same_bytes() {
    let q = sample(5 * TASK + 1234);
    let absmax: Vec<f32> = (0..BlockSize::B256.over(q.len()).count()).map(|i| i as f32).collect();
    let results = [1, 2, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| dequantize::<bf16>(isa::detect(), &q, &absmax, BlockSize::B256))
    });
    assert!(results[0] == results[1] && results[0] == results[2]);
}

#[test]
fn every_byte_decodes_to_its_code_at_any_alignment() {
    let code = Code8::dynamic(false).values();
    for isa in isa::available() {
        for start in 0..33 {
            let q: Vec<u8> = (0..=255).collect();
            let mut out = vec![0.0f32; 256 + start];
            run(isa, &q, &[0.5], code, BlockSize::B256.over(256), &mut out[start..]);
            assert_eq!(out[start..], code.map(|c| c * 0.5));
        }
    }
}

#[test]
fn wrong_lengths_are_refused() {
    let code = Code8::dynamic(true).values();
    for (q, absmax, name) in [
        (64, 2, Some("quantized input")),
        (66, 2, Some("quantized input")),
        (65, 1, Some("absmax")),
        (65, 3, Some("absmax")),
        (65, 2, None),
    ] {
        let (q, absmax, mut out) = (&[0; 66][..q], &[0.0; 3][..absmax], [0.0f32; 65]);
        let result = dequantize_blockwise(q, absmax, code, BlockSize::B64, &mut out);
        match (result, name) {
            (Ok(()), None) => {}
            (Err(Error::Length { buffer, .. }), Some(name)) => assert_eq!(buffer, name),
            other => panic!("{other:?}"),
        }
    }
}

proptest! {
    #[test]
    fn any_scale_equals_scalar(q in prop::collection::vec(any::<u8>(), 1..200), scale: u32) {
        let absmax = [f32::from_bits(scale); 7];
        let b = BlockSize::new(32).unwrap();
        let absmax = &absmax[..b.over(q.len()).count()];
        for isa in isa::available() {
            prop_assert_eq!(
                dequantize::<f32>(isa, &q, absmax, b),
                dequantize::<f32>(Isa::Scalar, &q, absmax, b)
            );
            prop_assert_eq!(
                dequantize::<f16>(isa, &q, absmax, b),
                dequantize::<f16>(Isa::Scalar, &q, absmax, b)
            );
        }
    }
}

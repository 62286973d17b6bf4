//! AVX-512: two passes over a block, the second from the L1 cache.
//!
//! ```text
//! for each block:
//!     absmax = max |x|                      (1)
//!     for each group of 64 elements:        (2)
//!         out = nearest code of x * (1 / absmax)
//! ```
//!
//! 1. As an integer maximum over the bits, doubled to lose the sign.
//! 2. A short group is filled up with zeros. Blocks whose reciprocal is not an ordinary number, and
//!    those with NaN or infinity, go to the scalar code.

use super::scalar;
use crate::Element;
use crate::blocks::BlockSize;
use crate::code::encode8::avx512::{Dynamic512, Encode64, Search512};
use crate::code::{Code8, Kind};
use crate::ops::normalize::Normalizer;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn quantize<T: Element>(
    input: &[T],
    code: &Code8,
    blocksize: BlockSize,
    out: &mut [u8],
    absmax: &mut [f32],
) {
    match code.kind() {
        Kind::DynamicSigned => {
            blocks(&Dynamic512::<true>::new(), input, code, blocksize, out, absmax);
        }
        Kind::DynamicUnsigned => {
            blocks(&Dynamic512::<false>::new(), input, code, blocksize, out, absmax);
        }
        Kind::Other => blocks(&Clamped(Search512::new(code)), input, code, blocksize, out, absmax),
    }
}

/// A product one ulp above 1 counts as 1. The dynamic maps have no border that close to 1.
struct Clamped(Search512);

impl Encode64 for Clamped {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn encode64(&self, y: [__m512; 4]) -> __m512i {
        let one = _mm512_set1_ps(1.0);
        let y = y.map(|y| _mm512_range_ps::<0b0010>(y, one)); // the smaller magnitude, y's sign
        // SAFETY: the caller guarantees the CPU features.
        unsafe { self.0.encode64(y) }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn blocks<T: Element>(
    encoder: &impl Encode64,
    input: &[T],
    code: &Code8,
    blocksize: BlockSize,
    out: &mut [u8],
    absmax: &mut [f32],
) {
    let b = blocksize.get();
    for ((x, q), scale) in input.chunks(b).zip(out.chunks_mut(b)).zip(absmax) {
        *scale = largest(x);
        let direct = *scale > Normalizer::SMALLEST_DIRECT || *scale == 0.0;
        if !(direct && scale.is_finite()) {
            scalar::block(x, code, *scale, q);
            continue;
        }
        let reciprocal = if *scale == 0.0 { 0.0 } else { 1.0 / *scale };
        let reciprocal = _mm512_set1_ps(reciprocal);
        for (x, q) in x.chunks(64).zip(q.chunks_mut(64)) {
            let y = load(x).map(|x| _mm512_mul_ps(x, reciprocal));
            // SAFETY: this function requires the encoder's CPU features; the mask selects the
            // bytes of q.
            unsafe {
                let lanes = u64::MAX >> (64 - q.len());
                _mm512_mask_storeu_epi8(q.as_mut_ptr().cast(), lanes, encoder.encode64(y));
            }
        }
    }
}

/// Up to 64 elements, filled up with zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn load<T: Element>(x: &[T]) -> [__m512; 4] {
    std::array::from_fn(|i| match x.get(16 * i..) {
        // SAFETY: there are 16 elements to read.
        Some(rest) if rest.len() >= 16 => unsafe { T::load16(rest.as_ptr()) },
        Some(rest) if !rest.is_empty() => {
            let mut filled = [T::default(); 16];
            filled[..rest.len()].copy_from_slice(rest);
            // SAFETY: as above.
            unsafe { T::load16(filled.as_ptr()) }
        }
        _ => _mm512_setzero_ps(),
    })
}

/// `absmax` of a block, equal to [`normalize::absmax`](crate::ops::normalize::absmax).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn largest<T: Element>(x: &[T]) -> f32 {
    let mut max = [_mm512_setzero_si512(); 4];
    for x in x.chunks(64) {
        for (max, x) in max.iter_mut().zip(load(x)) {
            let bits = _mm512_castps_si512(x);
            *max = _mm512_max_epu32(*max, _mm512_add_epi32(bits, bits));
        }
    }
    let max = _mm512_max_epu32(_mm512_max_epu32(max[0], max[1]), _mm512_max_epu32(max[2], max[3]));
    f32::from_bits(_mm512_reduce_max_epu32(max) / 2)
}

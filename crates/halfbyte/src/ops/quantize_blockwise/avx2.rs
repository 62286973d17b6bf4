//! AVX2: two passes over a block, the second from the L1 cache.
//!
//! ```text
//! for each block:
//!     absmax = max |x|                      (1)
//!     for each group of 32 elements:        (2)
//!         out = nearest code of x * (1 / absmax)  (3)
//! ```
//!
//! 1. As an integer maximum over the bits, doubled to lose the sign.
//! 2. A short group is filled up with zeros. Blocks whose reciprocal is not an ordinary number, and
//!    those with NaN or infinity, go to the scalar code.
//! 3. The second pass, which computes, fetches what a first pass to come will read: the next block,
//!    or 4 KiB ahead.

use super::{AHEAD, prefetch, scalar};
use crate::Element;
use crate::blocks::BlockSize;
use crate::code::encode8::avx2::{Dynamic256, Encode32, Search256};
use crate::code::{Code8, Kind};
use crate::ops::normalize::Normalizer;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize<T: Element>(
    input: &[T],
    code: &Code8,
    blocksize: BlockSize,
    out: &mut [u8],
    absmax: &mut [f32],
) {
    match code.kind() {
        Kind::DynamicSigned => {
            blocks(&Dynamic256::<true>::new(), input, code, blocksize, out, absmax);
        }
        Kind::DynamicUnsigned => {
            blocks(&Dynamic256::<false>::new(), input, code, blocksize, out, absmax);
        }
        Kind::Other => blocks(&Clamped(Search256::new(code)), input, code, blocksize, out, absmax),
    }
}

/// A product one ulp above 1 counts as 1. The dynamic maps have no border that close to 1.
struct Clamped<'a>(Search256<'a>);

impl Encode32 for Clamped<'_> {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn encode32(&self, y: [__m256; 4]) -> __m256i {
        let (low, high) = (_mm256_set1_ps(-1.0), _mm256_set1_ps(1.0));
        let y = y.map(|y| _mm256_min_ps(_mm256_max_ps(y, low), high));
        // SAFETY: the caller guarantees the CPU features.
        unsafe { self.0.encode32(y) }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn blocks<T: Element>(
    encoder: &impl Encode32,
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
        let reciprocal = _mm256_set1_ps(reciprocal);
        let ahead = AHEAD.max(size_of_val(x));
        let (x, x_tail) = x.as_chunks::<32>();
        let (q, q_tail) = q.as_chunks_mut::<32>();
        for (x, q) in x.iter().zip(q) {
            prefetch(x, ahead);
            let y = load32(x).map(|x| _mm256_mul_ps(x, reciprocal));
            // SAFETY: this function requires the encoder's CPU features; q holds 32 bytes.
            unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), encoder.encode32(y)) };
        }
        if !x_tail.is_empty() {
            let mut x = [T::default(); 32];
            x[..x_tail.len()].copy_from_slice(x_tail);
            let y = load32(&x).map(|x| _mm256_mul_ps(x, reciprocal));
            let mut q = [0u8; 32];
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), encoder.encode32(y)) };
            q_tail.copy_from_slice(&q[..q_tail.len()]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load32<T: Element>(x: &[T; 32]) -> [__m256; 4] {
    // SAFETY: 8 elements from 0, 8, 16 and 24 on lie inside the array.
    std::array::from_fn(|i| unsafe { T::load8(x.as_ptr().add(8 * i)) })
}

/// `absmax` of a block, equal to [`normalize::absmax`](crate::ops::normalize::absmax).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn largest<T: Element>(x: &[T]) -> f32 {
    let mut max = [_mm256_setzero_si256(); 4];
    let mut take = |x: &[T; 32]| {
        for (max, x) in max.iter_mut().zip(load32(x)) {
            let bits = _mm256_castps_si256(x);
            *max = _mm256_max_epu32(*max, _mm256_add_epi32(bits, bits));
        }
    };
    let (groups, tail) = x.as_chunks::<32>();
    groups.iter().for_each(&mut take);
    if !tail.is_empty() {
        let mut x = [T::default(); 32];
        x[..tail.len()].copy_from_slice(tail);
        take(&x);
    }
    let max = _mm256_max_epu32(_mm256_max_epu32(max[0], max[1]), _mm256_max_epu32(max[2], max[3]));
    let max = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
    let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
    f32::from_bits(_mm_cvtsi128_si32(max) as u32 / 2)
}

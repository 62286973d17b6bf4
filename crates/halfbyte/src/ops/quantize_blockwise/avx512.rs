//! AVX-512: two passes over a block, the second from the L1 cache.
//!
//! ```text
//! for each block:
//!     absmax = max |x|                      (1)
//!     for each group of 64 elements:        (2)
//!         out = nearest code of x * (1 / absmax)  (3)
//! ```
//!
//! 1. As an integer maximum over the bits, doubled to lose the sign.
//!    16-bit elements as integers of 16 bits.
//! 2. A short group is filled up with zeros. Blocks whose reciprocal is not an ordinary number, and
//!    those with NaN or infinity, go to the scalar code.
//! 3. The second pass, which computes, fetches what a first pass to come will read: the next block,
//!    or 4 KiB ahead. Block 256, float32, one thread: 9.4 ms without, 5.8 ms with, and 4.9 ms for
//!    only reading the 67 MB (Xeon with AVX-512, 2026-11).

use super::{AHEAD, prefetch, scalar};
use crate::blocks::BlockSize;
use crate::code::encode8::avx512::{Dynamic512, Encode64, Search512};
use crate::code::{Code8, Kind};
use crate::ops::normalize::{self, Normalizer};
use crate::{DType, Element, bf16, f16};
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
        let ahead = AHEAD.max(size_of_val(x));
        let (x, x_tail) = x.as_chunks::<64>();
        let (q, q_tail) = q.as_chunks_mut::<64>();
        for (x, q) in x.iter().zip(q) {
            prefetch(x, ahead);
            let y = load(x).map(|x| _mm512_mul_ps(x, reciprocal));
            // SAFETY: this function requires the encoder's CPU features; q holds 64 bytes.
            unsafe { _mm512_storeu_si512(q.as_mut_ptr().cast(), encoder.encode64(y)) };
        }
        if !x_tail.is_empty() {
            tail(encoder, x_tail, reciprocal, q_tail);
        }
    }
}

/// A group of fewer than 64. Apart, so that it does not weigh on the loop.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn tail<T: Element>(encoder: &impl Encode64, x: &[T], reciprocal: __m512, q: &mut [u8]) {
    let y = load_some(x).map(|x| _mm512_mul_ps(x, reciprocal));
    let lanes = (1 << q.len()) - 1;
    // SAFETY: this function requires the encoder's CPU features; the mask selects q's bytes.
    unsafe { _mm512_mask_storeu_epi8(q.as_mut_ptr().cast(), lanes, encoder.encode64(y)) };
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn load<T: Element>(x: &[T; 64]) -> [__m512; 4] {
    // SAFETY: 16 elements from 0, 16, 32 and 48 on lie inside the array.
    std::array::from_fn(|i| unsafe { T::load16(x.as_ptr().add(16 * i)) })
}

/// Fewer than 64 elements, filled up with zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn load_some<T: Element>(x: &[T]) -> [__m512; 4] {
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

/// `absmax` of a block, equal to [`normalize::absmax`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn largest<T: Element>(x: &[T]) -> f32 {
    let absmax = match T::DTYPE {
        DType::F32 => largest32(x),
        DType::F16 => f16::from_bits(largest16(x)).to_f32(),
        DType::BF16 => bf16::from_bits(largest16(x)).to_f32(),
    };
    // Widening may change the order of NaNs.
    if absmax.is_nan() { normalize::absmax(x) } else { absmax }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn largest32<T: Element>(x: &[T]) -> f32 {
    let mut max = [_mm512_setzero_si512(); 4];
    let mut take = |x: [__m512; 4]| {
        for (max, x) in max.iter_mut().zip(x) {
            let bits = _mm512_castps_si512(x);
            *max = _mm512_max_epu32(*max, _mm512_add_epi32(bits, bits));
        }
    };
    let (groups, tail) = x.as_chunks::<64>();
    for group in groups {
        take(load(group));
    }
    if !tail.is_empty() {
        take(load_some(tail));
    }
    let max = _mm512_max_epu32(_mm512_max_epu32(max[0], max[1]), _mm512_max_epu32(max[2], max[3]));
    f32::from_bits(_mm512_reduce_max_epu32(max) / 2)
}

/// The largest bits of 16-bit elements, without the sign.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn largest16<T: Element>(x: &[T]) -> u16 {
    assert!(size_of::<T>() == 2);
    let mut max = [_mm512_setzero_si512(); 2];
    let take = |max: &mut __m512i, x: *const T, lanes| {
        // SAFETY: the callers' masks select elements of x only, of the size just checked.
        let bits = unsafe { _mm512_maskz_loadu_epi16(lanes, x.cast()) };
        *max = _mm512_max_epu16(*max, _mm512_add_epi16(bits, bits));
    };
    let (groups, tail) = x.as_chunks::<64>();
    for group in groups {
        take(&mut max[0], group.as_ptr(), u32::MAX);
        take(&mut max[1], group[32..].as_ptr(), u32::MAX);
    }
    for tail in tail.chunks(32) {
        take(&mut max[0], tail.as_ptr(), u32::MAX >> (32 - tail.len()));
    }
    let max = _mm512_max_epu16(max[0], max[1]);
    let odd = _mm512_srli_epi32::<16>(max);
    // The low halves of the lanes now hold the larger of each pair.
    let pairs = _mm512_and_si512(_mm512_max_epu16(max, odd), _mm512_set1_epi32(0xFFFF));
    _mm512_reduce_max_epu32(pairs) as u16 / 2
}

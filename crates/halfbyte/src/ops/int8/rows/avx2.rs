//! AVX2: groups of 32 or 64 elements.
//!
//! ```text
//! stats:   most = max(most, |a|)                            (1)(2)
//! encode:  codes = pack(int(clamp(a * scale, -127, 127)))   (3)(4)
//! decode:  out = float(codes) * stat * (1 / 127)
//! rescale: out = float(acc) * (stat / 127^2) * col_stats + bias
//! ```
//!
//! 1. As a maximum of integers, 16 elements of 16 bits at a time.
//! 2. A group is tested for outliers and NaN as a whole; only one that holds some looks at its
//!    elements.
//! 3. NaN passes through the clamp, becomes the smallest integer and -128 as a byte, which nothing
//!    else does; then 0.
//! 4. The pass fetches the row after this one.

use super::bound::{Bound, after, screen};
use super::scalar;
use crate::Element;
use crate::ops::int8::INV_127;
use crate::ops::int8::scalar::row_factor;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn stats16(row: &[i16], bound: Bound<i16>, flags: &mut [u8]) -> i16 {
    let (sign, limit) = (_mm256_set1_epi16(i16::MAX), _mm256_set1_epi16(bound.limit));
    let (mut most, mut screened) = (_mm256_setzero_si256(), 0);
    let (groups, tail) = row.as_chunks::<64>();
    let mut at = 0;
    for group in groups {
        // SAFETY: 128 bytes.
        let [a, b, c, d] = unsafe { load_bits(group.as_ptr().cast()) };
        let ab = _mm256_max_epi16(_mm256_and_si256(a, sign), _mm256_and_si256(b, sign));
        let cd = _mm256_max_epi16(_mm256_and_si256(c, sign), _mm256_and_si256(d, sign));
        let top = _mm256_max_epi16(ab, cd);
        if _mm256_movemask_epi8(_mm256_cmpgt_epi16(top, limit)) == 0 {
            most = _mm256_max_epi16(most, top);
        } else {
            screened = screened.max(screen(group, bound, &mut flags[at..at + 64]));
        }
        at += 64;
    }
    let mut lanes = [0i16; 16];
    // SAFETY: 32 bytes.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), most) };
    let rest = scalar::stats16(tail, bound, after(flags, at));
    lanes.into_iter().fold(screened.max(rest), i16::max)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn stats32(row: &[i32], bound: Bound<i32>, flags: &mut [u8]) -> i32 {
    let (sign, limit) = (_mm256_set1_epi32(i32::MAX), _mm256_set1_epi32(bound.limit));
    let (mut most, mut screened) = (_mm256_setzero_si256(), 0);
    let (groups, tail) = row.as_chunks::<32>();
    let mut at = 0;
    for group in groups {
        // SAFETY: 128 bytes.
        let [a, b, c, d] = unsafe { load_bits(group.as_ptr().cast()) };
        let ab = _mm256_max_epi32(_mm256_and_si256(a, sign), _mm256_and_si256(b, sign));
        let cd = _mm256_max_epi32(_mm256_and_si256(c, sign), _mm256_and_si256(d, sign));
        let top = _mm256_max_epi32(ab, cd);
        if _mm256_movemask_epi8(_mm256_cmpgt_epi32(top, limit)) == 0 {
            most = _mm256_max_epi32(most, top);
        } else {
            screened = screened.max(screen(group, bound, &mut flags[at..at + 32]));
        }
        at += 32;
    }
    let mut lanes = [0i32; 8];
    // SAFETY: 32 bytes.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), most) };
    let rest = scalar::stats32(tail, bound, after(flags, at));
    lanes.into_iter().fold(screened.max(rest), i32::max)
}

/// # Safety
/// There are 128 bytes to read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_bits(at: *const __m256i) -> [__m256i; 4] {
    // SAFETY: by the caller's contract.
    unsafe {
        [
            _mm256_loadu_si256(at),
            _mm256_loadu_si256(at.add(1)),
            _mm256_loadu_si256(at.add(2)),
            _mm256_loadu_si256(at.add(3)),
        ]
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn encode<T: Element>(row: &[T], scale: f32, codes: &mut [i8]) {
    let scale = [_mm256_set1_ps(scale); 4];
    let ahead = size_of_val(row);
    let (groups, tail) = row.as_chunks::<32>();
    let (codes, codes_tail) = codes.as_chunks_mut::<32>();
    for (group, codes) in groups.iter().zip(codes) {
        prefetch(group, ahead);
        // SAFETY: 32 bytes.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), codes_of(load(group), scale)) };
    }
    if !tail.is_empty() {
        let (mut filled, mut bytes) = ([T::default(); 32], [0i8; 32]);
        filled[..tail.len()].copy_from_slice(tail);
        // SAFETY: 32 bytes.
        unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), codes_of(load(&filled), scale)) };
        codes_tail.copy_from_slice(&bytes[..tail.len()]);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn encode_by_column<T: Element>(row: &[T], scales: &[f32], codes: &mut [i8]) {
    let (groups, tail) = row.as_chunks::<32>();
    let (scales, scales_tail) = scales.as_chunks::<32>();
    let (codes, codes_tail) = codes.as_chunks_mut::<32>();
    for ((group, scales), codes) in groups.iter().zip(scales).zip(codes) {
        let bytes = codes_of(load(group), load(scales));
        // SAFETY: 32 bytes.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), bytes) };
    }
    scalar::encode_by_column(tail, scales_tail, codes_tail);
}

/// The codes of 32 elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn codes_of(a: [__m256; 4], scale: [__m256; 4]) -> __m256i {
    let low = _mm256_packs_epi32(integers(a[0], scale[0]), integers(a[1], scale[1]));
    let high = _mm256_packs_epi32(integers(a[2], scale[2]), integers(a[3], scale[3]));
    // Packing works on halves of a register: 4 bytes of each input beside one another.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    let nan = _mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(i8::MIN));
    _mm256_andnot_si256(nan, bytes)
}

/// `a * scale`, clamped and rounded to nearest even; NaN becomes the smallest integer.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn integers(a: __m256, scale: __m256) -> __m256i {
    // Of two operands, one of which is NaN, minimum and maximum give the second.
    let y = _mm256_min_ps(_mm256_set1_ps(127.0), _mm256_mul_ps(a, scale));
    _mm256_cvtps_epi32(_mm256_max_ps(_mm256_set1_ps(-127.0), y))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load<T: Element>(x: &[T; 32]) -> [__m256; 4] {
    let at = x.as_ptr();
    // SAFETY: 8 elements from 0, 8, 16 and 24 on.
    unsafe { [T::load8(at), T::load8(at.add(8)), T::load8(at.add(16)), T::load8(at.add(24))] }
}

/// Fetches as many bytes as `x` has, `ahead` bytes after it.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch<T>(x: &[T; 32], ahead: usize) {
    let ahead = x.as_ptr().cast::<i8>().wrapping_add(ahead);
    for line in (0..size_of_val(x)).step_by(64) {
        #[allow(unused_unsafe)] // newer compilers know that it is safe
        // SAFETY: a hint, of any address whatever.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn raise<T: Element>(row: &[T], bound: Bound<i32>, most: &mut [f32]) {
    let sign = _mm256_set1_epi32(i32::MAX);
    let (limit, infinity) = (_mm256_set1_epi32(bound.limit), _mm256_set1_epi32(bound.infinity));
    let (groups, tail) = row.as_chunks::<8>();
    let (most, most_tail) = most.as_chunks_mut::<8>();
    for (group, most) in groups.iter().zip(most) {
        // SAFETY: 8 elements and 8 floats.
        unsafe {
            let x = _mm256_and_si256(_mm256_castps_si256(T::load8(group.as_ptr())), sign);
            let (outside, nan) = (_mm256_cmpgt_epi32(x, limit), _mm256_cmpgt_epi32(x, infinity));
            let x = _mm256_andnot_si256(_mm256_andnot_si256(nan, outside), x);
            let before = _mm256_loadu_si256(most.as_ptr().cast());
            _mm256_storeu_si256(most.as_mut_ptr().cast(), _mm256_max_epi32(before, x));
        }
    }
    scalar::raise(tail, bound, most_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode<T: Element>(codes: &[i8], stat: f32, out: &mut [T]) {
    let (factor, inverse) = (_mm256_set1_ps(stat), _mm256_set1_ps(INV_127));
    let (codes, codes_tail) = codes.as_chunks::<8>();
    let (out, out_tail) = out.as_chunks_mut::<8>();
    for (codes, out) in codes.iter().zip(out) {
        // SAFETY: 8 bytes and 8 elements.
        unsafe {
            let q = _mm256_cvtepi8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()));
            let y = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(q), factor), inverse);
            T::store8(out.as_mut_ptr(), y);
        }
    }
    scalar::decode(codes_tail, stat, out_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rescale<T: Element>(
    acc: &[i32],
    row_stat: f32,
    col_stats: &[f32],
    bias: Option<&[f32]>,
    out: &mut [T],
) {
    let factor = _mm256_set1_ps(row_factor(row_stat));
    let (groups, acc_tail) = acc.as_chunks::<8>();
    let (out, out_tail) = out.as_chunks_mut::<8>();
    let mut at = 0;
    for (acc, out) in groups.iter().zip(out) {
        // SAFETY: 8 sums and elements; slices of 8 floats.
        unsafe {
            let sums = _mm256_cvtepi32_ps(_mm256_loadu_si256(acc.as_ptr().cast()));
            let columns = _mm256_loadu_ps(col_stats[at..at + 8].as_ptr());
            let mut y = _mm256_mul_ps(_mm256_mul_ps(sums, factor), columns);
            if let Some(bias) = bias {
                y = _mm256_add_ps(y, _mm256_loadu_ps(bias[at..at + 8].as_ptr()));
            }
            T::store8(out.as_mut_ptr(), y);
        }
        at += 8;
    }
    let bias = bias.map(|b| &b[at..]);
    scalar::rescale(acc_tail, row_stat, &col_stats[at..], bias, out_tail);
}

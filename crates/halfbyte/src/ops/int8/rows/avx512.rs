//! AVX-512: groups of 64 elements.
//!
//! ```text
//! stats:   most = max(most, |a|)                            (1)(2)
//! encode:  codes = pack(int(clamp(a * scale, -127, 127)))   (3)(4)
//! decode:  out = float(codes) * stat * (1 / 127)
//! rescale: out = float(acc) * (stat / 127^2) * col_stats + bias
//! ```
//!
//! 1. As a maximum of integers, 32 elements of 16 bits at a time.
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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn stats16(row: &[i16], bound: Bound<i16>, flags: &mut [u8]) -> i16 {
    let (sign, limit) = (_mm512_set1_epi16(i16::MAX), _mm512_set1_epi16(bound.limit));
    let (mut most, mut screened) = (_mm512_setzero_si512(), 0);
    let (groups, tail) = row.as_chunks::<64>();
    let mut at = 0;
    for group in groups {
        // SAFETY: 32 elements from 0 and 32 on.
        let (a, b) = unsafe {
            let at = group.as_ptr();
            (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(32).cast()))
        };
        let top = _mm512_max_epi16(_mm512_and_si512(a, sign), _mm512_and_si512(b, sign));
        if _mm512_cmpgt_epi16_mask(top, limit) == 0 {
            most = _mm512_max_epi16(most, top);
        } else {
            screened = screened.max(screen(group, bound, &mut flags[at..at + 64]));
        }
        at += 64;
    }
    // The larger half of each pair, moved to the low one.
    let most = _mm512_max_epi16(most, _mm512_srli_epi32::<16>(most));
    let most = _mm512_reduce_max_epi32(_mm512_and_si512(most, _mm512_set1_epi32(0x7FFF))) as i16;
    let rest = scalar::stats16(tail, bound, after(flags, at));
    most.max(screened).max(rest)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn stats32(row: &[i32], bound: Bound<i32>, flags: &mut [u8]) -> i32 {
    let (sign, limit) = (_mm512_set1_epi32(i32::MAX), _mm512_set1_epi32(bound.limit));
    let (mut most, mut screened) = (_mm512_setzero_si512(), 0);
    let (groups, tail) = row.as_chunks::<64>();
    let mut at = 0;
    for group in groups {
        // SAFETY: 16 elements from 0, 16, 32 and 48 on.
        let (a, b, c, d) = unsafe {
            let at = group.as_ptr();
            let (a, b) = (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(16).cast()));
            let at = at.add(32);
            (a, b, _mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(16).cast()))
        };
        let ab = _mm512_max_epi32(_mm512_and_si512(a, sign), _mm512_and_si512(b, sign));
        let cd = _mm512_max_epi32(_mm512_and_si512(c, sign), _mm512_and_si512(d, sign));
        let top = _mm512_max_epi32(ab, cd);
        if _mm512_cmpgt_epi32_mask(top, limit) == 0 {
            most = _mm512_max_epi32(most, top);
        } else {
            screened = screened.max(screen(group, bound, &mut flags[at..at + 64]));
        }
        at += 64;
    }
    let rest = scalar::stats32(tail, bound, after(flags, at));
    _mm512_reduce_max_epi32(most).max(screened).max(rest)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn encode<T: Element>(row: &[T], scale: f32, codes: &mut [i8]) {
    let scale = [_mm512_set1_ps(scale); 4];
    let ahead = size_of_val(row);
    let (groups, tail) = row.as_chunks::<64>();
    let (codes, codes_tail) = codes.as_chunks_mut::<64>();
    for (group, codes) in groups.iter().zip(codes) {
        prefetch(group, ahead);
        // SAFETY: 64 bytes.
        unsafe { _mm512_storeu_si512(codes.as_mut_ptr().cast(), codes_of(load(group), scale)) };
    }
    if !tail.is_empty() {
        let (mut filled, mut bytes) = ([T::default(); 64], [0i8; 64]);
        filled[..tail.len()].copy_from_slice(tail);
        // SAFETY: 64 bytes.
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), codes_of(load(&filled), scale)) };
        codes_tail.copy_from_slice(&bytes[..tail.len()]);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn encode_by_column<T: Element>(row: &[T], scales: &[f32], codes: &mut [i8]) {
    let (groups, tail) = row.as_chunks::<64>();
    let (scales, scales_tail) = scales.as_chunks::<64>();
    let (codes, codes_tail) = codes.as_chunks_mut::<64>();
    for ((group, scales), codes) in groups.iter().zip(scales).zip(codes) {
        let bytes = codes_of(load(group), load(scales));
        // SAFETY: 64 bytes.
        unsafe { _mm512_storeu_si512(codes.as_mut_ptr().cast(), bytes) };
    }
    scalar::encode_by_column(tail, scales_tail, codes_tail);
}

/// The codes of 64 elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn codes_of(a: [__m512; 4], scale: [__m512; 4]) -> __m512i {
    let [a, b, c, d] = [
        integers(a[0], scale[0]),
        integers(a[1], scale[1]),
        integers(a[2], scale[2]),
        integers(a[3], scale[3]),
    ];
    let bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    // Packing works on quarters of a register: 4 bytes of each input beside one another.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let bytes = _mm512_permutexvar_epi32(order, bytes);
    let numbers = _mm512_cmpneq_epi8_mask(bytes, _mm512_set1_epi8(i8::MIN));
    _mm512_maskz_mov_epi8(numbers, bytes)
}

/// `a * scale`, clamped and rounded to nearest even; NaN becomes the smallest integer.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn integers(a: __m512, scale: __m512) -> __m512i {
    // Of two operands, one of which is NaN, minimum and maximum give the second.
    let y = _mm512_min_ps(_mm512_set1_ps(127.0), _mm512_mul_ps(a, scale));
    _mm512_cvtps_epi32(_mm512_max_ps(_mm512_set1_ps(-127.0), y))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn load<T: Element>(x: &[T; 64]) -> [__m512; 4] {
    let at = x.as_ptr();
    // SAFETY: 16 elements from 0, 16, 32 and 48 on.
    unsafe { [T::load16(at), T::load16(at.add(16)), T::load16(at.add(32)), T::load16(at.add(48))] }
}

/// Fetches as many bytes as `x` has, `ahead` bytes after it.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch<T>(x: &[T; 64], ahead: usize) {
    let ahead = x.as_ptr().cast::<i8>().wrapping_add(ahead);
    for line in (0..size_of_val(x)).step_by(64) {
        #[allow(unused_unsafe)] // newer compilers know that it is safe
        // SAFETY: a hint, of any address whatever.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn raise<T: Element>(row: &[T], bound: Bound<i32>, most: &mut [f32]) {
    let sign = _mm512_set1_epi32(i32::MAX);
    let (limit, infinity) = (_mm512_set1_epi32(bound.limit), _mm512_set1_epi32(bound.infinity));
    let (groups, tail) = row.as_chunks::<16>();
    let (most, most_tail) = most.as_chunks_mut::<16>();
    for (group, most) in groups.iter().zip(most) {
        // SAFETY: 16 elements and 16 floats.
        unsafe {
            let x = _mm512_and_si512(_mm512_castps_si512(T::load16(group.as_ptr())), sign);
            let outside = _mm512_cmpgt_epi32_mask(x, limit);
            let outliers = _mm512_mask_cmple_epi32_mask(outside, x, infinity);
            let before = _mm512_loadu_si512(most.as_ptr().cast());
            let after = _mm512_mask_max_epi32(before, !outliers, before, x);
            _mm512_storeu_si512(most.as_mut_ptr().cast(), after);
        }
    }
    scalar::raise(tail, bound, most_tail);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn decode<T: Element>(codes: &[i8], stat: f32, out: &mut [T]) {
    let (factor, inverse) = (_mm512_set1_ps(stat), _mm512_set1_ps(INV_127));
    let (codes, codes_tail) = codes.as_chunks::<16>();
    let (out, out_tail) = out.as_chunks_mut::<16>();
    for (codes, out) in codes.iter().zip(out) {
        // SAFETY: 16 bytes and 16 elements.
        unsafe {
            let q = _mm512_cvtepi8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(q), factor), inverse);
            T::store16(out.as_mut_ptr(), y);
        }
    }
    scalar::decode(codes_tail, stat, out_tail);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn rescale<T: Element>(
    acc: &[i32],
    row_stat: f32,
    col_stats: &[f32],
    bias: Option<&[f32]>,
    out: &mut [T],
) {
    let factor = _mm512_set1_ps(row_factor(row_stat));
    let (groups, acc_tail) = acc.as_chunks::<16>();
    let (out, out_tail) = out.as_chunks_mut::<16>();
    let mut at = 0;
    for (acc, out) in groups.iter().zip(out) {
        // SAFETY: 16 sums and elements; slices of 16 floats.
        unsafe {
            let sums = _mm512_cvtepi32_ps(_mm512_loadu_si512(acc.as_ptr().cast()));
            let columns = _mm512_loadu_ps(col_stats[at..at + 16].as_ptr());
            let mut y = _mm512_mul_ps(_mm512_mul_ps(sums, factor), columns);
            if let Some(bias) = bias {
                y = _mm512_add_ps(y, _mm512_loadu_ps(bias[at..at + 16].as_ptr()));
            }
            T::store16(out.as_mut_ptr(), y);
        }
        at += 16;
    }
    let bias = bias.map(|b| &b[at..]);
    scalar::rescale(acc_tail, row_stat, &col_stats[at..], bias, out_tail);
}

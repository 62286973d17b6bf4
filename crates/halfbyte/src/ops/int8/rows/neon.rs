//! AArch64 Advanced SIMD: groups of 16 or 32 elements.
//!
//! ```text
//! stats:   most = max(most, |a|)                            (1)(2)
//! encode:  codes = narrow(int(a * scale)), at least -127    (3)
//! decode:  out = float(codes) * stat * (1 / 127)
//! rescale: out = float(acc) * (stat / 127^2) * col_stats + bias
//! ```
//!
//! 1. As a maximum of integers, 8 elements of 16 bits at a time.
//! 2. A group is tested for outliers and NaN as a whole; only one that holds some looks at its
//!    elements.
//! 3. The conversion to integers saturates and takes NaN to 0; both steps of narrowing saturate.

use super::bound::{Bound, after, screen};
use super::scalar;
use crate::Element;
use crate::ops::int8::INV_127;
use crate::ops::int8::scalar::row_factor;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::aarch64::*;

pub(super) fn stats16(row: &[i16], bound: Bound<i16>, flags: &mut [u8]) -> i16 {
    let (groups, tail) = row.as_chunks::<32>();
    let (mut at, mut screened) = (0, 0);
    // SAFETY: Advanced SIMD is part of the base architecture; a group is 4 registers.
    let most = unsafe {
        let sign = vdupq_n_s16(i16::MAX);
        let mut most = vdupq_n_s16(0);
        for group in groups {
            let x = group.as_ptr();
            let (a, b) = (vld1q_s16(x), vld1q_s16(x.add(8)));
            let (c, d) = (vld1q_s16(x.add(16)), vld1q_s16(x.add(24)));
            let ab = vmaxq_s16(vandq_s16(a, sign), vandq_s16(b, sign));
            let cd = vmaxq_s16(vandq_s16(c, sign), vandq_s16(d, sign));
            let top = vmaxq_s16(ab, cd);
            if vmaxvq_s16(top) <= bound.limit {
                most = vmaxq_s16(most, top);
            } else {
                screened = screened.max(screen(group, bound, &mut flags[at..at + 32]));
            }
            at += 32;
        }
        vmaxvq_s16(most)
    };
    most.max(screened).max(scalar::stats16(tail, bound, after(flags, at)))
}

pub(super) fn stats32(row: &[i32], bound: Bound<i32>, flags: &mut [u8]) -> i32 {
    let (groups, tail) = row.as_chunks::<16>();
    let (mut at, mut screened) = (0, 0);
    // SAFETY: Advanced SIMD is part of the base architecture; a group is 4 registers.
    let most = unsafe {
        let sign = vdupq_n_s32(i32::MAX);
        let mut most = vdupq_n_s32(0);
        for group in groups {
            let x = group.as_ptr();
            let (a, b) = (vld1q_s32(x), vld1q_s32(x.add(4)));
            let (c, d) = (vld1q_s32(x.add(8)), vld1q_s32(x.add(12)));
            let ab = vmaxq_s32(vandq_s32(a, sign), vandq_s32(b, sign));
            let cd = vmaxq_s32(vandq_s32(c, sign), vandq_s32(d, sign));
            let top = vmaxq_s32(ab, cd);
            if vmaxvq_s32(top) <= bound.limit {
                most = vmaxq_s32(most, top);
            } else {
                screened = screened.max(screen(group, bound, &mut flags[at..at + 16]));
            }
            at += 16;
        }
        vmaxvq_s32(most)
    };
    most.max(screened).max(scalar::stats32(tail, bound, after(flags, at)))
}

pub(super) fn encode<T: Element>(row: &[T], scale: f32, codes: &mut [i8]) {
    // SAFETY: Advanced SIMD is part of the base architecture.
    let scale = [unsafe { vdupq_n_f32(scale) }; 4];
    let (groups, tail) = row.as_chunks::<16>();
    let (codes, codes_tail) = codes.as_chunks_mut::<16>();
    for (group, codes) in groups.iter().zip(codes) {
        // SAFETY: as above; 16 bytes.
        unsafe { vst1q_s8(codes.as_mut_ptr(), codes_of(load(group), scale)) };
    }
    if !tail.is_empty() {
        let (mut filled, mut bytes) = ([T::default(); 16], [0i8; 16]);
        filled[..tail.len()].copy_from_slice(tail);
        // SAFETY: as above; 16 bytes.
        unsafe { vst1q_s8(bytes.as_mut_ptr(), codes_of(load(&filled), scale)) };
        codes_tail.copy_from_slice(&bytes[..tail.len()]);
    }
}

pub(super) fn encode_by_column<T: Element>(row: &[T], scales: &[f32], codes: &mut [i8]) {
    let (groups, tail) = row.as_chunks::<16>();
    let (scales, scales_tail) = scales.as_chunks::<16>();
    let (codes, codes_tail) = codes.as_chunks_mut::<16>();
    for ((group, scales), codes) in groups.iter().zip(scales).zip(codes) {
        // SAFETY: Advanced SIMD is part of the base architecture; 16 bytes.
        unsafe { vst1q_s8(codes.as_mut_ptr(), codes_of(load(group), load(scales))) };
    }
    scalar::encode_by_column(tail, scales_tail, codes_tail);
}

/// The codes of 16 elements.
#[inline]
fn codes_of(a: [float32x4_t; 4], scale: [float32x4_t; 4]) -> int8x16_t {
    // SAFETY: Advanced SIMD is part of the base architecture.
    unsafe {
        let low = vcombine_s16(
            vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(a[0], scale[0]))),
            vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(a[1], scale[1]))),
        );
        let high = vcombine_s16(
            vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(a[2], scale[2]))),
            vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(a[3], scale[3]))),
        );
        let bytes = vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
        vmaxq_s8(bytes, vdupq_n_s8(-127))
    }
}

#[inline]
fn load<T: Element>(x: &[T; 16]) -> [float32x4_t; 4] {
    let at = x.as_ptr();
    // SAFETY: 4 elements from 0, 4, 8 and 12 on.
    unsafe { [T::load4(at), T::load4(at.add(4)), T::load4(at.add(8)), T::load4(at.add(12))] }
}

pub(super) fn raise<T: Element>(row: &[T], bound: Bound<i32>, most: &mut [f32]) {
    let (groups, tail) = row.as_chunks::<4>();
    let (most, most_tail) = most.as_chunks_mut::<4>();
    for (group, most) in groups.iter().zip(most) {
        // SAFETY: Advanced SIMD is part of the base architecture; 4 elements and 4 floats.
        unsafe {
            let x = vreinterpretq_s32_f32(vabsq_f32(T::load4(group.as_ptr())));
            let outside = vcgtq_s32(x, vdupq_n_s32(bound.limit));
            let nan = vcgtq_s32(x, vdupq_n_s32(bound.infinity));
            let x = vbicq_s32(x, vreinterpretq_s32_u32(vbicq_u32(outside, nan)));
            let before = vreinterpretq_s32_f32(vld1q_f32(most.as_ptr()));
            vst1q_f32(most.as_mut_ptr(), vreinterpretq_f32_s32(vmaxq_s32(before, x)));
        }
    }
    scalar::raise(tail, bound, most_tail);
}

pub(super) fn decode<T: Element>(codes: &[i8], stat: f32, out: &mut [T]) {
    let (groups, codes_tail) = codes.as_chunks::<8>();
    let (out, out_tail) = out.as_chunks_mut::<8>();
    for (codes, out) in groups.iter().zip(out) {
        // SAFETY: Advanced SIMD is part of the base architecture; 8 bytes and 8 elements.
        unsafe {
            let q = vmovl_s8(vld1_s8(codes.as_ptr()));
            let (low, high) = (vmovl_s16(vget_low_s16(q)), vmovl_s16(vget_high_s16(q)));
            let out = out.as_mut_ptr();
            let y = vmulq_n_f32(vmulq_n_f32(vcvtq_f32_s32(low), stat), INV_127);
            T::store4(out, y);
            let y = vmulq_n_f32(vmulq_n_f32(vcvtq_f32_s32(high), stat), INV_127);
            T::store4(out.add(4), y);
        }
    }
    scalar::decode(codes_tail, stat, out_tail);
}

pub(super) fn rescale<T: Element>(
    acc: &[i32],
    row_stat: f32,
    col_stats: &[f32],
    bias: Option<&[f32]>,
    out: &mut [T],
) {
    let factor = row_factor(row_stat);
    let (groups, acc_tail) = acc.as_chunks::<4>();
    let (out, out_tail) = out.as_chunks_mut::<4>();
    let mut at = 0;
    for (acc, out) in groups.iter().zip(out) {
        // SAFETY: Advanced SIMD is part of the base architecture; 4 sums and elements; slices of
        // 4 floats.
        unsafe {
            let sums = vmulq_n_f32(vcvtq_f32_s32(vld1q_s32(acc.as_ptr())), factor);
            let mut y = vmulq_f32(sums, vld1q_f32(col_stats[at..at + 4].as_ptr()));
            if let Some(bias) = bias {
                y = vaddq_f32(y, vld1q_f32(bias[at..at + 4].as_ptr()));
            }
            T::store4(out.as_mut_ptr(), y);
        }
        at += 4;
    }
    let bias = bias.map(|b| &b[at..]);
    scalar::rescale(acc_tail, row_stat, &col_stats[at..], bias, out_tail);
}

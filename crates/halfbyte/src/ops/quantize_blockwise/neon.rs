//! AArch64 Advanced SIMD: two passes over a block, the second from the L1 cache.
//!
//! ```text
//! for each block:
//!     absmax = max |x|                      (1)
//!     for each group of 16 elements:        (2)
//!         out = nearest code of x * (1 / absmax)
//! ```
//!
//! 1. As an integer maximum over the bits, doubled to lose the sign.
//! 2. A short group is filled up with zeros. Blocks whose reciprocal is not an ordinary number, and
//!    those with NaN or infinity, go to the scalar code.

use super::scalar;
use crate::Element;
use crate::blocks::BlockSize;
use crate::code::encode8::neon::{Dynamic128, Encode16, Search128};
use crate::code::{Code8, Kind};
use crate::ops::normalize::Normalizer;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::aarch64::*;

pub(super) fn quantize<T: Element>(
    input: &[T],
    code: &Code8,
    blocksize: BlockSize,
    out: &mut [u8],
    absmax: &mut [f32],
) {
    match code.kind() {
        Kind::DynamicSigned => {
            blocks(&Dynamic128::<true>::new(), input, code, blocksize, out, absmax);
        }
        Kind::DynamicUnsigned => {
            blocks(&Dynamic128::<false>::new(), input, code, blocksize, out, absmax);
        }
        Kind::Other => blocks(&Clamped(Search128::new(code)), input, code, blocksize, out, absmax),
    }
}

/// A product one ulp above 1 counts as 1. The dynamic maps have no border that close to 1.
struct Clamped<'a>(Search128<'a>);

impl Encode16 for Clamped<'_> {
    #[inline]
    fn encode16(&self, y: [float32x4_t; 4]) -> uint8x16_t {
        // SAFETY: Advanced SIMD is part of the base architecture.
        let clamp = |y| unsafe { vminq_f32(vmaxq_f32(y, vdupq_n_f32(-1.0)), vdupq_n_f32(1.0)) };
        self.0.encode16(y.map(clamp))
    }
}

fn blocks<T: Element>(
    encoder: &impl Encode16,
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
        // SAFETY: Advanced SIMD is part of the base architecture.
        let encode = |x: [float32x4_t; 4]| unsafe {
            encoder.encode16(x.map(|x| vmulq_n_f32(x, reciprocal)))
        };
        let (x, x_tail) = x.as_chunks::<16>();
        let (q, q_tail) = q.as_chunks_mut::<16>();
        for (x, q) in x.iter().zip(q) {
            // SAFETY: q holds 16 bytes.
            unsafe { vst1q_u8(q.as_mut_ptr(), encode(load16(x))) };
        }
        if !x_tail.is_empty() {
            let mut q = [0u8; 16];
            // SAFETY: as above.
            unsafe { vst1q_u8(q.as_mut_ptr(), encode(load16(&filled(x_tail)))) };
            q_tail.copy_from_slice(&q[..q_tail.len()]);
        }
    }
}

/// A short group with zeros after it.
fn filled<T: Element>(tail: &[T]) -> [T; 16] {
    let mut x = [T::default(); 16];
    x[..tail.len()].copy_from_slice(tail);
    x
}

#[inline]
fn load16<T: Element>(x: &[T; 16]) -> [float32x4_t; 4] {
    // SAFETY: 4 elements from 0, 4, 8 and 12 on lie inside the array.
    std::array::from_fn(|i| unsafe { T::load4(x.as_ptr().add(4 * i)) })
}

/// `absmax` of a block, equal to [`normalize::absmax`](crate::ops::normalize::absmax).
fn largest<T: Element>(x: &[T]) -> f32 {
    // SAFETY: Advanced SIMD is part of the base architecture.
    unsafe {
        let mut max = [vdupq_n_u32(0); 4];
        let mut take = |x: &[T; 16]| {
            for (max, x) in max.iter_mut().zip(load16(x)) {
                let bits = vreinterpretq_u32_f32(x);
                *max = vmaxq_u32(*max, vaddq_u32(bits, bits));
            }
        };
        let (groups, tail) = x.as_chunks::<16>();
        groups.iter().for_each(&mut take);
        if !tail.is_empty() {
            take(&filled(tail));
        }
        let max = vmaxq_u32(vmaxq_u32(max[0], max[1]), vmaxq_u32(max[2], max[3]));
        f32::from_bits(vmaxvq_u32(max) / 2)
    }
}

//! AArch64 Advanced SIMD.
//!
//! ```text
//! for each 8 elements (4 bytes of packed codes):
//!     E, O = the elements at even and odd places, as 4 float32 each
//!     for v in E, O:
//!         y    = v * reciprocal
//!         rank = binary search for y among the 15 borders
//!     byte = rank(E) << 4 | rank(O)
//! FP4: byte = codes[byte >> 4] << 4 | codes[byte & 15]
//! ```
//!
//! Liberties taken with it:
//! 1. The next border of the search is looked up by bytes: `path * 4 + 0, 1, 2, 3`.
//! 2. Four vectors of 32-bit lanes are narrowed to 16 bytes at once.

use super::chunked::{ROW, Variant};
use super::staircase::Staircase;
use crate::blocks::BlockSize;
use crate::code::Code4;
use crate::{DType, Element, f16};
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::aarch64::*;

pub(super) struct Neon;

impl Variant for Neon {
    #[target_feature(enable = "neon")]
    unsafe fn absmax<T: Element>(x: &[T], blocksize: BlockSize, absmax: &mut [f32]) {
        for (block, scale) in x.chunks(blocksize.get()).zip(absmax) {
            // SAFETY: a block of whole rows is whole vectors of 8 16-bit or 4 32-bit elements.
            *scale = unsafe {
                match T::DTYPE {
                    DType::F32 => absmax32(block.as_ptr().cast(), block.len()),
                    DType::F16 => {
                        f16::from_bits(absmax16(block.as_ptr().cast(), block.len())).to_f32()
                    }
                    DType::BF16 => {
                        let half = absmax16(block.as_ptr().cast(), block.len());
                        f32::from_bits(u32::from(half) << 16)
                    }
                }
            };
        }
    }

    #[target_feature(enable = "neon")]
    unsafe fn encode<T: Element>(
        x: &[T],
        code: Code4,
        blocksize: BlockSize,
        reciprocal: &[f32],
        packed: &mut [u8],
    ) {
        let shift = blocksize.get().trailing_zeros();
        let encoder = Encoder::new(code);
        let rows = x.chunks_exact(ROW).zip(packed.chunks_exact_mut(ROW / 2));
        for (i, (row, bytes)) in rows.enumerate() {
            let r = vdupq_n_f32(reciprocal[(i * ROW) >> shift]);
            let mut words = [vdupq_n_u32(0); 4];
            for (j, word) in words.iter_mut().enumerate() {
                // SAFETY: a row holds four times 8 elements.
                let (a, b) = unsafe {
                    let x = row.as_ptr().add(j * 8);
                    (T::load4(x), T::load4(x.add(4)))
                };
                let high = encoder.rank(vmulq_f32(vuzp1q_f32(a, b), r));
                let low = encoder.rank(vmulq_f32(vuzp2q_f32(a, b), r));
                *word = vsliq_n_u32::<4>(low, high);
            }
            let [a, b, c, d] = words.map(|w| vmovn_u32(w));
            let ranks = vcombine_u8(vmovn_u16(vcombine_u16(a, b)), vmovn_u16(vcombine_u16(c, d)));
            // SAFETY: `bytes` holds 16 bytes.
            unsafe { vst1q_u8(bytes.as_mut_ptr(), encoder.codes(ranks)) };
        }
    }
}

/// The tables in registers.
#[derive(Clone, Copy)]
struct Encoder {
    root: float32x4_t,
    /// The borders of the search tree's other levels, from left to right.
    levels: [uint8x16x2_t; 3],
    /// Codes by rank; `None` when they are the ranks (NF4).
    codes: Option<uint8x16_t>,
}

impl Encoder {
    #[inline]
    #[target_feature(enable = "neon")]
    fn new(code: Code4) -> Self {
        let Staircase { borders: m, codes } = Staircase::of(code);
        let levels = [
            [m[3], m[11], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [m[1], m[5], m[9], m[13], 0.0, 0.0, 0.0, 0.0],
            [m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14]],
        ];
        // SAFETY: 32 bytes each; `codes` holds 16.
        unsafe {
            Self {
                root: vdupq_n_f32(m[7]),
                levels: levels.map(|level| {
                    let bytes = level.as_ptr().cast::<u8>();
                    uint8x16x2_t(vld1q_u8(bytes), vld1q_u8(bytes.add(16)))
                }),
                codes: (code == Code4::Fp4).then(|| vld1q_u8(codes.as_ptr())),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn rank(self, y: float32x4_t) -> uint32x4_t {
        let mut path = vshrq_n_u32::<31>(vcgtq_f32(y, self.root));
        for level in self.levels {
            let index = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), path, 0x0404_0404);
            let border = vqtbl2q_u8(level, vreinterpretq_u8_u32(index));
            let above = vcgtq_f32(y, vreinterpretq_f32_u8(border));
            path = vsubq_u32(vaddq_u32(path, path), above);
        }
        path
    }

    /// Ranks to codes, two a byte.
    #[inline]
    #[target_feature(enable = "neon")]
    fn codes(self, ranks: uint8x16_t) -> uint8x16_t {
        let Some(codes) = self.codes else { return ranks };
        let low = vqtbl1q_u8(codes, vandq_u8(ranks, vdupq_n_u8(0x0F)));
        let high = vqtbl1q_u8(codes, vshrq_n_u8::<4>(ranks));
        vsliq_n_u8::<4>(low, high)
    }
}

/// The largest 15-bit magnitude.
///
/// # Safety
/// `x` is valid for reading `len` 16-bit elements, a multiple of 32.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn absmax16(x: *const u16, len: usize) -> u16 {
    let mut most = [vdupq_n_u16(0); 4];
    for i in (0..len).step_by(32) {
        for (quarter, most) in most.iter_mut().enumerate() {
            // SAFETY: `i + 32 <= len`.
            let x = unsafe { vld1q_u16(x.add(i + quarter * 8)) };
            *most = vmaxq_u16(*most, vandq_u16(x, vdupq_n_u16(0x7FFF)));
        }
    }
    let [a, b, c, d] = most;
    vmaxvq_u16(vmaxq_u16(vmaxq_u16(a, b), vmaxq_u16(c, d)))
}

/// The largest magnitude of float32 bits.
///
/// # Safety
/// `x` is valid for reading `len` 32-bit elements, a multiple of 32.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn absmax32(x: *const u32, len: usize) -> f32 {
    let mut most = [vdupq_n_u32(0); 4];
    for i in (0..len).step_by(16) {
        for (quarter, most) in most.iter_mut().enumerate() {
            // SAFETY: `i + 16 <= len`.
            let x = unsafe { vld1q_u32(x.add(i + quarter * 4)) };
            *most = vmaxq_u32(*most, vandq_u32(x, vdupq_n_u32(0x7FFF_FFFF)));
        }
    }
    let [a, b, c, d] = most;
    f32::from_bits(vmaxvq_u32(vmaxq_u32(vmaxq_u32(a, b), vmaxq_u32(c, d))))
}

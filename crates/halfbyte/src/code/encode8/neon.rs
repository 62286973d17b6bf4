//! AArch64 Advanced SIMD: 16 elements at a time, in four vectors of 4.

use super::{DOUBT, DynamicTables, FRACTION, PIECE_SHIFT, STEEP, piece};
use crate::Code8;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::aarch64::*;

/// Encodes groups of 16 elements.
pub(crate) trait Encode16 {
    /// The index of the nearest code for each lane, in order.
    fn encode16(&self, y: [float32x4_t; 4]) -> uint8x16_t;
}

/// The low bytes of four vectors of 32-bit lanes, in order.
#[inline]
fn low_bytes([a, b, c, d]: [uint32x4_t; 4]) -> uint8x16_t {
    // SAFETY: Advanced SIMD is part of the base architecture, here and below.
    unsafe {
        let ab = vcombine_u16(vmovn_u32(a), vmovn_u32(b));
        let cd = vcombine_u16(vmovn_u32(c), vmovn_u32(d));
        vcombine_u8(vmovn_u16(ab), vmovn_u16(cd))
    }
}

/// The search tree. Without a gather instruction the lanes walk it in ordinary registers, each
/// level for all 16 before the next, so that their loads overlap.
pub(crate) struct Search128<'a> {
    tree: &'a [f32; 256],
}

impl<'a> Search128<'a> {
    pub(crate) fn new(code: &'a Code8) -> Self {
        Self { tree: code.tree() }
    }
}

impl Encode16 for Search128<'_> {
    #[inline]
    fn encode16(&self, y: [float32x4_t; 4]) -> uint8x16_t {
        let mut lanes = [0.0f32; 16];
        for (lanes, y) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(y) {
            // SAFETY: there is room for 4 lanes.
            unsafe { vst1q_f32(lanes.as_mut_ptr(), y) };
        }
        let mut h = [1usize; 16];
        for _ in 0..8 {
            for (h, y) in h.iter_mut().zip(lanes) {
                *h = 2 * *h + usize::from(y > self.tree[*h & 255]);
            }
        }
        let indices = h.map(|h| h as u8); // 256 + the index
        // SAFETY: there are 16 bytes.
        unsafe { vld1q_u8(indices.as_ptr()) }
    }
}

/// Arithmetic for the default dynamic maps; lanes must be numbers in [-1, 1], give or take an ulp.
pub(crate) struct Dynamic128<const SIGNED: bool> {
    tables: &'static DynamicTables,
    slope: uint8x16x2_t,
    offset: uint8x16x2_t,
    first: uint8x16x2_t,
}

impl<const SIGNED: bool> Dynamic128<SIGNED> {
    pub(crate) fn new() -> Self {
        let tables = DynamicTables::get(SIGNED);
        // SAFETY: each table holds 8 entries, 32 bytes.
        let load = |table: &[f32; 8]| unsafe { vld1q_u8_x2(table.as_ptr().cast()) };
        Self {
            tables,
            slope: load(&tables.slope),
            offset: load(&tables.offset),
            first: load(&tables.first),
        }
    }

    /// `256 + t`, as its bits.
    #[inline]
    fn position(&self, y: float32x4_t) -> uint32x4_t {
        let (multiplier, bias) = piece(SIGNED);
        // SAFETY: as in `low_bytes`.
        unsafe {
            let a =
                vmaxq_f32(if SIGNED { vabsq_f32(y) } else { y }, vdupq_n_f32(self.tables.floor));
            let high = vshrq_n_u32::<16>(vreinterpretq_u32_f32(a));
            let scaled = vmlaq_n_u32(vdupq_n_u32(bias as u32), high, multiplier as u32);
            let d = vandq_u32(vshrq_n_u32::<{ PIECE_SHIFT as i32 }>(scaled), vdupq_n_u32(7));
            // Entry d of a table is its bytes 4 d + 0, 1, 2, 3.
            let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), d, 0x0404_0404);
            let bytes = vreinterpretq_u8_u32(bytes);
            let line = |table| vreinterpretq_f32_u8(vqtbl2q_u8(table, bytes));
            let t = vfmaq_f32(line(self.offset), a, line(self.slope));
            let t = vminq_f32(t, vfmaq_n_f32(line(self.first), t, STEEP));
            if SIGNED {
                return vreinterpretq_u32_f32(t);
            }
            let (slope, offset) = self.tables.last;
            vreinterpretq_u32_f32(vmaxq_f32(t, vfmaq_n_f32(vdupq_n_f32(offset), a, slope)))
        }
    }

    /// Settles a group of which some lanes are in doubt. There is no gather to read the borders
    /// nearest to them with.
    #[cold]
    #[inline(never)]
    fn search(&self, y: [float32x4_t; 4]) -> uint8x16_t {
        Search128::new(self.tables.code).encode16(y)
    }
}

impl<const SIGNED: bool> Encode16 for Dynamic128<SIGNED> {
    #[inline]
    fn encode16(&self, y: [float32x4_t; 4]) -> uint8x16_t {
        let t = y.map(|y| self.position(y));
        // SAFETY: as in `low_bytes`.
        unsafe {
            let fraction = |t| vandq_u32(t, vdupq_n_u32(DOUBT as u32));
            let ab = vminq_u32(fraction(t[0]), fraction(t[1]));
            let cd = vminq_u32(fraction(t[2]), fraction(t[3]));
            if vminvq_u32(vminq_u32(ab, cd)) == 0 {
                return self.search(y);
            }
            let n = low_bytes(t.map(|t| vshrq_n_u32::<{ FRACTION as i32 }>(t)));
            if !SIGNED {
                return n;
            }
            let negative = |y| vreinterpretq_u32_s32(vshrq_n_s32::<31>(vreinterpretq_s32_f32(y)));
            let zero = vdupq_n_u8(127);
            // Saturating: -1 lies below the last border of |y|, but there is no 128th negative code.
            vbslq_u8(low_bytes(y.map(negative)), vqsubq_u8(zero, n), vaddq_u8(zero, n))
        }
    }
}

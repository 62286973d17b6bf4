//! AArch64 Advanced SIMD. `tbl` looks a nibble up in 16 bytes: once for each byte of a float32,
//! the four results interleaved.

use super::{GROUP_VECTORS, Kernel, Layout, Line, Product, Sums, finish, pack};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the names say where they come from
use std::arch::aarch64::*;
use std::ops::Range;

pub(super) struct Neon;

impl Kernel for Neon {
    type V = float32x4_t;
    /// Byte i of the 16 table entries.
    type Table = [uint8x16_t; 4];
    type Codes = [float32x4_t; GROUP_VECTORS];
    const LANES: usize = 4;
    /// Vector 2 i holds the high nibbles of bytes 4 i.., vector 2 i + 1 the low ones.
    const CODE_AT: [u8; 128] = {
        let mut code_at = [0; 128];
        let mut i = 0;
        while i < 32 {
            let (vector, lane) = (i / 4, i % 4);
            code_at[i] = ((vector / 2 * 4 + lane) * 2 + vector % 2) as u8;
            i += 1;
        }
        code_at
    };
    const SCALES: usize = 4;
    const WEIGHT_ROWS: usize = 4;
    const ROWS: usize = 4;
    const DIRECT_ROWS: usize = 1;

    #[inline(always)]
    unsafe fn table(table: &[f32; 16]) -> [uint8x16_t; 4] {
        // SAFETY: 16 floats, 64 bytes.
        let planes = unsafe { vld4q_u8(table.as_ptr().cast()) };
        [planes.0, planes.1, planes.2, planes.3]
    }

    #[inline(always)]
    unsafe fn read<const PAST_END: bool>(
        table: [uint8x16_t; 4],
        packed: *const u8,
    ) -> [float32x4_t; GROUP_VECTORS] {
        // SAFETY: 16 bytes are readable at `packed`.
        unsafe {
            let v = vld1q_u8(packed);
            let nibbles = [vshrq_n_u8::<4>(v), vandq_u8(v, vdupq_n_u8(0x0F))];
            let mut codes = [vdupq_n_f32(0.0); GROUP_VECTORS];
            for (i, q) in nibbles.into_iter().enumerate() {
                let low = vzipq_u8(vqtbl1q_u8(table[0], q), vqtbl1q_u8(table[1], q));
                let high = vzipq_u8(vqtbl1q_u8(table[2], q), vqtbl1q_u8(table[3], q));
                let halves = [(low.0, high.0), (low.1, high.1)];
                for (half, (low, high)) in halves.into_iter().enumerate() {
                    let zip = vzipq_u16(vreinterpretq_u16_u8(low), vreinterpretq_u16_u8(high));
                    codes[half * 4 + i] = vreinterpretq_f32_u16(zip.0);
                    codes[half * 4 + 2 + i] = vreinterpretq_f32_u16(zip.1);
                }
            }
            codes
        }
    }

    #[inline(always)]
    unsafe fn vector(
        _: [uint8x16_t; 4],
        codes: &[float32x4_t; GROUP_VECTORS],
        i: usize,
    ) -> float32x4_t {
        codes[i]
    }

    #[inline(always)]
    unsafe fn scale(units: *const f32, i: usize) -> float32x4_t {
        // SAFETY: 4 units, `i < 4`.
        unsafe { vld1q_dup_f32(units.add(i)) }
    }

    #[inline(always)]
    unsafe fn halves(low: f32, _: f32) -> float32x4_t {
        // SAFETY: see `zero`.
        unsafe { vdupq_n_f32(low) }
    }

    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: part of the base architecture, as is everything below.
        unsafe { vdupq_n_f32(0.0) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        // SAFETY: 4 floats.
        unsafe { vld1q_f32(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: float32x4_t) {
        // SAFETY: room for 4 floats.
        unsafe { vst1q_f32(to, v) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see `zero`.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: see `zero`.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see `zero`.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sum(v: float32x4_t) -> f32 {
        // SAFETY: see `zero`.
        unsafe { vaddvq_f32(v) }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {
        // The stable intrinsics have none, and such processors follow several streams by
        // themselves.
    }
    #[inline(always)]
    unsafe fn widen<T: Element>(from: *const T) -> float32x4_t {
        // SAFETY: 4 elements.
        unsafe { T::load4(from) }
    }
    #[inline(always)]
    unsafe fn narrow<T: Element>(to: *mut T, v: float32x4_t) {
        // SAFETY: room for 4 elements.
        unsafe { T::store4(to, v) }
    }

    #[inline(always)]
    unsafe fn splat8(to: *mut f32, scale: f32) {
        // SAFETY: room for 8 floats.
        unsafe {
            vst1q_f32(to, vdupq_n_f32(scale));
            vst1q_f32(to.add(4), vdupq_n_f32(scale));
        }
    }

    unsafe fn pack<T: Element>(rows: &[&[T]], layout: Layout, to: &mut [Line]) {
        // SAFETY: the caller's promises.
        unsafe { pack::<T, Self>(rows, layout, to) }
    }
    unsafe fn block(product: &Product<'_>, features: Range<usize>, sums: &mut Sums) {
        // SAFETY: the caller's promises.
        unsafe { product.block::<Self>(features, sums) }
    }
    unsafe fn finish<T: Element>(sums: &[f32], bias: Option<&[T]>, out: &mut [T]) {
        // SAFETY: the caller's promises.
        unsafe { finish::<T, Self>(sums, bias, out) }
    }
}

//! AArch64 Advanced SIMD: tiles of 6 rows by 16 outputs, 24 registers of sums. With the dot product
//! extension (`sdot`, `DOT`) four columns take one instruction; without, int16 products are added
//! in pairs, twice. No step can overflow: a product of two int8 is at most 2^14 as int16, and
//! `saddlp` widens before it adds. Tested under qemu with and without `sdot`; never run on hardware
//! so far (November 2026).

use super::{Coming, LANES, Line, Micro, STEP, TOGETHER};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the vocabulary of the file
use std::arch::aarch64::*;

pub(super) struct Neon<const DOT: bool>;

/// True where the machine has `sdot`.
pub(super) fn has_dot() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

pub(super) const ROWS: usize = 6;
/// Registers of a line.
pub(super) const QUARTERS: usize = 4;

impl<const DOT: bool> Micro for Neon<DOT> {
    const ROWS: usize = ROWS;
    const LINES: usize = 1;
    const GROUP: usize = 4;
    const LIFT: i32 = 0;

    unsafe fn pack_panel(rows: &[&[i8]], panel: &mut [Line]) {
        let depth = rows.first().map_or(0, |r| r.len());
        assert!(rows.iter().all(|r| r.len() == depth) && rows.len() <= LANES);
        assert_eq!(panel.len(), depth.div_ceil(4));
        for (lane, row) in rows.iter().enumerate() {
            let (whole, rest) = row.as_chunks::<4>();
            for (line, codes) in panel.iter_mut().zip(whole) {
                line.0[lane] = i32::from_ne_bytes(codes.map(i8::cast_unsigned));
            }
            if !rest.is_empty() {
                let mut end = [0; 4];
                end[..rest.len()].copy_from_slice(rest);
                panel[whole.len()].0[lane] = i32::from_ne_bytes(end.map(i8::cast_unsigned));
            }
        }
    }

    unsafe fn multiply(
        rows: &[i32],
        panel: &[Line],
        sums: &mut [Line],
        _: usize,
        coming: &mut Coming,
    ) {
        let rows = rows.as_chunks::<ROWS>().0;
        let sums: &mut [Line; ROWS] = sums.try_into().expect("a tile of sums");
        let mut tile = [[zero(); QUARTERS]; ROWS];
        for m in 0..ROWS {
            tile[m] = load(&sums[m]);
        }
        let stretches = rows.chunks(STEP).zip(panel.chunks(STEP));
        for (rows, panel) in stretches {
            coming.step();
            for (rows, weights) in rows.iter().zip(panel) {
                let weights = load(weights);
                for m in 0..ROWS {
                    // SAFETY: part of the base architecture.
                    let row = unsafe { vreinterpretq_s8_s32(vdupq_n_s32(rows[m])) };
                    for q in 0..QUARTERS {
                        // SAFETY: as above.
                        let weights = unsafe { vreinterpretq_s8_s32(weights[q]) };
                        // SAFETY: `DOT` is used on machines that have it.
                        tile[m][q] = unsafe { dot::<DOT>(tile[m][q], weights, row) };
                    }
                }
            }
        }
        for m in 0..ROWS {
            store(&mut sums[m], tile[m]);
        }
    }

    unsafe fn multiply_add(rows: &[f32], columns: &[Line], values: &mut [Line]) {
        let rows = rows.as_chunks::<ROWS>().0;
        let values: &mut [Line; ROWS] = values.try_into().expect("a tile of values");
        let mut tile = [[zero(); QUARTERS]; ROWS];
        for m in 0..ROWS {
            tile[m] = load(&values[m]);
        }
        for (rows, columns) in rows.iter().zip(columns) {
            let columns = load(columns);
            for m in 0..ROWS {
                for q in 0..QUARTERS {
                    tile[m][q] = fma(tile[m][q], rows[m], columns[q]);
                }
            }
        }
        for m in 0..ROWS {
            store(&mut values[m], tile[m]);
        }
    }

    unsafe fn scale(sums: &mut [Line], row: f32, columns: &[Line]) {
        for (sum, column) in sums.iter_mut().zip(columns) {
            let (mut v, column) = (load(sum), load(column));
            for q in 0..QUARTERS {
                // SAFETY: part of the base architecture.
                v[q] = unsafe {
                    let y = vmulq_f32(vcvtq_f32_s32(v[q]), vdupq_n_f32(row));
                    vreinterpretq_s32_f32(vmulq_f32(y, vreinterpretq_f32_s32(column[q])))
                };
            }
            store(sum, v);
        }
    }

    unsafe fn add_columns(row: &[f32], columns: &[Line], values: &mut [Line]) {
        let lines = values.len();
        assert_eq!(columns.len(), row.len() * lines);
        for (i, value) in values.iter_mut().enumerate() {
            let mut v = load(value);
            for (x, columns) in row.iter().zip(columns.chunks_exact(lines)) {
                let column = load(&columns[i]);
                for q in 0..QUARTERS {
                    v[q] = fma(v[q], *x, column[q]);
                }
            }
            store(value, v);
        }
    }

    unsafe fn finish<T: Element>(values: &[Line], bias: Option<&[T]>, out: &mut [T]) {
        for (i, out) in out.chunks_mut(4).enumerate() {
            // SAFETY: part of the base architecture; the arrays hold 4 elements.
            unsafe {
                let mut v = vreinterpretq_f32_s32(load(&values[i / QUARTERS])[i % QUARTERS]);
                if let Some(bias) = bias {
                    let mut all = [T::default(); 4];
                    all[..out.len()].copy_from_slice(&bias[i * 4..][..out.len()]);
                    v = vaddq_f32(v, T::load4(all.as_ptr()));
                }
                let mut all = [T::default(); 4];
                T::store4(all.as_mut_ptr(), v);
                out.copy_from_slice(&all[..out.len()]);
            }
        }
    }

    unsafe fn dots<const M: usize>(
        rows: [&[i8]; M],
        weight: [&[i8]; TOGETHER],
    ) -> [[i32; TOGETHER]; M] {
        let depth = weight[0].len();
        assert!(weight.iter().all(|w| w.len() == depth));
        assert!(rows.iter().all(|r| r.len() >= depth.next_multiple_of(64)));
        let mut tile = [[zero(); TOGETHER]; M];
        for start in (0..depth).step_by(16) {
            let mut w = [sixteen(&[0; 16]); TOGETHER];
            for i in 0..TOGETHER {
                w[i] = sixteen(&weight[i][start..]);
            }
            for m in 0..M {
                let row = sixteen(&rows[m][start..]);
                for i in 0..TOGETHER {
                    // SAFETY: `DOT` is used on machines that have it.
                    tile[m][i] = unsafe { dot::<DOT>(tile[m][i], w[i], row) };
                }
            }
        }
        // SAFETY: part of the base architecture.
        tile.map(|four| four.map(|v| unsafe { vaddvq_s32(v) }))
    }
}

/// Adds to each lane of `sums` the products of its four int8.
///
/// # Safety
/// The machine has `sdot` if `DOT`.
#[inline]
unsafe fn dot<const DOT: bool>(mut sums: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    if DOT {
        // SAFETY: by the caller's contract. (The intrinsic is not stable.)
        unsafe {
            std::arch::asm!(
                ".arch_extension dotprod",
                "sdot {sums:v}.4s, {w:v}.16b, {a:v}.16b",
                sums = inout(vreg) sums,
                w = in(vreg) w,
                a = in(vreg) a,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        return sums;
    }
    // SAFETY: part of the base architecture.
    unsafe {
        let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)));
        let high = vpaddlq_s16(vmull_high_s8(w, a));
        vaddq_s32(sums, vpaddq_s32(low, high))
    }
}

/// `sum + a * b`, rounded once, of float32 bits.
#[inline]
fn fma(sum: int32x4_t, a: f32, b: int32x4_t) -> int32x4_t {
    // SAFETY: part of the base architecture.
    unsafe {
        let sum = vreinterpretq_f32_s32(sum);
        vreinterpretq_s32_f32(vfmaq_f32(sum, vdupq_n_f32(a), vreinterpretq_f32_s32(b)))
    }
}

/// The first 16 codes; zeros behind the end.
#[inline]
fn sixteen(codes: &[i8]) -> int8x16_t {
    let mut end = [0; 16];
    let codes = codes.first_chunk::<16>().unwrap_or_else(|| {
        end[..codes.len()].copy_from_slice(codes);
        &end
    });
    // SAFETY: part of the base architecture; the array holds 16 bytes.
    unsafe { vld1q_s8(codes.as_ptr()) }
}

#[inline]
pub(super) fn zero() -> int32x4_t {
    // SAFETY: part of the base architecture.
    unsafe { vdupq_n_s32(0) }
}

#[inline]
pub(super) fn load(line: &Line) -> [int32x4_t; QUARTERS] {
    let at = line.0.as_ptr();
    // SAFETY: part of the base architecture; a line is four registers.
    unsafe { [vld1q_s32(at), vld1q_s32(at.add(4)), vld1q_s32(at.add(8)), vld1q_s32(at.add(12))] }
}

#[inline]
pub(super) fn store(line: &mut Line, v: [int32x4_t; QUARTERS]) {
    for (to, v) in line.0.as_chunks_mut::<4>().0.iter_mut().zip(v) {
        // SAFETY: part of the base architecture; the array is one register.
        unsafe { vst1q_s32(to.as_mut_ptr(), v) }
    }
}

//! AArch64 with the int8 matrix extension (`smmla`): tiles of 6 rows by 16 outputs, as
//! [`Neon`](super::neon::Neon) has them, but an instruction multiplies 2 rows by 2 outputs over 8
//! columns. All else is that of `Neon<true>`.
//!
//! ```text
//! panel:   of each two lines, 8 columns of every output side by side
//! 8 codes of rows m, m + 1 = zip(lanes of one group, lanes of the next)    (as they are loaded)
//! tile[m / 2][n / 2] += (2 rows x 8 columns) · (2 outputs x 8 columns)^T
//! ```
//!
//! A last group without a partner is multiplied with zeros for one. Tested under qemu; never run on
//! hardware so far (November 2026).

use super::neon::{Neon, QUARTERS, ROWS, has_dot, load, store, zero};
use super::{Coming, LANES, Line, Micro, STEP, TOGETHER};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the vocabulary of the file
use std::arch::aarch64::*;

pub(super) struct I8mm;

/// True where the machine has `smmla`, and `sdot` for the rest.
pub(super) fn is_available() -> bool {
    has_dot() && std::arch::is_aarch64_feature_detected!("i8mm")
}

const PAIRS: usize = ROWS / 2;
/// Registers of sums of two rows.
const SQUARES: usize = LANES / 2;

/// Two rows or two outputs, 8 columns each.
type Two = int32x4_t;

impl Micro for I8mm {
    const ROWS: usize = ROWS;
    const LINES: usize = 1;
    const GROUP: usize = 4;
    const LIFT: i32 = 0;

    unsafe fn pack_panel(rows: &[&[i8]], panel: &mut [Line]) {
        let depth = rows.first().map_or(0, |r| r.len());
        assert!(rows.iter().all(|r| r.len() == depth) && rows.len() <= LANES);
        assert_eq!(panel.len(), depth.div_ceil(4));
        let (panel, last) = panel.as_chunks_mut::<2>();
        for (n, row) in rows.iter().enumerate() {
            let (whole, rest) = row.as_chunks::<8>();
            let put = |[first, second]: &mut [Line; 2], codes: [i8; 8]| {
                let line = if n < SQUARES { first } else { second };
                let [a, b, c, d, e, f, g, h] = codes.map(i8::cast_unsigned);
                let at = n % SQUARES * 2;
                line.0[at] = i32::from_ne_bytes([a, b, c, d]);
                line.0[at + 1] = i32::from_ne_bytes([e, f, g, h]);
            };
            for (lines, codes) in panel.iter_mut().zip(whole) {
                put(lines, *codes);
            }
            let mut end = [0; 8];
            end[..rest.len()].copy_from_slice(rest);
            match (rest.len(), panel.get_mut(whole.len()), last.first_mut()) {
                (5.., Some(lines), _) => put(lines, end),
                (1..5, _, Some(line)) => {
                    let [a, b, c, d, ..] = end.map(i8::cast_unsigned);
                    line.0[n] = i32::from_ne_bytes([a, b, c, d]);
                }
                _ => {}
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
        let (rows, last_row) = rows.as_chunks::<{ 2 * ROWS }>();
        let (panel, last_line) = panel.as_chunks::<2>();
        let sums: &mut [Line; ROWS] = sums.try_into().expect("a tile of sums");
        let mut tile = [[zero(); SQUARES]; PAIRS];
        for p in 0..PAIRS {
            let (even, odd) = (load(&sums[2 * p]), load(&sums[2 * p + 1]));
            for q in 0..QUARTERS {
                [tile[p][2 * q], tile[p][2 * q + 1]] = zip_halves(even[q], odd[q]);
            }
        }
        for (rows, panel) in rows.chunks(STEP / 2).zip(panel.chunks(STEP / 2)) {
            coming.step();
            for (rows, lines) in rows.iter().zip(panel) {
                let rows = pairs(rows);
                for h in 0..2 {
                    let squares = load(&lines[h]);
                    for p in 0..PAIRS {
                        for q in 0..QUARTERS {
                            let sums = &mut tile[p][h * QUARTERS + q];
                            // SAFETY: the machine has the extension.
                            *sums = unsafe { dot(*sums, rows[p], squares[q]) };
                        }
                    }
                }
            }
        }
        if let (Some(row), Some(line)) = (last_row.first_chunk::<ROWS>(), last_line.first()) {
            let mut both = [0; 2 * ROWS];
            both[..ROWS].copy_from_slice(row);
            let (rows, line) = (pairs(&both), load(line));
            for q in 0..QUARTERS {
                let squares = zip(line[q], zero());
                for p in 0..PAIRS {
                    for (s, square) in squares.into_iter().enumerate() {
                        // SAFETY: as above.
                        unsafe { tile[p][2 * q + s] = dot(tile[p][2 * q + s], rows[p], square) };
                    }
                }
            }
        }
        for p in 0..PAIRS {
            let (mut even, mut odd) = ([zero(); QUARTERS], [zero(); QUARTERS]);
            for q in 0..QUARTERS {
                [even[q], odd[q]] = zip_halves(tile[p][2 * q], tile[p][2 * q + 1]);
            }
            store(&mut sums[2 * p], even);
            store(&mut sums[2 * p + 1], odd);
        }
    }

    unsafe fn multiply_add(rows: &[f32], columns: &[Line], values: &mut [Line]) {
        // SAFETY: the machine has `sdot`; the same below.
        unsafe { Neon::<true>::multiply_add(rows, columns, values) }
    }

    unsafe fn scale(sums: &mut [Line], row: f32, columns: &[Line]) {
        // SAFETY: see `multiply_add`.
        unsafe { Neon::<true>::scale(sums, row, columns) }
    }

    unsafe fn add_columns(row: &[f32], columns: &[Line], values: &mut [Line]) {
        // SAFETY: see `multiply_add`.
        unsafe { Neon::<true>::add_columns(row, columns, values) }
    }

    unsafe fn finish<T: Element>(values: &[Line], bias: Option<&[T]>, out: &mut [T]) {
        // SAFETY: see `multiply_add`.
        unsafe { Neon::<true>::finish(values, bias, out) }
    }

    unsafe fn dots<const M: usize>(
        rows: [&[i8]; M],
        weight: [&[i8]; TOGETHER],
    ) -> [[i32; TOGETHER]; M] {
        // SAFETY: see `multiply_add`.
        unsafe { Neon::<true>::dots(rows, weight) }
    }
}

/// Adds to `sums` the products of the rows `a` and the outputs `w`: a0·w0, a0·w1, a1·w0, a1·w1.
///
/// # Safety
/// The machine has `smmla`.
#[inline]
unsafe fn dot(mut sums: int32x4_t, a: Two, w: Two) -> int32x4_t {
    // SAFETY: by the caller's contract. (The intrinsic is not stable.)
    unsafe {
        std::arch::asm!(
            ".arch_extension i8mm",
            "smmla {sums:v}.4s, {a:v}.16b, {w:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            w = in(vreg) w,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// The rows of two groups of columns, in pairs.
#[inline]
fn pairs(rows: &[i32; 2 * ROWS]) -> [Two; PAIRS] {
    let at = rows.as_ptr();
    // SAFETY: part of the base architecture; 4 of 12 lanes from 0, 2, 6 and 8 on.
    unsafe {
        let (first, second) = (vld1q_s32(at), vld1q_s32(at.add(ROWS)));
        let last = vzip2q_s32(vld1q_s32(at.add(2)), vld1q_s32(at.add(ROWS + 2)));
        let [low, high] = zip(first, second);
        [low, high, last]
    }
}

/// The lanes of `a` and `b` in turn.
#[inline]
fn zip(a: int32x4_t, b: int32x4_t) -> [int32x4_t; 2] {
    // SAFETY: part of the base architecture.
    unsafe { [vzip1q_s32(a, b), vzip2q_s32(a, b)] }
}

/// The lower halves of `a` and `b`, and the upper ones.
#[inline]
fn zip_halves(a: int32x4_t, b: int32x4_t) -> [int32x4_t; 2] {
    // SAFETY: part of the base architecture.
    unsafe {
        let (a, b) = (vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b));
        [vreinterpretq_s32_s64(vzip1q_s64(a, b)), vreinterpretq_s32_s64(vzip2q_s64(a, b))]
    }
}

//! NEON: tiles of one line (four registers) by 5 rows. 20 sums, a line and 4 values of each row
//! fit the 32 registers; a multiply-add takes its broadcast straight from a lane.

use super::{Ahead, LANES, Line, Micro, Run, prefetch};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the vocabulary of the file
use std::arch::aarch64::*;

pub(super) struct Neon;

const REACH: usize = 5;
/// Lanes of a register, and registers of a line.
const QUARTER: usize = 4;

impl Micro for Neon {
    const LINES: usize = 1;
    const REACH: usize = REACH;

    unsafe fn multiply(
        block: &[Line],
        _: usize,
        _: usize,
        panel: &[Line],
        sums: &mut [Line],
        add: bool,
        ahead: &Ahead,
    ) {
        let mut tile = [[zero(); QUARTER]; REACH];
        let block = block.as_chunks::<LANES>().0;
        let panel = panel.as_chunks::<REACH>().0;
        for ((rows, lines), ahead) in panel.iter().zip(block).zip(ahead.steps(panel.len())) {
            prefetch(ahead);
            let rows = rows.each_ref().map(load);
            for (quarter, lines) in lines.as_chunks::<QUARTER>().0.iter().enumerate() {
                let rows = rows.map(|row| row[quarter]);
                step::<0>(&mut tile, load(&lines[0]), rows);
                step::<1>(&mut tile, load(&lines[1]), rows);
                step::<2>(&mut tile, load(&lines[2]), rows);
                step::<3>(&mut tile, load(&lines[3]), rows);
            }
        }
        for (tile, sum) in tile.iter().zip(sums) {
            let old = if add { load(sum) } else { [zero(); QUARTER] };
            // SAFETY: NEON is part of the base architecture.
            store(sum, std::array::from_fn(|i| unsafe { vaddq_f32(old[i], tile[i]) }));
        }
    }

    unsafe fn decode4(run: &Run<'_>, out: &mut [Line], stride: usize) {
        let table = Table::new(run.table);
        let mut at = 0;
        for (lines, scale) in run.aligned() {
            for bytes in lines {
                let scale = Line([scale; LANES]);
                store(&mut out[at], table.look_up(*bytes, load(&scale)));
                at += stride;
            }
        }
        for i in run.aligned_lines()..run.len.div_ceil(LANES) {
            let group = run.group(i);
            let [a, b] = group.scales;
            let scale = Line(std::array::from_fn(|lane| if lane < group.border { a } else { b }));
            store(&mut out[at], table.look_up(group.codes.to_be_bytes(), load(&scale)));
            out[at].0[group.len..].fill(0.0);
            at += stride;
        }
    }

    unsafe fn decode8(codes: &[i8], factors: [f32; 2], out: &mut [Line], stride: usize) {
        let wide = |codes: &[i8; LANES]| {
            // SAFETY: NEON is part of the base architecture; the array is 16 bytes.
            unsafe {
                let codes = vld1q_s8(codes.as_ptr());
                let (a, b) = (vmovl_s8(vget_low_s8(codes)), vmovl_high_s8(codes));
                [
                    vmovl_s16(vget_low_s16(a)),
                    vmovl_high_s16(a),
                    vmovl_s16(vget_low_s16(b)),
                    vmovl_high_s16(b),
                ]
                .map(|q| vmulq_n_f32(vmulq_n_f32(vcvtq_f32_s32(q), factors[0]), factors[1]))
            }
        };
        let (full, rest) = codes.as_chunks::<LANES>();
        let mut at = 0;
        for codes in full {
            store(&mut out[at], wide(codes));
            at += stride;
        }
        if !rest.is_empty() {
            let mut end = [0; LANES];
            end[..rest.len()].copy_from_slice(rest);
            store(&mut out[at], wide(&end));
            out[at].0[rest.len()..].fill(0.0); // the factors may be infinite
        }
    }

    unsafe fn widen<T: Element>(elements: &[T], out: &mut [Line], stride: usize) {
        let wide = |x: &[T; LANES]| {
            // SAFETY: the array holds 16 elements, four times 4.
            std::array::from_fn(|i| unsafe { T::load4(x.as_ptr().add(QUARTER * i)) })
        };
        let (full, rest) = elements.as_chunks::<LANES>();
        let mut at = 0;
        for elements in full {
            store(&mut out[at], wide(elements));
            at += stride;
        }
        if !rest.is_empty() {
            let mut end = [T::default(); LANES];
            end[..rest.len()].copy_from_slice(rest);
            store(&mut out[at], wide(&end));
        }
    }

    unsafe fn narrow<T: Element>(line: &Line, out: &mut [T]) {
        let round = |out: &mut [T; LANES]| {
            for (i, quarter) in load(line).into_iter().enumerate() {
                // SAFETY: the array holds 16 elements, four times 4.
                unsafe { T::store4(out.as_mut_ptr().add(QUARTER * i), quarter) }
            }
        };
        if let Ok(out) = <&mut [T; LANES]>::try_from(&mut *out) {
            round(out);
        } else {
            let mut all = [T::default(); LANES];
            round(&mut all);
            out.copy_from_slice(&all[..out.len()]);
        }
    }

    unsafe fn transpose(rows: [&Line; LANES], out: &mut [Line; LANES]) {
        for (i, rows) in rows.as_chunks::<QUARTER>().0.iter().enumerate() {
            let rows = rows.map(load);
            for j in 0..QUARTER {
                // Square (i, j) of 4x4 goes to (j, i).
                let columns = transpose4(rows.map(|row| row[j]));
                for (out, column) in out[QUARTER * j..].iter_mut().zip(columns) {
                    // SAFETY: a line holds four times 4 lanes.
                    unsafe { vst1q_f32(out.0.as_mut_ptr().add(QUARTER * i), column) }
                }
            }
        }
    }
}

/// Adds the products of one line and lane `T` of each row.
#[inline]
fn step<const T: i32>(
    tile: &mut [[float32x4_t; QUARTER]; REACH],
    line: [float32x4_t; QUARTER],
    rows: [float32x4_t; REACH],
) {
    for (tile, row) in tile.iter_mut().zip(rows) {
        for (sum, lanes) in tile.iter_mut().zip(line) {
            // SAFETY: NEON is part of the base architecture.
            *sum = unsafe { vfmaq_laneq_f32::<T>(*sum, lanes, row) };
        }
    }
}

/// The code's 16 float32, as 64 bytes.
struct Table(uint8x16x4_t);

impl Table {
    #[inline]
    fn new(table: &[f32; 16]) -> Self {
        let [a, b, c, d] = load(&Line(*table));
        // SAFETY: NEON is part of the base architecture.
        Self(unsafe {
            uint8x16x4_t(
                vreinterpretq_u8_f32(a),
                vreinterpretq_u8_f32(b),
                vreinterpretq_u8_f32(c),
                vreinterpretq_u8_f32(d),
            )
        })
    }

    /// The values of 16 codes (first code in the high nibble) times their scales.
    #[inline]
    fn look_up(&self, packed: [u8; 8], scale: [float32x4_t; QUARTER]) -> [float32x4_t; QUARTER] {
        // Byte `j` of lane `i` comes from byte `4 * code + j` of the table.
        const LANE: [u8; 16] = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3];
        const BYTE: [u8; 16] = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3];
        // SAFETY: NEON is part of the base architecture, and each pointer's array is as long as
        // the register loaded from it.
        unsafe {
            let packed = vld1_u8(packed.as_ptr());
            let (high, low) = (vshr_n_u8::<4>(packed), vand_u8(packed, vdup_n_u8(15)));
            let codes = vcombine_u8(vzip1_u8(high, low), vzip2_u8(high, low));
            let offsets = vshlq_n_u8::<2>(codes);
            let (lane, byte) = (vld1q_u8(LANE.as_ptr()), vld1q_u8(BYTE.as_ptr()));
            std::array::from_fn(|i| {
                let lane = vaddq_u8(lane, vdupq_n_u8((QUARTER * i) as u8));
                let index = vaddq_u8(vqtbl1q_u8(offsets, lane), byte);
                vmulq_f32(vreinterpretq_f32_u8(vqtbl4q_u8(self.0, index)), scale[i])
            })
        }
    }
}

#[inline]
fn transpose4([a, b, c, d]: [float32x4_t; QUARTER]) -> [float32x4_t; QUARTER] {
    // SAFETY: NEON is part of the base architecture.
    unsafe {
        let low = |x, y| vreinterpretq_f64_f32(vtrn1q_f32(x, y));
        let high = |x, y| vreinterpretq_f64_f32(vtrn2q_f32(x, y));
        [
            vreinterpretq_f32_f64(vtrn1q_f64(low(a, b), low(c, d))),
            vreinterpretq_f32_f64(vtrn1q_f64(high(a, b), high(c, d))),
            vreinterpretq_f32_f64(vtrn2q_f64(low(a, b), low(c, d))),
            vreinterpretq_f32_f64(vtrn2q_f64(high(a, b), high(c, d))),
        ]
    }
}

#[inline]
fn zero() -> float32x4_t {
    // SAFETY: NEON is part of the base architecture.
    unsafe { vdupq_n_f32(0.0) }
}

#[inline]
fn load(line: &Line) -> [float32x4_t; QUARTER] {
    // SAFETY: a line holds four times 4 lanes.
    std::array::from_fn(|i| unsafe { vld1q_f32(line.0.as_ptr().add(QUARTER * i)) })
}

#[inline]
fn store(line: &mut Line, quarters: [float32x4_t; QUARTER]) {
    for (i, quarter) in quarters.into_iter().enumerate() {
        // SAFETY: a line holds four times 4 lanes.
        unsafe { vst1q_f32(line.0.as_mut_ptr().add(QUARTER * i), quarter) }
    }
}

//! The element by element half of `LLM.int8()`: rows to int8 codes, codes back to elements, and
//! int32 sums to elements.
//!
//! ```text
//! for each row of a:                                  in parallel
//!     r = max |a[k]| below the threshold; note the columns that hold an outlier
//!     codes[k] = round(a[k] * (127 / r))              while the row is in the cache
//! codes = 0 in the outlier columns                    when all rows have been seen
//! ```
//!
//! So the input is read from memory once, with or without a threshold. The column half of
//! `int8_double_quant` has to read it again: a column's scale is known after the last row.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bound;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(test)]
mod tests;

use super::scalar::scale;
use crate::isa::Isa;
use crate::threads::{self, Chunks, Shared};
use crate::{DType, Element, bf16, f16};
use bound::{Bound, bits};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Elements per task.
const TASK: usize = 64 * 1024;

/// Calls a function of the instruction set's module. Only for an `isa` that the CPU has: one from
/// [`isa::available`](crate::isa::available) or the caller's contract.
macro_rules! on {
    ($isa:expr, $name:ident $args:tt) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has the instruction set, see above.
            Isa::Avx512 => unsafe { avx512::$name $args },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as before.
            Isa::Avx2 => unsafe { avx2::$name $args },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::$name $args,
            _ => scalar::$name $args,
        }
    };
}

/// The largest magnitude of a row below the threshold; NaN if the row holds one. Sets `flags[c]`
/// to 1 where element `c` is an outlier, and leaves the other flags.
///
/// `flags` has the row's length, or any when the threshold is not above 0.
///
/// # Safety
/// The CPU has `isa`.
pub(in crate::ops) unsafe fn stats<T: Element>(
    isa: Isa,
    row: &[T],
    threshold: f32,
    flags: &mut [u8],
) -> f32 {
    let flags = if threshold > 0.0 { &mut flags[..row.len()] } else { &mut [] };
    let stat = match T::DTYPE {
        DType::F32 => {
            let bound = Bound::<i32>::new::<T>(threshold);
            f32::from_bits(on!(isa, stats32(bits(row), bound, flags)) as u32)
        }
        DType::F16 => {
            let bound = Bound::<i16>::new::<T>(threshold);
            f16::from_bits(on!(isa, stats16(bits(row), bound, flags)) as u16).to_f32()
        }
        DType::BF16 => {
            let bound = Bound::<i16>::new::<T>(threshold);
            bf16::from_bits(on!(isa, stats16(bits(row), bound, flags)) as u16).to_f32()
        }
    };
    // One NaN for all: which payload is the largest depends on the width.
    if stat.is_nan() { f32::NAN } else { stat }
}

/// `codes = round(row * scale)`, to nearest even, clamped to ±127; NaN becomes 0.
///
/// # Safety
/// The CPU has `isa`.
pub(in crate::ops) unsafe fn encode<T: Element>(isa: Isa, row: &[T], scale: f32, codes: &mut [i8]) {
    assert_eq!(row.len(), codes.len());
    on!(isa, encode(row, scale, codes));
}

/// The rows of a matrix in tasks of about `elements` elements.
fn tasks(rows: usize, columns: usize, elements: usize) -> Chunks {
    Chunks::new(rows, elements / columns, 1)
}

/// `int8_vectorwise_quant` on checked arguments; `isa` is available.
pub(super) fn quantize<T: Element>(
    isa: Isa,
    a: &[T],
    columns: usize,
    threshold: f32,
    codes: &mut [i8],
    row_stats: &mut [f32],
) -> Vec<usize> {
    row_stats.fill(0.0);
    if a.is_empty() {
        return Vec::new();
    }
    let flags = Flags::new(columns, threshold);
    let chunks = tasks(row_stats.len(), columns, TASK);
    {
        let (codes, row_stats) = (Shared::new(codes), Shared::new(row_stats));
        threads::run(chunks.count(), |i| {
            let rows = chunks.range(i);
            let elements = rows.start * columns..rows.end * columns;
            // SAFETY: chunks are disjoint.
            let (codes, row_stats) =
                unsafe { (codes.part(elements.clone()), row_stats.part(rows)) };
            let mut found = flags.local();
            let rows = a[elements].chunks_exact(columns).zip(codes.chunks_exact_mut(columns));
            for ((row, codes), stat) in rows.zip(row_stats) {
                // SAFETY: `isa` is available.
                unsafe {
                    *stat = stats(isa, row, threshold, &mut found);
                    encode(isa, row, scale(*stat), codes);
                }
            }
            flags.merge(&found);
        });
    }
    let outliers = flags.columns();
    clear(codes, columns, chunks, &outliers);
    outliers
}

/// [`stats`] of every row, and the columns that hold outliers, ascending. `isa` is available.
pub(super) fn all_stats<T: Element>(
    isa: Isa,
    a: &[T],
    columns: usize,
    threshold: f32,
    row_stats: &mut [f32],
) -> Vec<usize> {
    let all = 0..row_stats.len();
    group_stats(isa, a, columns, threshold, std::slice::from_ref(&all), |i| i, row_stats)
        .swap_remove(0)
}

/// [`stats`] of the rows of several groups, and each group's columns that hold outliers, ascending.
/// A group is a range of `row_stats`; place `i` is row `row(i)` of `a`. `isa` is available.
pub(super) fn group_stats<T: Element>(
    isa: Isa,
    a: &[T],
    columns: usize,
    threshold: f32,
    groups: &[Range<usize>],
    row: impl Fn(usize) -> usize + Sync,
    row_stats: &mut [f32],
) -> Vec<Vec<usize>> {
    row_stats.fill(0.0);
    let flags: Vec<Flags> = groups.iter().map(|_| Flags::new(columns, threshold)).collect();
    if columns > 0 {
        let tasks: Vec<(usize, Range<usize>)> = groups
            .iter()
            .enumerate()
            .flat_map(|(g, group)| {
                let chunks = tasks(group.len(), columns, TASK);
                let at = |r: Range<usize>| group.start + r.start..group.start + r.end;
                (0..chunks.count()).map(move |i| (g, at(chunks.range(i))))
            })
            .collect();
        let row_stats = Shared::new(row_stats);
        threads::run(tasks.len(), |i| {
            let (group, places) = &tasks[i];
            // SAFETY: groups and their chunks are disjoint.
            let row_stats = unsafe { row_stats.part(places.clone()) };
            let mut found = flags[*group].local();
            for (place, stat) in places.clone().zip(row_stats) {
                let row = &a[row(place) * columns..][..columns];
                // SAFETY: `isa` is available.
                *stat = unsafe { stats(isa, row, threshold, &mut found) };
            }
            flags[*group].merge(&found);
        });
    }
    flags.into_iter().map(Flags::columns).collect()
}

/// Sets the codes of some columns to 0 in every row.
fn clear(codes: &mut [i8], columns: usize, chunks: Chunks, outliers: &[usize]) {
    if outliers.is_empty() {
        return;
    }
    let codes = Shared::new(codes);
    threads::run(chunks.count(), |i| {
        let rows = chunks.range(i);
        // SAFETY: chunks are disjoint.
        let codes = unsafe { codes.part(rows.start * columns..rows.end * columns) };
        for row in codes.chunks_exact_mut(columns) {
            for &c in outliers {
                row[c] = 0;
            }
        }
    });
}

/// Which columns hold an outlier: a byte each, or none without a threshold.
struct Flags(Mutex<Vec<u8>>, usize);

impl Flags {
    fn new(columns: usize, threshold: f32) -> Self {
        let len = if threshold > 0.0 { columns } else { 0 };
        Self(Mutex::new(vec![0; len]), len)
    }

    /// Flags for one task.
    fn local(&self) -> Vec<u8> {
        vec![0; self.1]
    }

    /// Takes over what a task has found.
    fn merge(&self, found: &[u8]) {
        if found.contains(&1) {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.iter_mut().zip(found).for_each(|(all, found)| *all |= found);
        }
    }

    /// The flagged columns, ascending.
    fn columns(self) -> Vec<usize> {
        let all = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !all.contains(&1) {
            return Vec::new();
        }
        all.iter().enumerate().filter(|(_, flag)| **flag == 1).map(|(c, _)| c).collect()
    }
}

/// `int8_double_quant` on checked arguments; `isa` is available.
#[allow(clippy::too_many_arguments)] // as the op
pub(super) fn quantize_both<T: Element>(
    isa: Isa,
    a: &[T],
    columns: usize,
    threshold: f32,
    row_codes: &mut [i8],
    col_codes: &mut [i8],
    row_stats: &mut [f32],
    col_stats: &mut [f32],
) -> Vec<usize> {
    row_stats.fill(0.0);
    col_stats.fill(0.0);
    if a.is_empty() {
        return Vec::new();
    }
    let flags = Flags::new(columns, threshold);
    let bound = Bound::<i32>::new::<f32>(threshold);
    // Larger tasks: each has its own maxima of all columns.
    let chunks = tasks(row_stats.len(), columns, 4 * TASK);
    let maxima = Mutex::new(&mut *col_stats);
    {
        let (row_codes, row_stats) = (Shared::new(row_codes), Shared::new(row_stats));
        threads::run(chunks.count(), |i| {
            let rows = chunks.range(i);
            let elements = rows.start * columns..rows.end * columns;
            // SAFETY: chunks are disjoint.
            let (codes, row_stats) =
                unsafe { (row_codes.part(elements.clone()), row_stats.part(rows)) };
            let (mut found, mut most) = (flags.local(), vec![0.0f32; columns]);
            let rows = a[elements].chunks_exact(columns).zip(codes.chunks_exact_mut(columns));
            for ((row, codes), stat) in rows.zip(row_stats) {
                // SAFETY: `isa` is available.
                unsafe {
                    *stat = stats(isa, row, threshold, &mut found);
                    encode(isa, row, scale(*stat), codes);
                }
                on!(isa, raise(row, bound, &mut most));
            }
            flags.merge(&found);
            let mut maxima = maxima.lock().unwrap_or_else(PoisonError::into_inner);
            scalar::raise(&most, Bound::NONE, &mut maxima);
        });
    }
    let outliers = flags.columns();
    clear(row_codes, columns, chunks, &outliers);

    col_stats.iter_mut().filter(|c| c.is_nan()).for_each(|c| *c = f32::NAN);
    let mut scales: Vec<f32> = col_stats.iter().map(|&c| scale(c)).collect();
    for &c in &outliers {
        scales[c] = 0.0;
    }
    let col_codes = Shared::new(col_codes);
    threads::run(chunks.count(), |i| {
        let rows = chunks.range(i);
        let elements = rows.start * columns..rows.end * columns;
        // SAFETY: chunks are disjoint.
        let codes = unsafe { col_codes.part(elements.clone()) };
        for (row, codes) in a[elements].chunks_exact(columns).zip(codes.chunks_exact_mut(columns)) {
            on!(isa, encode_by_column(row, &scales, codes));
        }
    });
    outliers
}

/// `int8_vectorwise_dequant` on checked arguments; `isa` is available.
pub(super) fn dequantize<T: Element>(
    isa: Isa,
    codes: &[i8],
    columns: usize,
    row_stats: &[f32],
    out: &mut [T],
) {
    if codes.is_empty() {
        return;
    }
    let chunks = tasks(row_stats.len(), columns, TASK);
    let out = Shared::new(out);
    threads::run(chunks.count(), |i| {
        let rows = chunks.range(i);
        let elements = rows.start * columns..rows.end * columns;
        // SAFETY: chunks are disjoint.
        let out = unsafe { out.part(elements.clone()) };
        let codes = codes[elements].chunks_exact(columns);
        for ((codes, out), &stat) in codes.zip(out.chunks_exact_mut(columns)).zip(&row_stats[rows])
        {
            on!(isa, decode(codes, stat, out));
        }
    });
}

/// `int8_mm_dequant` on checked arguments; `isa` is available.
pub(super) fn mm_dequant<T: Element>(
    isa: Isa,
    acc: &[i32],
    row_stats: &[f32],
    col_stats: &[f32],
    bias: Option<&[f32]>,
    out: &mut [T],
) {
    if acc.is_empty() {
        return;
    }
    let columns = col_stats.len();
    let chunks = tasks(row_stats.len(), columns, TASK);
    let out = Shared::new(out);
    threads::run(chunks.count(), |i| {
        let rows = chunks.range(i);
        let elements = rows.start * columns..rows.end * columns;
        // SAFETY: chunks are disjoint.
        let out = unsafe { out.part(elements.clone()) };
        let acc = acc[elements].chunks_exact(columns);
        for ((acc, out), &stat) in acc.zip(out.chunks_exact_mut(columns)).zip(&row_stats[rows]) {
            on!(isa, rescale(acc, stat, col_stats, bias, out));
        }
    });
}

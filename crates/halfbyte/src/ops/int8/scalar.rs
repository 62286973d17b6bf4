//! The definition of `LLM.int8()`: plain loops in the order that every other file must keep.

#![cfg_attr(not(test), allow(dead_code))] // the tests compare with all of it

use super::{INV_127_SQUARED, Weight8, decode};
use crate::Element;

/// The factor that takes a row's largest magnitude to 127; finite, or NaN for NaN.
pub(in crate::ops) fn scale(stat: f32) -> f32 {
    let scale = 127.0 / stat;
    match stat {
        0.0 => 0.0,
        _ if scale == f32::INFINITY => f32::MAX,
        _ => scale,
    }
}

/// The code of one element; NaN becomes 0.
pub(super) fn code<T: Element>(a: T, scale: f32) -> i8 {
    (a.to_f32() * scale).round_ties_even().clamp(-127.0, 127.0) as i8
}

/// True for an element that stays out of int8.
pub(super) fn is_outlier<T: Element>(a: T, threshold: f32) -> bool {
    threshold > 0.0 && a.to_f32().abs() >= threshold
}

/// The largest magnitude below the threshold; NaN if there is one.
pub(super) fn stat<T: Element>(elements: impl Iterator<Item = T>, threshold: f32) -> f32 {
    let inside = elements.filter(|&a| !is_outlier(a, threshold)).map(|a| a.to_f32().abs());
    inside.fold(0.0, |most, a| {
        if a.is_nan() {
            f32::NAN
        } else if a > most {
            a
        } else {
            most
        }
    })
}

pub(super) fn quantize_rows<T: Element>(
    a: &[T],
    columns: usize,
    threshold: f32,
    codes: &mut [i8],
    row_stats: &mut [f32],
) -> Vec<usize> {
    if columns == 0 {
        row_stats.fill(0.0);
        return Vec::new();
    }
    let outliers: Vec<usize> = (0..columns)
        .filter(|&c| a.iter().skip(c).step_by(columns).any(|&a| is_outlier(a, threshold)))
        .collect();
    let rows = a.chunks_exact(columns).zip(codes.chunks_exact_mut(columns));
    for ((a, codes), r) in rows.zip(row_stats) {
        *r = stat(a.iter().copied(), threshold);
        let scale = scale(*r);
        codes.iter_mut().zip(a).for_each(|(q, &a)| *q = code(a, scale));
        for &c in &outliers {
            codes[c] = 0;
        }
    }
    outliers
}

pub(super) fn quantize_columns<T: Element>(
    a: &[T],
    columns: usize,
    threshold: f32,
    outliers: &[usize],
    codes: &mut [i8],
    col_stats: &mut [f32],
) {
    for (c, r) in col_stats.iter_mut().enumerate() {
        *r = stat(a.iter().skip(c).step_by(columns).copied(), threshold);
        let scale = if outliers.contains(&c) { 0.0 } else { scale(*r) };
        for i in (c..a.len()).step_by(columns) {
            codes[i] = code(a[i], scale);
        }
    }
}

pub(super) fn dequantize_rows<T: Element>(
    codes: &[i8],
    columns: usize,
    row_stats: &[f32],
    out: &mut [T],
) {
    for (i, (out, &q)) in out.iter_mut().zip(codes).enumerate() {
        *out = T::from_f32(decode(q, row_stats[i / columns]));
    }
}

/// One exact sum of products.
pub(super) fn dot(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}

/// What a row's sums are multiplied by, before the column's scale.
pub(super) fn row_factor(row_stat: f32) -> f32 {
    row_stat * INV_127_SQUARED
}

/// A sum under both of its scales.
pub(super) fn scaled(sum: i32, row_stat: f32, col_stat: f32) -> f32 {
    sum as f32 * row_factor(row_stat) * col_stat
}

pub(super) fn mm_dequant<T: Element>(
    acc: &[i32],
    row_stats: &[f32],
    col_stats: &[f32],
    bias: Option<&[f32]>,
    out: &mut [T],
) {
    let n = col_stats.len();
    for (i, (out, &sum)) in out.iter_mut().zip(acc).enumerate() {
        let y = scaled(sum, row_stats[i / n], col_stats[i % n]);
        *out = T::from_f32(bias.map_or(y, |b| y + b[i % n]));
    }
}

pub(super) fn mixed_scaled_mm<T: Element>(
    input: &[T],
    a: &[i8],
    row_stats: &[f32],
    weight: &Weight8<'_>,
    outliers: &[usize],
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let (n, k) = (weight.out_features, weight.in_features);
    for (i, out) in out.iter_mut().enumerate() {
        let (m, o) = (i / n, i % n);
        let row = &weight.codes[o * k..][..k];
        let mut y = scaled(dot(&a[m * k..][..k], row), row_stats[m], weight.scales[o]);
        for &j in outliers {
            y = input[m * k + j].to_f32().mul_add(decode(row[j], weight.scales[o]), y);
        }
        *out = T::from_f32(bias.map_or(y, |b| y + b[o].to_f32()));
    }
}

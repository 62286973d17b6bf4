//! The definition, row by row.

use super::bound::{Bits, Bound, screen};
use crate::Element;
use crate::ops::int8::{decode as weight, scalar as definition};

pub(super) fn stats16(row: &[i16], bound: Bound<i16>, flags: &mut [u8]) -> i16 {
    stats(row, bound, flags)
}

pub(super) fn stats32(row: &[i32], bound: Bound<i32>, flags: &mut [u8]) -> i32 {
    stats(row, bound, flags)
}

/// The largest magnitude that is no outlier. `flags` is as long as the row, or empty where `bound`
/// is [`Bound::NONE`].
fn stats<B: Bits>(row: &[B], bound: Bound<B>, flags: &mut [u8]) -> B {
    if flags.is_empty() {
        row.iter().map(|x| x.magnitude()).max().unwrap_or_default()
    } else {
        screen(row, bound, flags)
    }
}

pub(super) fn encode<T: Element>(row: &[T], scale: f32, codes: &mut [i8]) {
    codes.iter_mut().zip(row).for_each(|(q, &a)| *q = definition::code(a, scale));
}

pub(super) fn encode_by_column<T: Element>(row: &[T], scales: &[f32], codes: &mut [i8]) {
    for ((q, &a), &scale) in codes.iter_mut().zip(row).zip(scales) {
        *q = definition::code(a, scale);
    }
}

/// Raises each column's largest magnitude to this row's, unless that is an outlier.
pub(super) fn raise<T: Element>(row: &[T], bound: Bound<i32>, most: &mut [f32]) {
    for (most, a) in most.iter_mut().zip(row) {
        let x = (a.to_f32().to_bits() as i32).magnitude();
        if !(x > bound.limit && x <= bound.infinity) {
            *most = f32::from_bits(most.to_bits().max(x as u32));
        }
    }
}

pub(super) fn decode<T: Element>(codes: &[i8], stat: f32, out: &mut [T]) {
    out.iter_mut().zip(codes).for_each(|(out, &q)| *out = T::from_f32(weight(q, stat)));
}

pub(super) fn rescale<T: Element>(
    acc: &[i32],
    row_stat: f32,
    col_stats: &[f32],
    bias: Option<&[f32]>,
    out: &mut [T],
) {
    for (n, (out, &sum)) in out.iter_mut().zip(acc).enumerate() {
        let y = definition::scaled(sum, row_stat, col_stats[n]);
        *out = T::from_f32(bias.map_or(y, |b| y + b[n]));
    }
}

//! The definition: decode one weight row at a time, in float32, and multiply.

use super::{Part, Rows, Weight};
use crate::Element;
use crate::threads::Shared;

pub(in crate::ops) fn forward<T: Element, W: Weight, R: Rows>(
    input: &[T],
    part: &Part<'_, T, W, R>,
    out: &Shared<'_, T>,
) {
    let (n, k) = (part.weight.out_features(), part.weight.in_features());
    let mut row = vec![0.0; k];
    for o in 0..n {
        part.weight.decode_row(o, &mut row);
        for m in 0..part.rows.len() {
            let x = &input[part.rows.input(m) * k..][..k];
            let dot: f32 = x.iter().zip(&row).map(|(x, w)| x.to_f32() * w).sum();
            let bias = part.bias.map_or(0.0, |b| b[o].to_f32());
            let i = part.rows.output(m) * n + o;
            // SAFETY: nothing else runs, and no other row has this output.
            let out = unsafe { out.part(i..i + 1) };
            out[0] = T::from_f32(dot + bias);
        }
    }
}

/// The rows' gradients in float32, one after another.
pub(super) fn grad_input<T: Element, W: Weight, R: Rows>(
    grad_output: &[T],
    part: &Part<'_, T, W, R>,
) -> Vec<f32> {
    let (n, k) = (part.weight.out_features(), part.weight.in_features());
    let mut row = vec![0.0; k];
    let mut sums = vec![0.0f32; part.rows.len() * k];
    for o in 0..n {
        part.weight.decode_row(o, &mut row);
        for m in 0..part.rows.len() {
            let g = grad_output[part.rows.input(m) * n + o].to_f32();
            for (s, w) in sums[m * k..(m + 1) * k].iter_mut().zip(&row) {
                *s += g * w;
            }
        }
    }
    sums
}

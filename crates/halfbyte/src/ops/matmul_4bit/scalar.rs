//! The definition: decode one weight row at a time, in float32, and multiply.

use super::Weight4;
use crate::Element;

/// Row `o` of the dequantized weight, in float32.
fn decode_row(weight: &Weight4<'_>, o: usize, row: &mut [f32]) {
    let b = weight.blocks.blocksize().get();
    let mut scale = (usize::MAX, [0.0]);
    for (k, w) in row.iter_mut().enumerate() {
        let i = o * weight.in_features + k; // blocks run over the flattened tensor
        if scale.0 != i / b {
            scale.0 = i / b;
            weight.scales.decode(scale.0, &mut scale.1);
        }
        let byte = weight.packed[i / 2];
        let q = if i.is_multiple_of(2) { byte >> 4 } else { byte & 0x0F };
        *w = weight.table[q as usize] * scale.1[0];
    }
}

pub(super) fn forward<T: Element>(
    input: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let (n, k) = (weight.out_features, weight.in_features);
    let mut row = vec![0.0; k];
    for o in 0..n {
        decode_row(weight, o, &mut row);
        for m in 0..rows {
            let x = &input[m * k..(m + 1) * k];
            let dot: f32 = x.iter().zip(&row).map(|(x, w)| x.to_f32() * w).sum();
            let bias = bias.map_or(0.0, |b| b[o].to_f32());
            out[m * n + o] = T::from_f32(dot + bias);
        }
    }
}

pub(super) fn grad_input<T: Element>(
    grad_output: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    out: &mut [T],
) {
    let (n, k) = (weight.out_features, weight.in_features);
    let mut row = vec![0.0; k];
    let mut sums = vec![0.0f32; rows * k];
    for o in 0..n {
        decode_row(weight, o, &mut row);
        for m in 0..rows {
            let g = grad_output[m * n + o].to_f32();
            for (s, w) in sums[m * k..(m + 1) * k].iter_mut().zip(&row) {
                *s += g * w;
            }
        }
    }
    for (o, s) in out.iter_mut().zip(sums) {
        *o = T::from_f32(s);
    }
}

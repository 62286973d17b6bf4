//! The definition of a weight's values; of the product it is `gemm/scalar.rs`.

use super::Weight4;

/// Row `o` of the dequantized weight, in float32.
pub(super) fn decode_row(weight: &Weight4<'_>, o: usize, row: &mut [f32]) {
    let b = weight.blocks.blocksize().get();
    let mut scale = (usize::MAX, [0.0]);
    for (k, w) in row.iter_mut().enumerate() {
        let i = o * weight.in_features + k; // blocks run over the flattened tensor
        if scale.0 != i / b {
            scale.0 = i / b;
            weight.scales.decode(weight.first_scale + scale.0, &mut scale.1);
        }
        let byte = weight.packed[i / 2];
        let q = if i.is_multiple_of(2) { byte >> 4 } else { byte & 0x0F };
        *w = weight.table[q as usize] * scale.1[0];
    }
}

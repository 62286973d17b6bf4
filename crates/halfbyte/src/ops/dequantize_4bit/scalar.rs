//! The definition.

use crate::Element;
use crate::blocks::BlockSize;

pub(super) fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: BlockSize,
    out: &mut [T],
) {
    let b = blocksize.get();
    for ((bytes, scale), out) in packed.chunks(b / 2).zip(absmax).zip(out.chunks_mut(b)) {
        for (i, o) in out.iter_mut().enumerate() {
            // The first element of a pair is in the high nibble.
            let q = if i % 2 == 0 { bytes[i / 2] >> 4 } else { bytes[i / 2] & 0x0F };
            *o = T::from_f32(table[q as usize] * scale);
        }
    }
}

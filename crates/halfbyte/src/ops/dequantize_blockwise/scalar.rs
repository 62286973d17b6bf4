//! The definition.

use crate::Element;
use crate::blocks::BlockSize;

pub(super) fn dequantize<T: Element>(
    q: &[u8],
    absmax: &[f32],
    code: &[f32; 256],
    blocksize: BlockSize,
    out: &mut [T],
) {
    let b = blocksize.get();
    for ((q, scale), out) in q.chunks(b).zip(absmax).zip(out.chunks_mut(b)) {
        block(q, *scale, code, out);
    }
}

/// One block, or the end of one.
pub(super) fn block<T: Element>(q: &[u8], absmax: f32, code: &[f32; 256], out: &mut [T]) {
    for (q, o) in q.iter().zip(out) {
        *o = T::from_f32(code[*q as usize] * absmax);
    }
}

//! AArch64 Advanced SIMD.
//!
//! ```text
//! for each block, for each group of 4 elements:
//!     out = code[q] * absmax                (1)
//! ```
//!
//! 1. There is no gather: the four values are read one by one.

use super::scalar;
use crate::Element;
use crate::blocks::BlockSize;
use std::arch::aarch64::{vld1q_f32, vmulq_n_f32};

pub(super) fn dequantize<T: Element>(
    q: &[u8],
    absmax: &[f32],
    code: &[f32; 256],
    blocksize: BlockSize,
    out: &mut [T],
) {
    let b = blocksize.get();
    for ((q, scale), out) in q.chunks(b).zip(absmax).zip(out.chunks_mut(b)) {
        let (q, q_tail) = q.as_chunks::<4>();
        let (out, out_tail) = out.as_chunks_mut::<4>();
        for (q, out) in q.iter().zip(out) {
            let values = q.map(|q| code[q as usize]);
            // SAFETY: `values` and `out` hold 4 elements.
            unsafe {
                let values = vld1q_f32(values.as_ptr());
                T::store4(out.as_mut_ptr(), vmulq_n_f32(values, *scale));
            }
        }
        scalar::block(q_tail, *scale, code, out_tail);
    }
}

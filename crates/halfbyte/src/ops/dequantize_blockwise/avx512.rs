//! AVX-512.
//!
//! ```text
//! for each block, for each group of 16 elements:
//!     out = code[q] * absmax                (1)
//! ```
//!
//! 1. The code is 1 KiB and stays in the L1 cache: a gather reads it.

use super::scalar;
use crate::Element;
use crate::blocks::BlockSize;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn dequantize<T: Element>(
    q: &[u8],
    absmax: &[f32],
    code: &[f32; 256],
    blocksize: BlockSize,
    out: &mut [T],
) {
    let b = blocksize.get();
    for ((q, scale), out) in q.chunks(b).zip(absmax).zip(out.chunks_mut(b)) {
        let (q, q_tail) = q.as_chunks::<16>();
        let (out, out_tail) = out.as_chunks_mut::<16>();
        let factor = _mm512_set1_ps(*scale);
        for (q, out) in q.iter().zip(out) {
            // SAFETY: q and out hold 16 elements, the code has an entry for every byte.
            unsafe {
                let i = _mm512_cvtepu8_epi32(_mm_loadu_si128(q.as_ptr().cast()));
                let value = _mm512_i32gather_ps::<4>(i, code.as_ptr());
                T::store16(out.as_mut_ptr(), _mm512_mul_ps(value, factor));
            }
        }
        scalar::block(q_tail, *scale, code, out_tail);
    }
}

//! AVX2.
//!
//! ```text
//! for each block, for each group of 8 elements:
//!     out = code[q] * absmax                (1)
//! ```
//!
//! 1. The code is 1 KiB and stays in the L1 cache: a gather reads it.

use super::scalar;
use crate::Element;
use crate::blocks::BlockSize;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dequantize<T: Element>(
    q: &[u8],
    absmax: &[f32],
    code: &[f32; 256],
    blocksize: BlockSize,
    out: &mut [T],
) {
    let b = blocksize.get();
    for ((q, scale), out) in q.chunks(b).zip(absmax).zip(out.chunks_mut(b)) {
        let (q, q_tail) = q.as_chunks::<8>();
        let (out, out_tail) = out.as_chunks_mut::<8>();
        let factor = _mm256_set1_ps(*scale);
        for (q, out) in q.iter().zip(out) {
            // SAFETY: q and out hold 8 elements, the code has an entry for every byte.
            unsafe {
                let i = _mm256_cvtepu8_epi32(_mm_loadl_epi64(q.as_ptr().cast()));
                let value = _mm256_i32gather_ps::<4>(code.as_ptr(), i);
                T::store8(out.as_mut_ptr(), _mm256_mul_ps(value, factor));
            }
        }
        scalar::block(q_tail, *scale, code, out_tail);
    }
}

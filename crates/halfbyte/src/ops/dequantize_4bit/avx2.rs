//! AVX2.
//!
//! ```text
//! for each block:
//!     values = table * scale, rounded to T
//!     for each 16 bytes: out = values[byte >> 4], values[byte & 15], ...
//! ```
//!
//! Liberties taken with the definition:
//! 1. A product depends only on the code and the block, so all 16 are multiplied and rounded once
//!    per block, and decoding is a look-up.
//! 2. 16-bit elements: low and high bytes are looked up apart by `vpshufb`, then interleaved.
//! 3. float32 elements: eight nibbles of a broadcast 32-bit word are shifted into place in one
//!    step; `vpermps` reads three bits of an index, and the fourth selects between two of them.
//! 4. A block's last group of fewer than 32 elements goes through buffers on the stack.

use crate::blocks::BlockSize;
use crate::{DType, Element};
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

/// Elements per step.
const GROUP: usize = 32;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: BlockSize,
    out: &mut [T],
) {
    let b = blocksize.get();
    // SAFETY: 16 floats.
    let table = unsafe { [0, 8].map(|at| _mm256_loadu_ps(table.as_ptr().add(at))) };
    for ((bytes, scale), out) in packed.chunks(b / 2).zip(absmax).zip(out.chunks_mut(b)) {
        let scale = _mm256_set1_ps(*scale);
        let products = [_mm256_mul_ps(table[0], scale), _mm256_mul_ps(table[1], scale)];
        let values = values::<T>(products);
        let mut groups = out.chunks_exact_mut(GROUP);
        let mut at = 0;
        for group in &mut groups {
            // SAFETY: 32 elements are 16 bytes of `bytes`.
            unsafe { decode(bytes.as_ptr().add(at), values, group.as_mut_ptr()) };
            at += GROUP / 2;
        }
        let rest = groups.into_remainder();
        if !rest.is_empty() {
            let mut padded = [0; GROUP / 2];
            padded[..rest.len().div_ceil(2)].copy_from_slice(&bytes[at..]);
            let mut decoded = [T::default(); GROUP];
            // SAFETY: both buffers hold one group.
            unsafe { decode(padded.as_ptr(), values, decoded.as_mut_ptr()) };
            rest.copy_from_slice(&decoded[..rest.len()]);
        }
    }
}

/// The products in the form that [`decode`] looks up: float32 as they are, of 16-bit elements the
/// low and the high bytes, in both lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn values<T: Element>(products: [__m256; 2]) -> [__m256i; 2] {
    if T::DTYPE == DType::F32 {
        return products.map(|p| _mm256_castps_si256(p));
    }
    let mut rounded = [T::default(); 16];
    let ptr = rounded.as_mut_ptr();
    // SAFETY: the buffer holds 16 elements of 2 bytes.
    let words = unsafe {
        T::store8(ptr, products[0]);
        T::store8(ptr.add(8), products[1]);
        [_mm_loadu_si128(ptr.cast()), _mm_loadu_si128(ptr.add(8).cast())]
    };
    let low = words.map(|w| _mm_and_si128(w, _mm_set1_epi16(0xFF)));
    let high = words.map(|w| _mm_srli_epi16::<8>(w));
    [low, high].map(|w| _mm256_broadcastsi128_si256(_mm_packus_epi16(w[0], w[1])))
}

/// # Safety
/// `bytes` is valid for reading 16 bytes and `out` for writing 32 elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode<T: Element>(bytes: *const u8, values: [__m256i; 2], out: *mut T) {
    if T::DTYPE == DType::F32 {
        let [low, high] = values.map(|v| _mm256_castsi256_ps(v));
        let high_first = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        for quarter in 0..4 {
            // SAFETY: the caller guarantees 16 bytes and 32 elements.
            unsafe {
                let four = bytes.add(quarter * 4).cast::<i32>().read_unaligned();
                let index = _mm256_srlv_epi32(_mm256_set1_epi32(four), high_first);
                let bit3 = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                let decoded = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, index),
                    _mm256_permutevar8x32_ps(high, index),
                    bit3,
                );
                _mm256_storeu_ps(out.add(quarter * 8).cast(), decoded);
            }
        }
        return;
    }
    // SAFETY: the caller guarantees 16 bytes and 32 elements, 64 bytes.
    unsafe {
        let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes.cast()));
        let nibbles = _mm256_or_si256(_mm256_srli_epi16::<4>(words), _mm256_slli_epi16::<8>(words));
        let index = _mm256_and_si256(nibbles, _mm256_set1_epi8(0x0F));
        let low = _mm256_shuffle_epi8(values[0], index);
        let high = _mm256_shuffle_epi8(values[1], index);
        let even = _mm256_unpacklo_epi8(low, high);
        let odd = _mm256_unpackhi_epi8(low, high);
        let out = out.cast::<__m128i>();
        _mm_storeu_si128(out, _mm256_castsi256_si128(even));
        _mm_storeu_si128(out.add(1), _mm256_castsi256_si128(odd));
        _mm_storeu_si128(out.add(2), _mm256_extracti128_si256::<1>(even));
        _mm_storeu_si128(out.add(3), _mm256_extracti128_si256::<1>(odd));
    }
}

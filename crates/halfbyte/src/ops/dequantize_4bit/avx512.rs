//! AVX-512.
//!
//! ```text
//! for each block:
//!     values = table * scale, rounded to T
//!     for each 16 bytes: out = values[byte >> 4], values[byte & 15], ...
//! ```
//!
//! Liberties taken with the definition:
//! 1. A product depends only on the code and the block, so all 16 are multiplied and rounded once
//!    per block, and decoding is a permute.
//! 2. 16-bit elements: each value stands twice in the 32 words of the permute's table, so that
//!    bit 0 of an index means nothing and its bits above 4 are not read. Both nibbles then come
//!    from one shift by 11 or 7 of a word that holds the byte twice, without masking. float32
//!    elements: likewise by 4 or 0, 16 at a time.
//! 3. Stores stay in the cache: streaming stores are 2.5 times as fast into a warm output of 64 MiB
//!    or more, but cost whoever reads a smaller one next more than they save, and a third more
//!    time on fresh pages, which is what a new tensor of that size is (2-core Xeon, 2026-11).
//! 4. A block's last group of fewer than 32 elements goes through buffers on the stack.

use crate::arch::x86::bf16_bits16;
use crate::blocks::BlockSize;
use crate::{DType, Element};
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

/// Elements per step.
const GROUP: usize = 32;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: BlockSize,
    out: &mut [T],
) {
    let b = blocksize.get();
    // SAFETY: 16 floats.
    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
    for ((bytes, scale), out) in packed.chunks(b / 2).zip(absmax).zip(out.chunks_mut(b)) {
        let values = values::<T>(_mm512_mul_ps(table, _mm512_set1_ps(*scale)));
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

/// The products in the form that [`decode`] looks up: float32 as they are, 16-bit elements
/// rounded and twice in each 32-bit lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn values<T: Element>(products: __m512) -> __m512i {
    let bits = match T::DTYPE {
        DType::F32 => return _mm512_castps_si512(products),
        DType::BF16 => bf16_bits16(products),
        DType::F16 => _mm512_cvtepu16_epi32(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(products)),
    };
    _mm512_or_si512(bits, _mm512_slli_epi32::<16>(bits))
}

/// # Safety
/// `bytes` is valid for reading 16 bytes and `out` for writing 32 elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn decode<T: Element>(bytes: *const u8, values: __m512i, out: *mut T) {
    if T::DTYPE == DType::F32 {
        // Each byte in both 32-bit lanes of its pair, four times.
        let pairs = _mm512_set_epi64(
            0x0707_0707_0707_0707,
            0x0606_0606_0606_0606,
            0x0505_0505_0505_0505,
            0x0404_0404_0404_0404,
            0x0303_0303_0303_0303,
            0x0202_0202_0202_0202,
            0x0101_0101_0101_0101,
            0,
        );
        let high_first = _mm512_set1_epi64(4);
        for half in 0..2 {
            // SAFETY: the caller guarantees 16 bytes and 32 elements.
            unsafe {
                let eight = bytes.add(half * 8).cast::<i64>().read_unaligned();
                let lanes = _mm512_shuffle_epi8(_mm512_set1_epi64(eight), pairs);
                let index = _mm512_srlv_epi32(lanes, high_first);
                let decoded = _mm512_permutexvar_epi32(index, values);
                _mm512_storeu_si512(out.add(half * 16).cast(), decoded);
            }
        }
        return;
    }
    // Each byte in both 16-bit lanes of its pair, twice.
    let pairs = _mm512_set_epi32(
        0x0F0F_0F0F,
        0x0E0E_0E0E,
        0x0D0D_0D0D,
        0x0C0C_0C0C,
        0x0B0B_0B0B,
        0x0A0A_0A0A,
        0x0909_0909,
        0x0808_0808,
        0x0707_0707,
        0x0606_0606,
        0x0505_0505,
        0x0404_0404,
        0x0303_0303,
        0x0202_0202,
        0x0101_0101,
        0,
    );
    let high_first = _mm512_set1_epi32(0x0007_000B);
    // SAFETY: the caller guarantees 16 bytes and 32 elements.
    unsafe {
        let sixteen = _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.cast()));
        let index = _mm512_srlv_epi16(_mm512_shuffle_epi8(sixteen, pairs), high_first);
        _mm512_storeu_si512(out.cast(), _mm512_permutexvar_epi16(index, values));
    }
}

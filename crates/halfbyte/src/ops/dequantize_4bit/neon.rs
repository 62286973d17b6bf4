//! AArch64 Advanced SIMD.
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
//! 2. Values are looked up byte by byte, in one table per byte of an element; the interleaving
//!    loads and stores (`ld2`, `st2`, `ld4`, `st4`) take elements apart and put them together.
//! 3. A block's last group of fewer than 32 elements goes through buffers on the stack.

use crate::blocks::BlockSize;
use crate::{DType, Element};
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::aarch64::*;

/// Elements per step.
const GROUP: usize = 32;

#[target_feature(enable = "neon")]
pub(super) fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: BlockSize,
    out: &mut [T],
) {
    let b = blocksize.get();
    for ((bytes, scale), out) in packed.chunks(b / 2).zip(absmax).zip(out.chunks_mut(b)) {
        let values = values::<T>(table, *scale);
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

/// The bytes of the 16 rounded products, lowest first; two of the four for 16-bit elements.
#[inline]
#[target_feature(enable = "neon")]
fn values<T: Element>(table: &[f32; 16], scale: f32) -> uint8x16x4_t {
    let mut rounded = [T::default(); 16];
    // SAFETY: 16 floats in the table, 16 elements of 2 or 4 bytes in the buffer.
    unsafe {
        for i in [0, 4, 8, 12] {
            let products = vmulq_n_f32(vld1q_f32(table.as_ptr().add(i)), scale);
            T::store4(rounded.as_mut_ptr().add(i), products);
        }
        if T::DTYPE == DType::F32 {
            return vld4q_u8(rounded.as_ptr().cast());
        }
        let uint8x16x2_t(low, high) = vld2q_u8(rounded.as_ptr().cast());
        uint8x16x4_t(low, high, high, high)
    }
}

/// # Safety
/// `bytes` is valid for reading 16 bytes and `out` for writing 32 elements.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn decode<T: Element>(bytes: *const u8, values: uint8x16x4_t, out: *mut T) {
    // SAFETY: the caller guarantees 16 readable bytes.
    let bytes = unsafe { vld1q_u8(bytes) };
    let (high, low) = (vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(0x0F)));
    let indices = [vzip1q_u8(high, low), vzip2q_u8(high, low)];
    for (half, index) in indices.into_iter().enumerate() {
        let byte = |table| vqtbl1q_u8(table, index);
        let (b0, b1) = (byte(values.0), byte(values.1));
        // SAFETY: the caller guarantees 32 writable elements, of which this writes 16.
        unsafe {
            let out = out.add(half * 16).cast::<u8>();
            if T::DTYPE == DType::F32 {
                vst4q_u8(out, uint8x16x4_t(b0, b1, byte(values.2), byte(values.3)));
            } else {
                vst2q_u8(out, uint8x16x2_t(b0, b1));
            }
        }
    }
}

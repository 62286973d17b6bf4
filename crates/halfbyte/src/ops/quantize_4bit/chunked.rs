//! What the vector kernels share: the walk over a task in chunks that stay in L1.
//!
//! ```text
//! for each chunk of 4096 elements (one block of the largest size):
//!     absmax[b]     = max |x| of each block             vectors
//!     reciprocal[b] = 1 / absmax[b]                     plain Rust
//!     packed        = codes of x * reciprocal[b]        vectors
//!     redo the blocks that have no usable reciprocal    scalar
//! ```
//!
//! Liberties taken with the definition:
//! 1. Passes go over a chunk instead of a block: divisions leave the dependency chain, and the
//!    chunk is read from memory once.
//! 2. A last group of fewer than 128 elements is copied and padded with zeros. They encode to the
//!    code of zero, which is also what pads an odd last byte.
//! 3. Subnormal and non-finite blocks are encoded twice, the second time by the definition.

use super::scalar;
use crate::Element;
use crate::blocks::BlockSize;
use crate::code::Code4;
use crate::ops::normalize::{self, Normalizer};

/// Elements per chunk: a whole number of blocks of any size.
pub(super) const CHUNK: usize = BlockSize::B4096.get();
/// Elements per call of the inner loop of [`Variant::encode`].
pub(super) const GROUP: usize = 128;
/// No block border lies inside a row.
pub(super) const ROW: usize = BlockSize::ALL[0].get();
/// Blocks per chunk, at most.
const SCALES: usize = CHUNK / BlockSize::ALL[0].get();

/// The two passes of one instruction set.
pub(super) trait Variant {
    /// Writes the largest magnitude of each block (the last may be short); exact for finite
    /// blocks, and some NaN or infinity for others.
    ///
    /// # Safety
    /// The CPU has the instruction set; `x` holds whole rows; `absmax` has one entry per block.
    unsafe fn absmax<T: Element>(x: &[T], blocksize: BlockSize, absmax: &mut [f32]);

    /// Encodes `x * reciprocal[block]`, wherever that is at most one ulp above 1 in magnitude.
    ///
    /// # Safety
    /// The CPU has the instruction set; `x` holds whole groups and `packed` half as many bytes;
    /// `reciprocal` has one entry for each block that begins in `x` and one if none does.
    unsafe fn encode<T: Element>(
        x: &[T],
        code: Code4,
        blocksize: BlockSize,
        reciprocal: &[f32],
        packed: &mut [u8],
    );
}

/// # Safety
/// The CPU has the instruction set of `V`.
pub(super) unsafe fn quantize<T: Element, V: Variant>(
    input: &[T],
    code: Code4,
    blocksize: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let scales = CHUNK / blocksize.get();
    let chunks = input.chunks(CHUNK).zip(packed.chunks_mut(CHUNK / 2));
    for ((x, packed), absmax) in chunks.zip(absmax.chunks_mut(scales)) {
        // SAFETY: the caller's contract.
        unsafe { chunk::<T, V>(x, code, blocksize, packed, absmax) };
    }
}

/// # Safety
/// The CPU has the instruction set of `V`.
unsafe fn chunk<T: Element, V: Variant>(
    x: &[T],
    code: Code4,
    blocksize: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let b = blocksize.get();
    let rows = x.len() / ROW * ROW;
    // SAFETY: `rows` is a multiple of ROW and the slice of scales ends with its last block.
    unsafe { V::absmax(&x[..rows], blocksize, &mut absmax[..rows.div_ceil(b)]) };
    if rows < x.len() {
        let rest = normalize::absmax(&x[rows..]);
        let scale = &mut absmax[rows / b];
        let begun = if rows.is_multiple_of(b) { 0 } else { scale.to_bits() };
        *scale = f32::from_bits(rest.to_bits().max(begun));
    }

    // One more than any block may need, so that the padding of the last group has a scale too.
    let mut reciprocal = [0.0; SCALES + GROUP / ROW];
    let direct = invert(absmax, &mut reciprocal);

    let groups = x.len() / GROUP * GROUP;
    let (whole, rest) = x.split_at(groups);
    let (whole_packed, rest_packed) = packed.split_at_mut(groups / 2);
    // SAFETY: `groups` is a multiple of GROUP; `reciprocal` is longer than any chunk needs.
    unsafe { V::encode(whole, code, blocksize, &reciprocal, whole_packed) };
    if !rest.is_empty() {
        let mut padded = [T::default(); GROUP];
        padded[..rest.len()].copy_from_slice(rest);
        let mut bytes = [0; GROUP / 2];
        // SAFETY: one group; the slice holds at least GROUP / ROW entries past any block.
        unsafe { V::encode(&padded, code, blocksize, &reciprocal[groups / b..], &mut bytes) };
        rest_packed.copy_from_slice(&bytes[..rest_packed.len()]);
    }

    if !direct {
        for ((x, packed), scale) in x.chunks(b).zip(packed.chunks_mut(b / 2)).zip(absmax) {
            if !is_direct(*scale) {
                *scale = normalize::absmax(x);
                scalar::block(x, code, *scale, packed);
            }
        }
    }
}

/// Whether `y = x * (1 / absmax)`, taken literally, is the definition: all but NaN, infinity and
/// what has no float32 reciprocal. For zero, the reciprocal is defined as zero.
fn is_direct(absmax: f32) -> bool {
    absmax == 0.0 || (absmax > Normalizer::SMALLEST_DIRECT && absmax < f32::INFINITY)
}

/// Writes the reciprocals; true when every block [is direct](is_direct).
fn invert(absmax: &[f32], reciprocal: &mut [f32]) -> bool {
    let mut direct = true;
    for (a, r) in absmax.iter().zip(reciprocal) {
        direct &= is_direct(*a);
        *r = if *a == 0.0 { 0.0 } else { 1.0 / a };
    }
    direct
}

//! `quantize_4bit`: flattened blocks to two 4-bit codes a byte.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod chunked;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
mod staircase;
#[cfg(test)]
mod tests;

use crate::blocks::{BlockSize, Blocks};
use crate::code::Code4;
use crate::error::{Result, check_len};
use crate::isa::{self, Isa};
use crate::threads::{self, Chunks, Shared};
use crate::{Element, NonFinite};

/// Elements per task: 128-256 KiB of input, well inside an L2 cache.
const TASK: usize = 64 * 1024;

/// Quantizes `input` (flattened, row-major) block by block.
///
/// Per block, `absmax = max |x|` in float32; each element becomes the nearest code of
/// `y = x * (1 / absmax)`, an exact midpoint going to the lower value (NF4) or the smaller
/// magnitude (FP4). Two codes a byte, the first in the high nibble; an odd last element is padded
/// with a nibble that decodes to zero.
///
/// - `packed`: `ceil(len / 2)` bytes, written in full.
/// - `absmax`: `ceil(len / blocksize)` float32 scales, written in full.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length,
/// [`Error::NonFinite`](crate::Error::NonFinite) under [`NonFinite::Refuse`] (the buffers are
/// then filled all the same), [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
///
/// ```
/// use halfbyte::{BlockSize, Code4, NonFinite};
/// let weight = [0.5f32, -1.0, 0.0, 2.0];
/// let (mut packed, mut absmax) = ([0u8; 2], [0.0f32; 1]);
/// halfbyte::quantize_4bit(
///     &weight, Code4::Nf4, BlockSize::B64, NonFinite::Refuse, &mut packed, &mut absmax,
/// )?;
/// assert_eq!(absmax, [2.0]);
/// assert_eq!(packed, [0xA2, 0x7F]); // 0.25 → 10, -0.5 → 2, 0 → 7, 1 → 15
/// # Ok::<(), halfbyte::Error>(())
/// ```
pub fn quantize_4bit<T: Element>(
    input: &[T],
    code: Code4,
    blocksize: BlockSize,
    non_finite: NonFinite,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    let blocks = blocksize.over(input.len());
    check_len("packed", blocks.packed_len(), packed.len(), "bytes")?;
    check_len("absmax", blocks.count(), absmax.len(), "float32 scales")?;
    run(isa::selected()?, input, code, blocks, packed, absmax);
    non_finite.check(absmax, blocks)
}

/// Quantizes whole blocks (the last may be short) into exactly their bytes and scales.
type Kernel<T> = unsafe fn(&[T], Code4, BlockSize, &mut [u8], &mut [f32]);

fn kernel<T: Element>(isa: Isa) -> Kernel<T> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => chunked::quantize::<T, avx512::Avx512>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => chunked::quantize::<T, avx2::Avx2>,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => chunked::quantize::<T, neon::Neon>,
        _ => scalar::quantize::<T>,
    }
}

fn run<T: Element>(
    isa: Isa,
    input: &[T],
    code: Code4,
    blocks: Blocks,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let kernel = kernel::<T>(isa);
    let b = blocks.blocksize().get();
    let chunks = Chunks::new(input.len(), TASK, b);
    let (packed, absmax) = (Shared::new(packed), Shared::new(absmax));
    threads::run(chunks.count(), |i| {
        let r = chunks.range(i);
        // SAFETY: chunks are disjoint and start at block borders, hence (blocks being even) at
        // byte borders; so are their bytes and scales. `isa` was detected on this machine.
        unsafe {
            let packed = packed.part(r.start / 2..r.end.div_ceil(2));
            let absmax = absmax.part(r.start / b..r.end.div_ceil(b));
            kernel(&input[r], code, blocks.blocksize(), packed, absmax);
        }
    });
}

//! `quantize_blockwise`: flattened blocks to one 8-bit code an element.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(test)]
mod tests;

use crate::blocks::{BlockSize, Blocks};
use crate::code::Code8;
use crate::error::{Result, check_len};
use crate::isa::{self, Isa};
use crate::threads::{self, Chunks, Shared};
use crate::{Element, NonFinite};

/// Elements per task: 128-256 KiB of input.
const TASK: usize = 64 * 1024;

/// Quantizes `input` (flattened) block by block to the nearest of 256 codes.
///
/// Per block, `absmax = max |x|` in float32; each element becomes the exact nearest code of
/// `y = x * (1 / absmax)`, an exact midpoint going to the lower value.
///
/// - `out`: one index per element.
/// - `absmax`: `ceil(len / blocksize)` float32 scales.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length,
/// [`Error::NonFinite`](crate::Error::NonFinite) under [`NonFinite::Refuse`],
/// [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn quantize_blockwise<T: Element>(
    input: &[T],
    code: &Code8,
    blocksize: BlockSize,
    non_finite: NonFinite,
    out: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    let blocks = blocksize.over(input.len());
    check_len("out", input.len(), out.len(), "bytes")?;
    check_len("absmax", blocks.count(), absmax.len(), "float32 scales")?;
    run(isa::selected()?, input, code, blocks, out, absmax);
    non_finite.check(absmax, blocks)
}

/// Quantizes whole blocks (the last may be short).
pub(super) type Kernel<T> = unsafe fn(&[T], &Code8, BlockSize, &mut [u8], &mut [f32]);

pub(super) fn kernel<T: Element>(isa: Isa) -> Kernel<T> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::quantize::<T>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::quantize::<T>,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::quantize::<T>,
        _ => scalar::quantize::<T>,
    }
}

/// Bytes that kernels fetch ahead, at least: some blocks of the usual 1 KiB.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 4096;

/// Fetches as many bytes as `x` has, `ahead` bytes after it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch<T>(x: &[T], ahead: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    let ahead = x.as_ptr().cast::<i8>().wrapping_add(ahead);
    for line in (0..size_of_val(x)).step_by(64) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line)) };
    }
}

fn run<T: Element>(
    isa: Isa,
    input: &[T],
    code: &Code8,
    blocks: Blocks,
    out: &mut [u8],
    absmax: &mut [f32],
) {
    let kernel = kernel::<T>(isa);
    let b = blocks.blocksize().get();
    let chunks = Chunks::new(input.len(), TASK, b);
    let (out, absmax) = (Shared::new(out), Shared::new(absmax));
    threads::run(chunks.count(), |i| {
        let r = chunks.range(i);
        // SAFETY: chunks are disjoint and start at block borders. `isa` was detected here.
        unsafe {
            let absmax = absmax.part(r.start / b..r.end.div_ceil(b));
            kernel(&input[r.clone()], code, blocks.blocksize(), out.part(r), absmax);
        }
    });
}

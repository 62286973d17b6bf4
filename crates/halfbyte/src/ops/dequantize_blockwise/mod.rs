//! `dequantize_blockwise`: 8-bit codes back to elements.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(test)]
mod tests;

use crate::Element;
use crate::blocks::{BlockSize, Blocks};
use crate::error::{Result, check_len};
use crate::isa::{self, Isa};
use crate::threads::{self, Chunks, Shared};

/// Elements per task.
const TASK: usize = 64 * 1024;

/// Decodes `out[i] = code[q[i]] * absmax[i / blocksize]` in float32, rounded once to `T`.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) unless `q` holds `out.len()` bytes and `absmax` one
/// scale per block; [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn dequantize_blockwise<T: Element>(
    q: &[u8],
    absmax: &[f32],
    code: &[f32; 256],
    blocksize: BlockSize,
    out: &mut [T],
) -> Result<()> {
    let blocks = blocksize.over(out.len());
    check_len("quantized input", out.len(), q.len(), "bytes")?;
    check_len("absmax", blocks.count(), absmax.len(), "float32 scales")?;
    run(isa::selected()?, q, absmax, code, blocks, out);
    Ok(())
}

/// Decodes whole blocks (the last may be short).
type Kernel<T> = unsafe fn(&[u8], &[f32], &[f32; 256], BlockSize, &mut [T]);

fn kernel<T: Element>(isa: Isa) -> Kernel<T> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::dequantize::<T>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::dequantize::<T>,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::dequantize::<T>,
        _ => scalar::dequantize::<T>,
    }
}

fn run<T: Element>(
    isa: Isa,
    q: &[u8],
    absmax: &[f32],
    code: &[f32; 256],
    blocks: Blocks,
    out: &mut [T],
) {
    let kernel = kernel::<T>(isa);
    let b = blocks.blocksize().get();
    let chunks = Chunks::new(out.len(), TASK, b);
    let out = Shared::new(out);
    threads::run(chunks.count(), |i| {
        let r = chunks.range(i);
        let absmax = &absmax[r.start / b..r.end.div_ceil(b)];
        // SAFETY: chunks are disjoint and start at block borders. `isa` was detected here.
        unsafe { kernel(&q[r.clone()], absmax, code, blocks.blocksize(), out.part(r)) }
    });
}

//! `dequantize_4bit`: two 4-bit codes a byte back to elements.

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
use crate::ops::Scales;
use crate::threads::{self, Chunks, Shared};

/// Elements per task; also bounds the nested scales a task decodes on its stack (8 KiB).
const TASK: usize = 64 * 1024;
const MAX_SCALES: usize = TASK / BlockSize::ALL[0].get();

/// Decodes `out.len()` elements: `out[i] = table[q[i]] * scale[i / blocksize]` in float32, rounded
/// once to `T` (to nearest even).
///
/// `table` is [`Code4::table`](crate::Code4::table), or any 16 values.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) unless `packed` holds `ceil(out.len() / 2)` bytes and
/// `scales` one entry per block; [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn dequantize_4bit<T: Element>(
    packed: &[u8],
    scales: &Scales<'_>,
    table: &[f32; 16],
    blocksize: BlockSize,
    out: &mut [T],
) -> Result<()> {
    let blocks = blocksize.over(out.len());
    check_len("packed", blocks.packed_len(), packed.len(), "bytes")?;
    scales.check(blocks)?;
    run(isa::selected()?, packed, scales, table, blocks, out);
    Ok(())
}

/// Decodes whole blocks (the last may be short) from exactly their bytes and scales.
type Kernel<T> = unsafe fn(&[u8], &[f32], &[f32; 16], BlockSize, &mut [T]);

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
    packed: &[u8],
    scales: &Scales<'_>,
    table: &[f32; 16],
    blocks: Blocks,
    out: &mut [T],
) {
    let kernel = kernel::<T>(isa);
    let b = blocks.blocksize().get();
    let chunks = Chunks::new(out.len(), TASK, b);
    let out = Shared::new(out);
    threads::run(chunks.count(), |i| {
        let r = chunks.range(i);
        let packed = &packed[r.start / 2..r.end.div_ceil(2)];
        let mut buffer;
        let which = r.start / b..r.end.div_ceil(b);
        let absmax = match scales {
            Scales::Plain(absmax) => &absmax[which],
            Scales::Nested(_) => {
                buffer = [0.0; MAX_SCALES];
                scales.decode(which.start, &mut buffer[..which.len()]);
                &buffer[..which.len()]
            }
        };
        // SAFETY: chunks are disjoint and start at block borders, hence at byte borders. `isa`
        // was detected on this machine.
        unsafe { kernel(packed, absmax, table, blocks.blocksize(), out.part(r)) }
    });
}

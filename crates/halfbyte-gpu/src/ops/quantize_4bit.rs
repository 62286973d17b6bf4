//! `quantize_4bit`: flattened blocks to two 4-bit codes a byte.

use super::weight::{by_dtype, shift};
use crate::error::{Result, check_len};
use crate::{DeviceSlice, Floats, Grid, Stream, sources};
use halfbyte::{BlockSize, Code4};

/// Elements per group: whole blocks of any size.
const TILE: usize = 8192;
/// Threads per group.
const THREADS: u32 = 256;

/// Quantizes `input` (flattened, row-major) block by block, as
/// [`halfbyte::quantize_4bit`] does under
/// [`NonFinite::Propagate`](halfbyte::NonFinite::Propagate), bit for bit (a NaN scale is NaN, its
/// payload may differ).
///
/// - `packed`: `ceil(len / 2)` bytes, written in full.
/// - `absmax`: `ceil(len / blocksize)` float32 scales, written in full.
///
/// One launch. Buffers aligned to 16 bytes are read and written 16 bytes at a time.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length; else what loading
/// the kernel or the driver reports.
pub fn quantize_4bit(
    stream: &Stream,
    input: Floats,
    code: Code4,
    blocksize: BlockSize,
    packed: DeviceSlice<u8>,
    absmax: DeviceSlice<f32>,
) -> Result<()> {
    let blocks = blocksize.over(input.len());
    check_len("packed", blocks.packed_len(), packed.len())?;
    check_len("absmax", blocks.count(), absmax.len())?;
    let kernel = match code {
        Code4::Nf4 => by_dtype!(input.dtype(), "quantize_4bit_nf4"),
        Code4::Fp4 => by_dtype!(input.dtype(), "quantize_4bit_fp4"),
    };
    stream.launch(
        &sources::QUANTIZE_4BIT,
        kernel,
        Grid::new(input.len().div_ceil(TILE), THREADS),
        &[input.into(), packed.into(), absmax.into(), input.len().into(), shift(blocksize).into()],
    )
}

//! `dequantize_4bit`: two 4-bit codes a byte back to elements.

use super::weight::{Scales, Table4, by_dtype, shift};
use crate::error::{Result, check_len};
use crate::{DeviceSlice, Floats, Grid, Stream, sources};
use halfbyte::BlockSize;

/// Elements per group.
const TILE: usize = 8192;
/// Threads per group.
const THREADS: u32 = 256;

/// Decodes `out.len()` elements, as [`halfbyte::dequantize_4bit`] does, bit for bit (a NaN is NaN,
/// its payload may differ): `out[i] = table[q[i]] * scale[i / blocksize]` in float32, rounded once
/// to the dtype of `out` (to nearest even). Nested scales are decoded on the way.
///
/// One launch. Buffers aligned to 16 bytes are read and written at full width.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) unless `packed` holds `ceil(out.len() / 2)` bytes,
/// `scales` one entry per block and a table in memory 16 values; else what loading the kernel or
/// the driver reports.
pub fn dequantize_4bit(
    stream: &Stream,
    packed: DeviceSlice<u8>,
    scales: &Scales,
    table: &Table4,
    blocksize: BlockSize,
    out: Floats,
) -> Result<()> {
    let blocks = blocksize.over(out.len());
    check_len("packed", blocks.packed_len(), packed.len())?;
    scales.check(blocks)?;
    table.check()?;
    let [absmax, absmax8, code2, absmax2, offset, shift2] = scales.args();
    let [kind, table] = table.args();
    stream.launch(
        &sources::DEQUANTIZE_4BIT,
        by_dtype!(out.dtype(), "dequantize_4bit"),
        Grid::new(out.len().div_ceil(TILE), THREADS),
        &[
            packed.into(),
            absmax,
            absmax8,
            code2,
            absmax2,
            offset,
            shift2,
            kind,
            table,
            out.into(),
            out.len().into(),
            shift(blocksize).into(),
        ],
    )
}

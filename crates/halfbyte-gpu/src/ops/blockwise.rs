//! `quantize_blockwise` and `dequantize_blockwise`: one 8-bit code an element.

use super::weight::{by_dtype, shift};
use crate::error::{Error, Result, check_len};
use crate::{DeviceSlice, Floats, Grid, Stream, sources};
use halfbyte::BlockSize;

/// Elements per group of the quantization: whole blocks of any size.
const QUANTIZE_TILE: usize = 8192;
/// Elements per group of the decoding.
const DEQUANTIZE_TILE: usize = 8192;
/// Threads per group.
const THREADS: u32 = 256;

/// Quantizes `input` (flattened) block by block to the nearest entry of `code`, as
/// [`halfbyte::quantize_blockwise`] does under
/// [`NonFinite::Propagate`](halfbyte::NonFinite::Propagate), bit for bit (a NaN scale is NaN, its
/// payload may differ).
///
/// - `code`: 1 to 256 values in ascending order (not checked: it is in device memory). A code
///   that does not ascend gives some index of it.
/// - `out`: one index per element.
/// - `absmax`: `ceil(len / blocksize)` float32 scales.
///
/// One launch. Buffers aligned to 16 bytes are read and written at full width.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length, [`Error::Argument`] for a code of no or
/// of more than 256 values; else what loading the kernel or the driver reports.
pub fn quantize_blockwise(
    stream: &Stream,
    input: Floats,
    code: DeviceSlice<f32>,
    blocksize: BlockSize,
    out: DeviceSlice<u8>,
    absmax: DeviceSlice<f32>,
) -> Result<()> {
    check_code(code)?;
    check_len("out", input.len(), out.len())?;
    check_len("absmax", blocksize.over(input.len()).count(), absmax.len())?;
    stream.launch(
        &sources::QUANTIZE_BLOCKWISE,
        by_dtype!(input.dtype(), "quantize_blockwise"),
        Grid::new(input.len().div_ceil(QUANTIZE_TILE), THREADS),
        &[
            input.into(),
            code.into(),
            (code.len() as u32).into(),
            out.into(),
            absmax.into(),
            input.len().into(),
            shift(blocksize).into(),
        ],
    )
}

/// Decodes `out[i] = code[codes[i]] * absmax[i / blocksize]` in float32, rounded once to the dtype
/// of `out`, as [`halfbyte::dequantize_blockwise`] does, bit for bit (a NaN is NaN, its payload
/// may differ). An index past a shorter `code` decodes as its last value.
///
/// One launch. Buffers aligned to 16 bytes are read and written at full width.
///
/// # Errors
/// [`Error::Length`] unless `codes` holds `out.len()` bytes and `absmax` one scale per block,
/// [`Error::Argument`] for a code of no or of more than 256 values; else what loading the kernel
/// or the driver reports.
pub fn dequantize_blockwise(
    stream: &Stream,
    codes: DeviceSlice<u8>,
    absmax: DeviceSlice<f32>,
    code: DeviceSlice<f32>,
    blocksize: BlockSize,
    out: Floats,
) -> Result<()> {
    check_code(code)?;
    check_len("codes", out.len(), codes.len())?;
    check_len("absmax", blocksize.over(out.len()).count(), absmax.len())?;
    stream.launch(
        &sources::DEQUANTIZE_BLOCKWISE,
        by_dtype!(out.dtype(), "dequantize_blockwise"),
        Grid::new(out.len().div_ceil(DEQUANTIZE_TILE), THREADS),
        &[
            codes.into(),
            absmax.into(),
            code.into(),
            (code.len() as u32).into(),
            out.into(),
            out.len().into(),
            shift(blocksize).into(),
        ],
    )
}

fn check_code(code: DeviceSlice<f32>) -> Result<()> {
    if (1..=256).contains(&code.len()) {
        return Ok(());
    }
    Err(Error::Argument {
        what: "code",
        expected: "1 to 256 values".into(),
        got: code.len().to_string(),
    })
}

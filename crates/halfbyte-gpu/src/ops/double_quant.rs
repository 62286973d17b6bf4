//! Double quantization: the scales of a 4-bit tensor, quantized to 8 bits themselves.

use super::weight::shift;
use crate::error::{Error, Result, check_len};
use crate::{DeviceSlice, Grid, Stream, sources};
use halfbyte::BlockSize;

/// Scales per group of the quantization: whole blocks of any size.
const TILE: usize = 8192;
/// Threads per group of the quantization.
const THREADS: u32 = 256;
/// Threads per group of the sum.
const SUM_THREADS: u32 = 128;
/// Most groups of the sum.
const MAX_SUM_GROUPS: usize = 256;
/// Scales per group of the sum, at least.
const SUM_TILE: usize = 1024;
/// 64-bit words that each group of the sum leaves: nine digits and the flags.
const WORDS: usize = 10;
/// The digits of the sum do not overflow 64 bits below 2^31 scales.
const MAX_LEN: usize = i32::MAX as usize;

const fn sum_groups(len: usize) -> usize {
    let groups = len.div_ceil(SUM_TILE);
    if groups < MAX_SUM_GROUPS { groups } else { MAX_SUM_GROUPS }
}

/// Bytes of workspace that [`quantize_absmax`] needs for `len` scales: at most 20 KiB.
#[must_use]
pub const fn quantize_absmax_workspace(len: usize) -> usize {
    DeviceSlice::<u8>::carved_bytes::<i64>(sum_groups(len) * WORDS)
}

/// Quantizes `absmax - offset` with the signed dynamic code in blocks of `blocksize`, and writes
/// `offset`, the correctly rounded mean of `absmax`, as [`halfbyte::quantize_absmax`] does, bit
/// for bit (a NaN is NaN, its payload may differ).
///
/// - `codes`: one index per scale.
/// - `absmax2`: `ceil(absmax.len() / blocksize)` float32 scales.
/// - `offset`: `[1]`; 0 for no scales. It stays on the device.
/// - `workspace`: [`quantize_absmax_workspace`] bytes.
///
/// Three launches: exact sums of parts, the mean from them, the codes.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length or the workspace is too small,
/// [`Error::Argument`] for 2^31 scales or more; else what loading the kernels or the driver
/// reports.
pub fn quantize_absmax(
    stream: &Stream,
    absmax: DeviceSlice<f32>,
    blocksize: BlockSize,
    codes: DeviceSlice<u8>,
    absmax2: DeviceSlice<f32>,
    offset: DeviceSlice<f32>,
    mut workspace: DeviceSlice<u8>,
) -> Result<()> {
    let len = absmax.len();
    check_len("codes", len, codes.len())?;
    check_len("absmax2", blocksize.over(len).count(), absmax2.len())?;
    check_len("offset", 1, offset.len())?;
    if len > MAX_LEN {
        return Err(Error::Argument {
            what: "absmax",
            expected: format!("at most {MAX_LEN} scales"),
            got: len.to_string(),
        });
    }
    let groups = sum_groups(len);
    let sums = workspace.carve::<i64>("workspace", groups * WORDS)?;
    let source = &sources::DOUBLE_QUANT;
    stream.launch(
        source,
        c"absmax_sum",
        Grid::new(groups, SUM_THREADS),
        &[absmax.into(), len.into(), sums.into()],
    )?;
    stream.launch(
        source,
        c"absmax_mean",
        Grid::new(1, SUM_THREADS),
        &[sums.into(), (groups as u32).into(), len.into(), offset.into()],
    )?;
    stream.launch(
        source,
        c"quantize_absmax_f32",
        Grid::new(len.div_ceil(TILE), THREADS),
        &[
            absmax.into(),
            offset.into(),
            codes.into(),
            absmax2.into(),
            len.into(),
            shift(blocksize).into(),
        ],
    )
}

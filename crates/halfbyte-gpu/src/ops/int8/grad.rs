//! The gradient of an 8-bit layer for its input.

use super::{Weight8, by_dtype, check_dtype, check_len};
use crate::{Device, Floats, Grid, Result, Runtime, Stream, sources};
use halfbyte::DType;

/// Rows and columns of a group's tile on tensor cores, and its shared memory: copies of the gradient
/// in three stages, decoded weights in two.
pub(in crate::ops) const LARGE: (usize, usize, u32) = (128, 128, 40 * 1024);
pub(in crate::ops) const SMALL: (usize, usize, u32) = (32, 64, 14 * 1024);
pub(in crate::ops) const TILE_THREADS: u32 = 128;
/// Rows and columns of a group's tile elsewhere, and its threads.
pub(in crate::ops) const PLAIN: (usize, usize) = (64, 64);
pub(in crate::ops) const PLAIN_THREADS: u32 = 256;

/// `out = grad_output · dequantize(weight)`: the gradient of [`int8_linear`](super::int8_linear)
/// for its input, taken as if nothing had been rounded. The dequantized weight is never stored.
///
/// - `grad_output`: `[rows, out_features]`, row-major.
/// - `out`: `[rows, in_features]`, of `grad_output`'s dtype.
///
/// Accumulates in float32. On tensor cores (CUDA: float16, and bfloat16 from `sm_80` on) a weight is
/// rounded once to that dtype, elsewhere it stays float32. So a result differs from the exact one,
/// before it is rounded, by at most `(2^-8 + outputs * 2^-23) * sum |grad| |weight|` for bfloat16,
/// with `2^-11` (and `2^-25` of each gradient, where weights are subnormal) for float16, and
/// `(outputs + 2) * 2^-23` of that sum elsewhere.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length;
/// [`Error::DType`](crate::Error::DType) when the dtypes differ; else what the launch reports.
pub fn int8_linear_grad_input(
    stream: &Stream,
    grad_output: Floats,
    rows: usize,
    weight: &Weight8,
    out: Floats,
) -> Result<()> {
    let (outputs, columns) = (weight.out_features, weight.in_features);
    check_len("grad_output", rows.saturating_mul(outputs), grad_output.len())?;
    check_len("out", rows.saturating_mul(columns), out.len())?;
    check_dtype("out", grad_output.dtype(), out.dtype())?;
    if out.is_empty() {
        return Ok(());
    }
    let tiles = |tile: (usize, usize)| rows.div_ceil(tile.0) * columns.div_ceil(tile.1);
    let (source, kernel, grid) = if tensor_cores(stream.device(), out.dtype()) {
        // Large tiles read less, small ones fill the device sooner.
        let enough =
            tiles((LARGE.0, LARGE.1)) * 4 >= stream.device().multiprocessors() as usize * 3;
        let (tile, name) = if rows > SMALL.0 && enough {
            (LARGE, by_dtype!(out.dtype(), "int8_grad_large"))
        } else {
            (SMALL, by_dtype!(out.dtype(), "int8_grad_small"))
        };
        let grid = Grid::new(tiles((tile.0, tile.1)), TILE_THREADS).shared(tile.2);
        (&sources::INT8_GRAD, name, grid)
    } else {
        let grid = Grid::new(tiles(PLAIN), PLAIN_THREADS);
        (&sources::INT8_GRAD_PLAIN, by_dtype!(out.dtype(), "int8_grad_plain"), grid)
    };
    stream.launch(
        source,
        kernel,
        grid,
        &[
            grad_output.into(),
            weight.codes.into(),
            weight.scales.into(),
            out.into(),
            rows.into(),
            outputs.into(),
            columns.into(),
        ],
    )
}

pub(in crate::ops) fn tensor_cores(device: &Device, dtype: DType) -> bool {
    let least = match dtype {
        DType::F32 => return false,
        DType::F16 => 75,
        DType::BF16 => 80,
    };
    device.runtime() == Runtime::Cuda && device.capability() >= least
}

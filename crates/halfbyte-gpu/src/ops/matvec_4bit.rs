//! `matvec_4bit`: the 4-bit product for few rows of activations.

use super::weight::{Weight4, by_dtype, shift};
use crate::error::{Error, Result, check_dtype, check_len};
use crate::{Floats, Grid, Stream, sources};

/// Most rows of activations that [`matvec_4bit`] takes.
pub const MATVEC_4BIT_MAX_ROWS: usize = 8;

/// Output features per group.
const FEATURES: usize = 4;
/// Threads per group.
const THREADS: u32 = 128;

/// `out = a · dequantize(weight)^T + bias` for 0 to 8 rows, accumulated in float32, rounded once:
/// [`halfbyte::matmul_4bit`] where the time goes to reading the weight, which is read once.
///
/// - `a`: `[n, in_features]`, row-major.
/// - `bias`: `[out_features]`, if any.
/// - `out`: `[n, out_features]`.
///
/// With weights taken as the exact `table[q] * scale`, a result before its final rounding lies
/// within `(in_features / 128 + 32) * 2^-24 * (sum |a * w| + |bias|)` of the exact one, to first
/// order and short of underflow. It does not depend on the grid or on timing, nor on the other
/// rows; 1, 2, 3 to 4 and 5 to 8 rows are four kernels that add in the same order.
///
/// One launch. `in_features` divisible by 8, a `packed` aligned to 4 bytes and an `a` aligned to 16
/// make it fast; anything else is taken code by code.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length, [`Error::DType`] when `bias` or `out` has
/// another dtype than `a`, [`Error::Argument`] for more than 8 rows or for 2^32 columns or more;
/// else what loading the kernel or the driver reports.
pub fn matvec_4bit(
    stream: &Stream,
    a: Floats,
    n: usize,
    weight: &Weight4,
    bias: Option<Floats>,
    out: Floats,
) -> Result<()> {
    let (features, columns) = (weight.out_features(), weight.in_features());
    let at_most = |what, most: usize, got: usize| {
        if got <= most {
            return Ok(());
        }
        Err(Error::Argument { what, expected: format!("at most {most}"), got: got.to_string() })
    };
    at_most("n", MATVEC_4BIT_MAX_ROWS, n)?;
    at_most("in_features", u32::MAX as usize, columns)?;
    check_len("a", n.saturating_mul(columns), a.len())?;
    check_len("out", n.saturating_mul(features), out.len())?;
    check_dtype("out", a.dtype(), out.dtype())?;
    if let Some(bias) = bias {
        check_len("bias", features, bias.len())?;
        check_dtype("bias", a.dtype(), bias.dtype())?;
    }
    let kernel = match n {
        0 => return Ok(()),
        1 => by_dtype!(a.dtype(), "matvec_4bit_1"),
        2 => by_dtype!(a.dtype(), "matvec_4bit_2"),
        3..=4 => by_dtype!(a.dtype(), "matvec_4bit_4"),
        _ => by_dtype!(a.dtype(), "matvec_4bit_8"),
    };
    let [absmax, absmax8, code2, absmax2, offset, shift2] = weight.scales().args();
    let [kind, table] = weight.table().args();
    stream.launch(
        &sources::MATVEC_4BIT,
        kernel,
        Grid::new(features.div_ceil(FEATURES), THREADS),
        &[
            a.into(),
            (n as u32).into(),
            weight.packed().into(),
            absmax,
            absmax8,
            code2,
            absmax2,
            offset,
            shift2,
            kind,
            table,
            bias.into(),
            out.into(),
            features.into(),
            (columns as u32).into(),
            shift(weight.blocksize()).into(),
        ],
    )
}

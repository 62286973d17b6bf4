//! Double quantization: the scales of a 4-bit tensor, quantized to 8 bits themselves.

use crate::blocks::BlockSize;
use crate::code::Code8;
use crate::error::{Result, check_len};
use crate::ops::{NonFinite, quantize_blockwise};

/// Quantizes `absmax - offset` with the signed dynamic code in blocks of `blocksize`, and returns
/// `offset`, the correctly rounded mean of `absmax` (independent of thread count and order).
///
/// - `codes`: one index per scale.
/// - `absmax2`: `ceil(absmax.len() / blocksize)` float32 scales.
///
/// `scratch` holds `absmax - offset`: one float32 per scale.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length.
pub fn quantize_absmax(
    absmax: &[f32],
    blocksize: BlockSize,
    scratch: &mut [f32],
    codes: &mut [u8],
    absmax2: &mut [f32],
) -> Result<f32> {
    check_len("scratch", absmax.len(), scratch.len(), "float32 values")?;
    let offset = mean(absmax);
    for (s, a) in scratch.iter_mut().zip(absmax) {
        *s = a - offset;
    }
    let code = Code8::dynamic(true);
    // Non-finite scales come from non-finite weights; whoever refuses those has done so before.
    quantize_blockwise(scratch, code, blocksize, NonFinite::Propagate, codes, absmax2)?;
    Ok(offset)
}

/// The mean of non-negative float32 values, exact but for one rounding at the end.
fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    // TODO-lead: exact summation
    let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
    (sum / values.len() as f64) as f32
}

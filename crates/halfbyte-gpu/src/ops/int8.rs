//! `LLM.int8()` on the device: the functions of the core's `ops/int8`, under their names.
//!
//! int8 codes, row statistics, outlier columns and int32 sums equal the core's bit for bit, and so
//! do the float results of every function but [`int8_linear_grad_input`]: each step of the
//! epilogue is rounded once, in the core's order. (A NaN stays a NaN; its payload may differ.)
//!
//! Nothing here waits for the device. The number of outlier columns lies in device memory
//! ([`Outliers`]) and is read there by the product, so that a whole layer can be captured in a CUDA
//! graph. Values are not looked at on the host: NaN and infinity propagate.

pub(super) mod grad;
pub(super) mod product;
pub(super) mod rows;

pub use grad::int8_linear_grad_input;
pub use product::{
    int8_linear, int8_linear_matmul, int8_linear_workspace, int8_mixed_scaled_mm, int8_scaled_mm,
};
pub use rows::{
    int8_double_quant, int8_gather_columns, int8_mm_dequant, int8_outliers,
    int8_vectorwise_dequant, int8_vectorwise_quant, int8_vectorwise_quant_workspace,
};

use super::weight::by_dtype;
use crate::error::{check_dtype, check_len};
use crate::{DeviceSlice, Floats, Result, Stream};
use halfbyte::INT8_MAX_DEPTH;

/// An 8-bit weight `[out_features, in_features]` on the device: int8 codes, row-major, and one
/// float32 scale (`SCB`) a row, which is the row's largest magnitude.
#[derive(Clone, Copy, Debug)]
pub struct Weight8 {
    codes: DeviceSlice<i8>,
    scales: DeviceSlice<f32>,
    out_features: usize,
    in_features: usize,
}

impl Weight8 {
    /// Ties the parts together.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) unless `codes` holds `out_features * in_features`
    /// values and `scales` `out_features`; [`Error::Core`](crate::Error::Core) when `in_features`
    /// passes [`INT8_MAX_DEPTH`].
    pub fn new(
        codes: DeviceSlice<i8>,
        scales: DeviceSlice<f32>,
        out_features: usize,
        in_features: usize,
    ) -> Result<Self> {
        check_len("codes", out_features.saturating_mul(in_features), codes.len())?;
        check_len("scales", out_features, scales.len())?;
        check_depth(in_features)?;
        Ok(Self { codes, scales, out_features, in_features })
    }

    /// Rows of the weight.
    #[must_use]
    pub const fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of the weight.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.in_features
    }
}

/// Columns of activations that hold an outlier: a list on the device, and how many there are.
///
/// `columns` has room for every column of the activations; its first `count[0]` entries are the
/// outlier columns, ascending, and what lies behind them is not defined.
#[derive(Clone, Copy, Debug)]
pub struct Outliers {
    /// `[in_features]`.
    pub columns: DeviceSlice<i32>,
    /// `[1]`.
    pub count: DeviceSlice<i32>,
}

impl Outliers {
    fn check(&self, columns: usize) -> Result<()> {
        check_len("outliers.columns", columns, self.columns.len())?;
        check_len("outliers.count", 1, self.count.len())
    }
}

pub(super) fn check_depth(got: usize) -> Result<()> {
    if got <= INT8_MAX_DEPTH { Ok(()) } else { Err(halfbyte::Error::Depth { got }.into()) }
}

/// The rows of a matrix of `columns` columns.
fn check_matrix(what: &'static str, len: usize, columns: usize) -> Result<usize> {
    let rows = len.checked_div(columns).unwrap_or(0);
    check_len(what, rows * columns, len)?;
    Ok(rows)
}

/// A bias `[out_features]` of the result's dtype.
fn check_bias(bias: Option<Floats>, out_features: usize, out: Floats) -> Result<()> {
    let Some(bias) = bias else { return Ok(()) };
    check_len("bias", out_features, bias.len())?;
    check_dtype("bias", out.dtype(), bias.dtype())
}

/// As many groups as there is work, but not more than keep the device busy: the kernels stride
/// over the rest.
pub(super) fn groups(stream: &Stream, work: usize) -> usize {
    work.min(stream.device().multiprocessors().max(1) as usize * 16)
}

//! `LLM.int8()` (arXiv 2208.07339): int8 rows with one float32 statistic each, their exact int32
//! product, and the columns of outliers that stay in the activations' own precision.
//!
//! ```text
//! r[m] = max |a[m][k]|                    over elements below the threshold
//! q[m][k] = round(a[m][k] * (127 / r[m]))    0 in columns that hold an outlier
//! s[m][n] = Σ_k q[m][k] * w[n][k]            int32
//! y[m][n] = s * (r[m] / 127^2) * c[n]  +  Σ_j a[m][j] * dequantize(w[n][j])  +  bias[n]
//! ```
//!
//! `j` runs over the outlier columns, in ascending order. Everything but `s` is float32, each step
//! rounded once in the order of `scalar.rs`, and `s` is exact: so every instruction set gives the
//! same bytes.

mod experts;
mod float;
mod product;
mod rows;
mod scalar;

pub use experts::experts_matmul_8bit;

use crate::error::{Error, Result, check_len};
use crate::isa;
use crate::ops::gemm::{self, All, Part};
use crate::{Element, NonFinite};
use product::{Group, Left, Order};

/// The longest row of which an int32 sum of products of int8 cannot overflow: `2^31 / 128^2 - 1`.
pub const INT8_MAX_DEPTH: usize = (1 << 31) / (128 * 128) - 1;

/// `1 / 127`, as the dequantization multiplies by it.
const INV_127: f32 = 1.0 / 127.0;
/// `1 / 127^2`: both sides of a product.
const INV_127_SQUARED: f32 = 1.0 / (127.0 * 127.0);

/// An 8-bit weight `[out_features, in_features]`: int8 codes, row-major, and one float32 scale
/// (`SCB`) a row, which is the row's largest magnitude.
#[derive(Clone, Copy, Debug)]
pub struct Weight8<'a> {
    codes: &'a [i8],
    scales: &'a [f32],
    out_features: usize,
    in_features: usize,
}

impl<'a> Weight8<'a> {
    /// Ties the parts together.
    ///
    /// # Errors
    /// [`Error::Length`] unless `codes` holds `out_features * in_features` values and `scales`
    /// `out_features`; [`Error::Depth`] when `in_features` passes [`INT8_MAX_DEPTH`].
    pub fn new(
        codes: &'a [i8],
        scales: &'a [f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Self> {
        check_len("codes", out_features.saturating_mul(in_features), codes.len(), "int8 codes")?;
        check_len("scales", out_features, scales.len(), "float32 scales")?;
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

    /// The codes of row `o`.
    fn row(&self, o: usize) -> &'a [i8] {
        &self.codes[o * self.in_features..(o + 1) * self.in_features]
    }
}

/// One weight as `dequantize` gives it: `code * scale / 127`.
#[inline]
fn decode(code: i8, scale: f32) -> f32 {
    f32::from(code) * scale * INV_127
}

fn check_depth(depth: usize) -> Result<()> {
    if depth <= INT8_MAX_DEPTH { Ok(()) } else { Err(Error::Depth { got: depth }) }
}

/// The rows of a matrix of `columns` columns.
fn check_matrix(buffer: &'static str, len: usize, columns: usize) -> Result<usize> {
    let rows = len.checked_div(columns).unwrap_or(0);
    check_len(buffer, rows * columns, len, "elements (whole rows)")?;
    Ok(rows)
}

fn check_finite(non_finite: NonFinite, stats: &[f32], columns: usize) -> Result<()> {
    match stats.iter().position(|r| !r.is_finite()) {
        Some(row) if non_finite == NonFinite::Refuse => {
            Err(Error::NonFinite { block: row, start: row * columns, end: (row + 1) * columns })
        }
        _ => Ok(()),
    }
}

/// Quantizes each row of `a` to int8 under its own largest magnitude.
///
/// With a `threshold` above zero, elements of that magnitude or more count as outliers: they have
/// no part in a row's statistic, and the codes of their columns are 0 in every row.
///
/// - `a`: `[rows, columns]`, row-major.
/// - `codes`: `[rows, columns]`.
/// - `row_stats`: `[rows]`, the largest magnitude of each row below the threshold.
///
/// Returns the outlier columns, ascending. A row that holds NaN has the statistic NaN and codes 0,
/// one that holds an infinity (and no threshold) the statistic infinity and codes 0.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::NonFinite`] under
/// [`NonFinite::Refuse`] for a statistic that is not finite (`block` is the row);
/// [`Error::Isa`] for a bad `HALFBYTE_ISA`.
pub fn int8_vectorwise_quant<T: Element>(
    a: &[T],
    columns: usize,
    threshold: f32,
    non_finite: NonFinite,
    codes: &mut [i8],
    row_stats: &mut [f32],
) -> Result<Vec<usize>> {
    check_matrix("a", a.len(), columns)?;
    check_len("codes", a.len(), codes.len(), "int8 codes")?;
    check_rows(a.len(), columns, row_stats)?;
    let isa = isa::selected()?;
    let outliers = rows::quantize(isa, a, columns, threshold, codes, row_stats);
    check_finite(non_finite, row_stats, columns)?;
    Ok(outliers)
}

/// `row_stats` has one entry a row; without columns the number of rows is whatever it says.
fn check_rows(len: usize, columns: usize, row_stats: &[f32]) -> Result<()> {
    if columns == 0 {
        return Ok(());
    }
    check_len("row_stats", len / columns, row_stats.len(), "float32 values")
}

/// `out = codes * row_stats / 127`, row by row, in float32, rounded once to `T`.
///
/// - `codes`, `out`: `[rows, columns]`, row-major.
/// - `row_stats`: `[rows]`.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::Isa`] for a bad `HALFBYTE_ISA`.
pub fn int8_vectorwise_dequant<T: Element>(
    codes: &[i8],
    columns: usize,
    row_stats: &[f32],
    out: &mut [T],
) -> Result<()> {
    check_matrix("codes", codes.len(), columns)?;
    check_len("out", codes.len(), out.len(), "elements")?;
    check_rows(codes.len(), columns, row_stats)?;
    rows::dequantize(isa::selected()?, codes, columns, row_stats, out);
    Ok(())
}

/// Quantizes `a` twice: by rows, as [`int8_vectorwise_quant`] does, and by columns.
///
/// - `a`, `row_codes`, `col_codes`: `[rows, columns]`, row-major.
/// - `row_stats`: `[rows]`; `col_stats`: `[columns]`, the largest magnitudes below the threshold.
///
/// Returns the outlier columns, ascending; both kinds of codes are 0 there.
///
/// # Errors
/// As [`int8_vectorwise_quant`].
#[allow(clippy::too_many_arguments)] // two results of two parts each
pub fn int8_double_quant<T: Element>(
    a: &[T],
    columns: usize,
    threshold: f32,
    non_finite: NonFinite,
    row_codes: &mut [i8],
    col_codes: &mut [i8],
    row_stats: &mut [f32],
    col_stats: &mut [f32],
) -> Result<Vec<usize>> {
    check_matrix("a", a.len(), columns)?;
    check_len("row_codes", a.len(), row_codes.len(), "int8 codes")?;
    check_len("col_codes", a.len(), col_codes.len(), "int8 codes")?;
    check_rows(a.len(), columns, row_stats)?;
    check_len("col_stats", columns, col_stats.len(), "float32 values")?;
    let isa = isa::selected()?;
    let outliers =
        rows::quantize_both(isa, a, columns, threshold, row_codes, col_codes, row_stats, col_stats);
    check_finite(non_finite, row_stats, columns)?;
    Ok(outliers)
}

/// `out = a · b^T`, exactly.
///
/// - `a`: `[m, depth]`, `b`: `[n, depth]`, row-major int8.
/// - `out`: `[m, n]`.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::Depth`] when `depth` passes
/// [`INT8_MAX_DEPTH`]; [`Error::Isa`] for a bad `HALFBYTE_ISA`.
pub fn int8_linear_matmul(a: &[i8], b: &[i8], depth: usize, out: &mut [i32]) -> Result<()> {
    let (m, n) = (check_matrix("a", a.len(), depth)?, check_matrix("b", b.len(), depth)?);
    check_depth(depth)?;
    let isa = isa::selected()?;
    if depth == 0 {
        out.fill(0);
        return Ok(());
    }
    check_len("out", m * n, out.len(), "int32 sums")?;
    let left = Left::<f32> { input: &[], codes: Some(a), stats: &[], depth };
    let weight = Weight8 { codes: b, scales: &[], out_features: n, in_features: depth };
    let group = Group { weight, bias: None, outliers: &[], rows: 0..m };
    product::run(isa, &left, Order::Same, &[group], out);
    Ok(())
}

/// `out = acc * row_stats * col_stats / 127^2 + bias`, in float32, rounded once to `T`.
///
/// - `acc`, `out`: `[m, n]`, row-major.
/// - `row_stats`: `[m]`; `col_stats`, `bias`: `[n]`.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::Isa`] for a bad `HALFBYTE_ISA`.
pub fn int8_mm_dequant<T: Element>(
    acc: &[i32],
    row_stats: &[f32],
    col_stats: &[f32],
    bias: Option<&[f32]>,
    out: &mut [T],
) -> Result<()> {
    let n = col_stats.len();
    check_len("acc", row_stats.len().saturating_mul(n), acc.len(), "int32 sums")?;
    check_len("out", acc.len(), out.len(), "elements")?;
    check_bias(bias, n)?;
    rows::mm_dequant(isa::selected()?, acc, row_stats, col_stats, bias, out);
    Ok(())
}

fn check_bias<T>(bias: Option<&[T]>, out_features: usize) -> Result<()> {
    bias.map_or(Ok(()), |b| check_len("bias", out_features, b.len(), "elements"))
}

/// `out = (a · weight^T) * row_stats * scales / 127^2 + bias`, fused.
///
/// - `a`: `[rows, in_features]` int8, row-major; `row_stats`: `[rows]`.
/// - `bias`: `[out_features]`, if any.
/// - `out`: `[rows, out_features]`.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::Isa`] for a bad `HALFBYTE_ISA`.
pub fn int8_scaled_mm<T: Element>(
    a: &[i8],
    row_stats: &[f32],
    weight: &Weight8<'_>,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    int8_mixed_scaled_mm(&[], a, row_stats, weight, &[], bias, out)
}

/// As [`int8_scaled_mm`], and columns `outliers` of `input` times those of the dequantized weight
/// on top, in the same pass.
///
/// - `input`: `[rows, in_features]`, what `a` was quantized from; not read without `outliers`.
/// - `outliers`: ascending columns. (The codes of these columns should be 0 in `a`.)
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::Column`] for an outlier outside
/// the weight; [`Error::Isa`] for a bad `HALFBYTE_ISA`.
pub fn int8_mixed_scaled_mm<T: Element>(
    input: &[T],
    a: &[i8],
    row_stats: &[f32],
    weight: &Weight8<'_>,
    outliers: &[usize],
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    let rows = row_stats.len();
    check_len("a", rows.saturating_mul(weight.in_features), a.len(), "int8 codes")?;
    check_len("out", rows.saturating_mul(weight.out_features), out.len(), "elements")?;
    check_bias(bias, weight.out_features)?;
    if let Some(&got) = outliers.iter().find(|&&j| j >= weight.in_features) {
        return Err(Error::Column { got, columns: weight.in_features });
    }
    if !outliers.is_empty() {
        check_len("input", a.len(), input.len(), "elements")?;
    }
    let isa = isa::selected()?;
    let left = Left { input, codes: Some(a), stats: row_stats, depth: weight.in_features };
    let group = Group { weight: *weight, bias, outliers, rows: 0..rows };
    product::run(isa, &left, Order::Same, &[group], out);
    Ok(())
}

/// A whole `LLM.int8()` layer in one call: quantizes the rows of `input`
/// ([`int8_vectorwise_quant`]), multiplies and adds the outliers ([`int8_mixed_scaled_mm`]).
///
/// - `input`: `[rows, in_features]`, row-major.
/// - `threshold`: magnitude from which on an activation counts as an outlier; 0 for none.
/// - `bias`: `[out_features]`, if any.
/// - `out`: `[rows, out_features]`.
///
/// Returns the outlier columns, ascending.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::Isa`] for a bad `HALFBYTE_ISA`.
pub fn int8_linear<T: Element>(
    input: &[T],
    rows: usize,
    weight: &Weight8<'_>,
    threshold: f32,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<Vec<usize>> {
    check_len("input", rows.saturating_mul(weight.in_features), input.len(), "elements")?;
    check_len("out", rows.saturating_mul(weight.out_features), out.len(), "elements")?;
    check_bias(bias, weight.out_features)?;
    let isa = isa::selected()?;
    let depth = weight.in_features;
    let mut stats = vec![0.0; rows];
    let outliers = rows::all_stats(isa, input, depth, threshold, &mut stats);
    let left = Left { input, codes: None, stats: &stats, depth };
    let group = Group { weight: *weight, bias, outliers: &outliers, rows: 0..rows };
    product::run(isa, &left, Order::Same, &[group], out);
    Ok(outliers)
}

/// `out = grad_output · dequantize(weight)`: the gradient of [`int8_linear`] for its input, taken
/// as if nothing had been rounded. The dequantized weight is never stored.
///
/// - `grad_output`: `[rows, out_features]`, row-major.
/// - `out`: `[rows, in_features]`.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::Isa`] for a bad `HALFBYTE_ISA`.
pub fn int8_linear_grad_input<T: Element>(
    grad_output: &[T],
    rows: usize,
    weight: &Weight8<'_>,
    out: &mut [T],
) -> Result<()> {
    let n = weight.out_features;
    check_len("grad_output", rows.saturating_mul(n), grad_output.len(), "elements")?;
    check_len("out", rows.saturating_mul(weight.in_features), out.len(), "elements")?;
    let part = Part { weight: *weight, rows: All(rows), bias: None };
    gemm::grad_input(isa::selected()?, grad_output, &[part], out);
    Ok(())
}

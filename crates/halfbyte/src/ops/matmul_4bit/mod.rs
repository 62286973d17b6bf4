//! `matmul_4bit`: activations times a 4-bit weight, and the gradient of the activations. The
//! dequantized weight is never stored.

pub(super) mod few_rows;
mod many_rows;
mod scalar;
#[cfg(test)]
mod tests;

use crate::Element;
use crate::blocks::{BlockSize, Blocks};
use crate::error::{Result, check_len};
use crate::isa::{self, Isa};
use crate::ops::Scales;

/// A 4-bit weight `[out_features, in_features]`, its blocks running over the flattened tensor.
#[derive(Clone, Copy, Debug)]
pub struct Weight4<'a> {
    packed: &'a [u8],
    scales: Scales<'a>,
    /// Where in `scales` the first block's is.
    first_scale: usize,
    table: &'a [f32; 16],
    blocks: Blocks,
    out_features: usize,
    in_features: usize,
}

impl<'a> Weight4<'a> {
    /// Ties the parts together.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) unless `packed` holds
    /// `ceil(out_features * in_features / 2)` bytes and `scales` one entry per block.
    pub fn new(
        packed: &'a [u8],
        scales: Scales<'a>,
        table: &'a [f32; 16],
        blocksize: BlockSize,
        out_features: usize,
        in_features: usize,
    ) -> Result<Self> {
        let blocks = blocksize.over(out_features.saturating_mul(in_features));
        check_len("packed", blocks.packed_len(), packed.len(), "bytes")?;
        scales.check(blocks)?;
        Ok(Self { packed, scales, first_scale: 0, table, blocks, out_features, in_features })
    }

    /// A weight whose scales start at number `first_scale` of a longer list. Lengths have been
    /// checked; `packed` may be longer.
    pub(super) const fn slice(
        packed: &'a [u8],
        scales: Scales<'a>,
        first_scale: usize,
        table: &'a [f32; 16],
        blocksize: BlockSize,
        [out_features, in_features]: [usize; 2],
    ) -> Self {
        let blocks = blocksize.over(out_features * in_features);
        Self { packed, scales, first_scale, table, blocks, out_features, in_features }
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

/// `out = input · dequantize(weight)^T + bias`, accumulated in float32, rounded once to `T`.
///
/// - `input`: `[rows, in_features]`, row-major.
/// - `bias`: `[out_features]`, if any.
/// - `out`: `[rows, out_features]`.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length;
/// [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn matmul_4bit<T: Element>(
    input: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    check_len("input", rows.saturating_mul(weight.in_features), input.len(), "elements")?;
    check_len("out", rows.saturating_mul(weight.out_features), out.len(), "elements")?;
    if let Some(bias) = bias {
        check_len("bias", weight.out_features, bias.len(), "elements")?;
    }
    run(isa::selected()?, input, rows, weight, bias, out);
    Ok(())
}

/// `out = grad_output · dequantize(weight)`: the gradient of [`matmul_4bit`] for its input.
///
/// - `grad_output`: `[rows, out_features]`, row-major.
/// - `out`: `[rows, in_features]`.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length;
/// [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn matmul_4bit_grad_input<T: Element>(
    grad_output: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    out: &mut [T],
) -> Result<()> {
    check_len(
        "grad_output",
        rows.saturating_mul(weight.out_features),
        grad_output.len(),
        "elements",
    )?;
    check_len("out", rows.saturating_mul(weight.in_features), out.len(), "elements")?;
    run_grad(isa::selected()?, grad_output, rows, weight, out);
    Ok(())
}

pub(super) fn run<T: Element>(
    isa: Isa,
    input: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    if rows <= few_rows::MAX_ROWS {
        few_rows::forward(isa, input, rows, weight, bias, out);
    } else {
        many_rows::forward(isa, input, rows, weight, bias, out);
    }
}

pub(super) fn run_grad<T: Element>(
    isa: Isa,
    grad_output: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    out: &mut [T],
) {
    many_rows::grad_input(isa, grad_output, rows, weight, out);
}

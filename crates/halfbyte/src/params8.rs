//! [`Params8bit`]: an 8-bit weight that owns its codes.

use crate::error::{Error, Result, check_len};
use crate::{Element, NonFinite, Weight8, ops};

/// The weight of an `LLM.int8()` layer, `[out_features, in_features]`: int8 codes and one float32
/// scale (`SCB`, the row's largest magnitude) for each row.
///
/// ```
/// use halfbyte::Params8bit;
///
/// let weight: Vec<f32> = (0..128).map(|i| (i as f32).sin()).collect();
/// let params = Params8bit::quantize(&weight, [2, 64])?;
///
/// let mut input = [0.5f32; 64];
/// input[7] = 40.0; // an outlier: stays in float32
/// let output = params.matmul(&input, 1, 6.0, None)?; // [1, 2]
/// let exact: f32 = weight[..64].iter().zip(&input).map(|(w, x)| w * x).sum();
/// assert!((output[0] - exact).abs() < 0.01 * exact.abs());
/// # Ok::<(), halfbyte::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Params8bit {
    codes: Vec<i8>,
    scales: Vec<f32>,
    shape: [usize; 2],
}

impl Params8bit {
    /// Quantizes each row of `weight` (row-major) under its own largest magnitude.
    ///
    /// # Errors
    /// [`Error::Length`] when `weight` does not have the shape's number of elements,
    /// [`Error::NonFinite`] when it holds NaN or infinity (`block` is the row), [`Error::Depth`]
    /// when `in_features` passes [`INT8_MAX_DEPTH`](crate::INT8_MAX_DEPTH), [`Error::Isa`] for a
    /// bad `HALFBYTE_ISA`.
    pub fn quantize<T: Element>(weight: &[T], shape: [usize; 2]) -> Result<Self> {
        let [rows, columns] = shape;
        check_len("weight", rows.saturating_mul(columns), weight.len(), "elements")?;
        let (mut codes, mut scales) = (vec![0; weight.len()], vec![0.0; rows]);
        let refuse = NonFinite::Refuse;
        ops::int8_vectorwise_quant(weight, columns, 0.0, refuse, &mut codes, &mut scales)?;
        Weight8::new(&codes, &scales, rows, columns)?;
        Ok(Self { codes, scales, shape })
    }

    /// Puts together what a checkpoint holds. `tensor` names the weight in error messages.
    ///
    /// # Errors
    /// [`Error::State`] when the codes or scales do not fit the shape, or rows are too long.
    pub fn from_parts(
        codes: Vec<i8>,
        scales: Vec<f32>,
        shape: [usize; 2],
        tensor: &str,
    ) -> Result<Self> {
        Weight8::new(&codes, &scales, shape[0], shape[1])
            .map_err(|e| Error::State { tensor: tensor.to_owned(), reason: e.to_string() })?;
        Ok(Self { codes, scales, shape })
    }

    /// `[out_features, in_features]`.
    #[must_use]
    pub const fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Codes, row-major.
    #[must_use]
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// Scales, one a row.
    #[must_use]
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The weight as the operations take it.
    #[must_use]
    #[allow(clippy::missing_panics_doc)] // the lengths were checked when it was made
    pub fn weight(&self) -> Weight8<'_> {
        let [rows, columns] = self.shape;
        Weight8::new(&self.codes, &self.scales, rows, columns).expect("checked when it was made")
    }

    /// The decoded weight, row-major.
    ///
    /// # Errors
    /// [`Error::Isa`] for a bad `HALFBYTE_ISA`.
    pub fn dequantize<T: Element>(&self) -> Result<Vec<T>> {
        let mut out = vec![T::default(); self.codes.len()];
        ops::int8_vectorwise_dequant(&self.codes, self.shape[1], &self.scales, &mut out)?;
        Ok(out)
    }

    /// `input · weight^T + bias` by `LLM.int8()`: `input` is `[rows, in_features]`, `bias`
    /// `[out_features]`, the result `[rows, out_features]`. Columns of the input that hold a
    /// magnitude from `threshold` on (0: none) stay in the input's own precision.
    ///
    /// # Errors
    /// [`Error::Length`] when a buffer does not fit, [`Error::Isa`] for a bad `HALFBYTE_ISA`.
    pub fn matmul<T: Element>(
        &self,
        input: &[T],
        rows: usize,
        threshold: f32,
        bias: Option<&[T]>,
    ) -> Result<Vec<T>> {
        let mut out = vec![T::default(); rows.saturating_mul(self.shape[0])];
        ops::int8_linear(input, rows, &self.weight(), threshold, bias, &mut out)?;
        Ok(out)
    }

    /// `grad_output · weight`: the gradient of [`matmul`](Self::matmul) for its input.
    /// `grad_output` is `[rows, out_features]`, the result `[rows, in_features]`.
    ///
    /// # Errors
    /// As [`matmul`](Self::matmul).
    pub fn matmul_grad_input<T: Element>(&self, grad_output: &[T], rows: usize) -> Result<Vec<T>> {
        let mut out = vec![T::default(); rows.saturating_mul(self.shape[1])];
        ops::int8_linear_grad_input(grad_output, rows, &self.weight(), &mut out)?;
        Ok(out)
    }
}

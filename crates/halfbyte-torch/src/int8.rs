//! The ops of `LLM.int8()`: arguments from the dispatcher to the core crate's slices and back.
//!
//! Schemas, fakes and autograd formulas are in `python/halfbyte/_ops_int8.py`. Activations of more
//! than two dimensions are matrices of their last one: a statistic belongs to each of those rows.

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::error::{Error, Result};
use crate::ops::{check_float, elements, expect_shape, numbers, product_shape, use_torch_threads};
use crate::stack::ops;
use crate::tensor::{Scalar, ScalarType, Source, Tensor, with_float};
use halfbyte::{Element, NonFinite, Weight8, f16};
use std::fmt::Arguments;

ops! {
    Int8VectorwiseQuant = c"int8_vectorwise_quant" => int8_vectorwise_quant(
        a: Tensor, threshold: f64) -> ([Tensor; 2], Option<Tensor>);
    Int8VectorwiseDequant = c"int8_vectorwise_dequant" => int8_vectorwise_dequant(
        a: Tensor, stats: Tensor) -> Tensor;
    Int8VectorwiseDequantDtype = c"int8_vectorwise_dequant.dtype" => int8_vectorwise_dequant_dtype(
        a: Tensor, stats: Tensor, dtype: ScalarType) -> Tensor;
    Int8DoubleQuant = c"int8_double_quant" => int8_double_quant(
        a: Tensor, threshold: f64) -> ([Tensor; 4], Option<Tensor>);
    Int8LinearMatmul = c"int8_linear_matmul" => int8_linear_matmul(
        a: Tensor, b: Tensor) -> Tensor;
    Int8LinearMatmulOut = c"int8_linear_matmul.out" => int8_linear_matmul_out(
        a: Tensor, b: Tensor, out: Tensor) -> ();
    Int8MmDequant = c"int8_mm_dequant" => int8_mm_dequant(
        a: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: Option<ScalarType>,
        bias: Option<Tensor>) -> Tensor;
    Int8ScaledMm = c"int8_scaled_mm" => int8_scaled_mm(
        a: Tensor, b: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Option<Tensor>,
        dtype: Option<ScalarType>) -> Tensor;
    Int8MixedScaledMm = c"int8_mixed_scaled_mm" => int8_mixed_scaled_mm(
        a: Tensor, codes: Tensor, weight: Tensor, row_stats: Tensor, scales: Tensor,
        outlier_cols: Option<Tensor>, bias: Option<Tensor>) -> ([Tensor; 1], Option<Tensor>);
    Int8Linear = c"int8_linear" => int8_linear(
        a: Tensor, weight: Tensor, scales: Tensor, bias: Option<Tensor>, threshold: f64) -> Tensor;
    Int8LinearOutliers = c"int8_linear.outliers" => int8_linear_outliers(
        a: Tensor, weight: Tensor, scales: Tensor, bias: Option<Tensor>, threshold: f64)
        -> [Tensor; 2];
    Int8LinearGradInput = c"int8_linear_grad_input" => int8_linear_grad_input(
        grad_output: Tensor, weight: Tensor, scales: Tensor) -> Tensor;
}

// ---- arguments ---------------------------------------------------------------------------------

/// The rows and columns that a tensor `[..., columns]` is read as.
fn rows_and_columns(tensor: &Tensor, what: &str) -> Result<(usize, usize)> {
    match tensor.sizes()?.split_last() {
        Some((&columns, leading)) => Ok((elements(leading)?, columns as usize)),
        None => Err(Error::Value(format!("{what} must have at least one dimension, got none"))),
    }
}

/// The float32 numbers of a tensor with one for each of `expected` rows or columns.
fn stats<'a>(
    source: &'a Source<'_>,
    what: &str,
    expected: usize,
    of: Arguments<'_>,
) -> Result<&'a [f32]> {
    let stats = source.slice::<f32>()?;
    if stats.len() == expected {
        return Ok(stats);
    }
    Err(Error::Value(format!(
        "{what} must hold {expected} float32 values, one for each {of}, got {}",
        stats.len()
    )))
}

/// A bias `[out_features]` of any floating-point dtype as `T`.
pub(crate) fn read_bias<'a, T: Scalar>(bias: &'a Tensor, shape: &[usize]) -> Result<Source<'a>> {
    if !bias.dtype()?.is_float() {
        return Err(Error::Type(format!(
            "bias must be of a floating-point dtype, got {}",
            bias.dtype()?.name()
        )));
    }
    let sizes = bias.sizes()?;
    if sizes.iter().map(|&size| size as usize).ne(shape.iter().copied()) {
        return Err(Error::Value(format!("bias must have shape {shape:?}, got {sizes:?}")));
    }
    bias.read_as::<T>("bias")
}

/// The magnitude from which on elements are outliers; 0 for none, as everything that is not
/// above zero means.
pub(crate) fn magnitude(threshold: f64) -> f32 {
    if threshold > 0.0 {
        // What is too small for float32 still tells zeros from the rest.
        (threshold as f32).max(f32::from_bits(1))
    } else {
        0.0
    }
}

/// An int64 tensor `[n]` of columns.
fn column_tensor(columns: &[usize]) -> Result<Tensor> {
    let tensor = Tensor::empty(&[numbers(columns.len())], i64::scalar_type())?;
    for (slot, &column) in tensor.write("outlier_cols")?.slice_mut()?.iter_mut().zip(columns) {
        *slot = numbers(column);
    }
    Ok(tensor)
}

/// Columns as a caller lists them: int64, each in `0..columns`.
fn read_columns(tensor: &Tensor, columns: usize) -> Result<Vec<usize>> {
    tensor
        .read("outlier_cols")?
        .slice::<i64>()?
        .iter()
        .map(|&column| {
            usize::try_from(column).ok().filter(|&column| column < columns).ok_or_else(|| {
                Error::Value(format!(
                    "outlier_cols must hold columns of A, 0 to {}, got {column}",
                    numbers(columns) - 1
                ))
            })
        })
        .collect()
}

/// An int8 matrix `[out_features, in_features]` and a float32 scale for each of its rows.
struct Readable<'a> {
    codes: Source<'a>,
    scales: Source<'a>,
    what: (&'static str, &'static str),
    out_features: usize,
    in_features: usize,
}

impl<'a> Readable<'a> {
    fn new(
        codes: &'a Tensor,
        scales: &'a Tensor,
        what: (&'static str, &'static str),
    ) -> Result<Self> {
        let (out_features, in_features) = matrix(codes, what.0)?;
        let (codes, scales) = (codes.read(what.0)?, scales.read(what.1)?);
        Ok(Self { codes, scales, what, out_features, in_features })
    }

    fn weight(&self) -> Result<Weight8<'_>> {
        let (codes, (what, scales)) = (self.codes.slice()?, self.what);
        let of = format_args!("row of {what}");
        let scales = stats(&self.scales, scales, self.out_features, of)?;
        Ok(Weight8::new(codes, scales, self.out_features, self.in_features)?)
    }
}

/// `[rows, columns]` of a matrix.
fn matrix(tensor: &Tensor, what: &str) -> Result<(usize, usize)> {
    match *tensor.sizes()? {
        [rows, columns] => Ok((rows as usize, columns as usize)),
        ref sizes => Err(Error::Value(format!(
            "{what} must have two dimensions, [out_features, in_features], got shape {sizes:?}"
        ))),
    }
}

/// The weight as our own ops call it.
const LINEAR: (&str, &str) = ("CB", "SCB");

// ---- codes and statistics ----------------------------------------------------------------------

fn int8_vectorwise_quant(a: Tensor, threshold: f64) -> Result<([Tensor; 2], Option<Tensor>)> {
    let (rows, columns) = rows_and_columns(&a, "A")?;
    let source = a.read("A")?;
    check_float_a(&source)?;
    let codes = Tensor::empty(a.sizes()?, i8::scalar_type())?;
    let row_stats = Tensor::empty(&[numbers(rows)], f32::scalar_type())?;
    let (mut q, mut r) = (codes.write("codes")?, row_stats.write("row_stats")?);
    use_torch_threads();
    let outliers = with_float!(source.dtype(), "A", T => Ok(halfbyte::int8_vectorwise_quant(
        source.slice::<T>()?,
        columns,
        magnitude(threshold),
        NonFinite::Propagate,
        q.slice_mut()?,
        r.slice_mut()?,
    )?))?;
    drop((q, r));
    Ok(([codes, row_stats], outlier_cols(threshold, &outliers)?))
}

/// Refuses other dtypes before anything is allocated for them.
fn check_float_a(a: &Source<'_>) -> Result<()> {
    with_float!(a.dtype(), "A", T => { let _: &[T] = a.slice()?; Ok(()) })
}

/// The columns; without a threshold they were not looked for.
fn outlier_cols(threshold: f64, outliers: &[usize]) -> Result<Option<Tensor>> {
    (threshold > 0.0).then(|| column_tensor(outliers)).transpose()
}

fn int8_double_quant(a: Tensor, threshold: f64) -> Result<([Tensor; 4], Option<Tensor>)> {
    let (rows, columns) = rows_and_columns(&a, "A")?;
    let source = a.read("A")?;
    check_float_a(&source)?;
    let row_codes = Tensor::empty(a.sizes()?, i8::scalar_type())?;
    let col_codes = Tensor::empty(a.sizes()?, i8::scalar_type())?;
    let row_stats = Tensor::empty(&[numbers(rows)], f32::scalar_type())?;
    let col_stats = Tensor::empty(&[numbers(columns)], f32::scalar_type())?;
    use_torch_threads();
    let outliers = with_float!(source.dtype(), "A", T => Ok(halfbyte::int8_double_quant(
        source.slice::<T>()?,
        columns,
        magnitude(threshold),
        NonFinite::Propagate,
        row_codes.write("row_codes")?.slice_mut()?,
        col_codes.write("col_codes")?.slice_mut()?,
        row_stats.write("row_stats")?.slice_mut()?,
        col_stats.write("col_stats")?.slice_mut()?,
    )?))?;
    let results = [row_codes, col_codes, row_stats, col_stats];
    Ok((results, outlier_cols(threshold, &outliers)?))
}

fn int8_vectorwise_dequant(a: Tensor, row_stats: Tensor) -> Result<Tensor> {
    int8_vectorwise_dequant_dtype(a, row_stats, f32::scalar_type())
}

fn int8_vectorwise_dequant_dtype(
    a: Tensor,
    row_stats: Tensor,
    dtype: ScalarType,
) -> Result<Tensor> {
    let (rows, columns) = rows_and_columns(&a, "A")?;
    let (codes, row_stats) = (a.read("A")?, row_stats.read("stats")?);
    let (q, r) = (codes.slice()?, stats(&row_stats, "stats", rows, format_args!("row of A"))?);
    let out = Tensor::empty(a.sizes()?, check_float(dtype)?)?;
    use_torch_threads();
    with_float!(dtype, "dtype", T => {
        let mut out = out.write("out")?;
        Ok(halfbyte::int8_vectorwise_dequant(q, columns, r, out.slice_mut::<T>()?)?)
    })?;
    Ok(out)
}

// ---- products ----------------------------------------------------------------------------------

fn int8_linear_matmul(a: Tensor, b: Tensor) -> Result<Tensor> {
    let (n, k) = matrix(&b, "B")?;
    product_shape(&a, "A", (k, n), |shape, _| {
        let (a, b) = (a.read("A")?, b.read("B")?);
        let (a, b) = (a.slice()?, b.slice()?);
        let out = Tensor::empty(shape, i32::scalar_type())?;
        use_torch_threads();
        halfbyte::int8_linear_matmul(a, b, k, out.write("out")?.slice_mut()?)?;
        Ok(out)
    })
}

fn int8_linear_matmul_out(a: Tensor, b: Tensor, out: Tensor) -> Result<()> {
    let (n, k) = matrix(&b, "B")?;
    product_shape(&a, "A", (k, n), |shape, _| {
        expect_shape(&out, shape)?;
        let (a, b) = (a.read("A")?, b.read("B")?);
        let mut out = out.write("out")?;
        out.apart_from(&a)?;
        out.apart_from(&b)?;
        use_torch_threads();
        halfbyte::int8_linear_matmul(a.slice()?, b.slice()?, k, out.slice_mut()?)?;
        out.finish()
    })
}

fn int8_mm_dequant(
    a: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: Option<ScalarType>,
    bias: Option<Tensor>,
) -> Result<Tensor> {
    let (rows, columns) = rows_and_columns(&a, "A")?;
    let dtype = dtype.unwrap_or_else(f16::scalar_type);
    let (acc, row_stats, col_stats) =
        (a.read("A")?, row_stats.read("row_stats")?, col_stats.read("col_stats")?);
    let acc = acc.slice()?;
    let row_stats = stats(&row_stats, "row_stats", rows, format_args!("row of A"))?;
    let col_stats = stats(&col_stats, "col_stats", columns, format_args!("column of A"))?;
    let bias = bias.as_ref().map(|b| read_bias::<f32>(b, &[columns])).transpose()?;
    let bias = bias.as_ref().map(Source::slice).transpose()?;
    let out = Tensor::empty(a.sizes()?, check_float(dtype)?)?;
    use_torch_threads();
    with_float!(dtype, "dtype", T => {
        let mut out = out.write("out")?;
        Ok(halfbyte::int8_mm_dequant(acc, row_stats, col_stats, bias, out.slice_mut::<T>()?)?)
    })?;
    Ok(out)
}

fn int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Option<Tensor>,
    dtype: Option<ScalarType>,
) -> Result<Tensor> {
    let dtype = dtype.unwrap_or_else(f16::scalar_type);
    let readable = Readable::new(&b, &col_stats, ("B", "col_stats"))?;
    let weight = readable.weight()?;
    let (n, k) = (weight.out_features(), weight.in_features());
    product_shape(&a, "A", (k, n), |shape, rows| {
        let (codes, row_stats) = (a.read("A")?, row_stats.read("row_stats")?);
        let codes = codes.slice()?;
        let row_stats = stats(&row_stats, "row_stats", rows, format_args!("row of A"))?;
        let out = Tensor::empty(shape, check_float(dtype)?)?;
        use_torch_threads();
        with_float!(dtype, "dtype", T => {
            let bias = bias.as_ref().map(|b| read_bias::<T>(b, &[n])).transpose()?;
            let bias = bias.as_ref().map(Source::slice).transpose()?;
            let mut out = out.write("out")?;
            let y = out.slice_mut::<T>()?;
            Ok(halfbyte::int8_scaled_mm(codes, row_stats, &weight, bias, y)?)
        })?;
        Ok(out)
    })
}

fn int8_mixed_scaled_mm(
    a: Tensor,
    codes: Tensor,
    weight: Tensor,
    row_stats: Tensor,
    scales: Tensor,
    outlier_cols: Option<Tensor>,
    bias: Option<Tensor>,
) -> Result<([Tensor; 1], Option<Tensor>)> {
    let readable = Readable::new(&weight, &scales, LINEAR)?;
    let weight = readable.weight()?;
    let (n, k) = (weight.out_features(), weight.in_features());
    let input = a.read("A")?;
    let dtype = input.dtype();
    check_float_a(&input)?;
    if a.sizes()? != codes.sizes()? {
        return Err(Error::Value(format!(
            "CA must have the shape of A, {:?}, got {:?}",
            a.sizes()?,
            codes.sizes()?
        )));
    }
    product_shape(&codes, "CA", (k, n), |shape, rows| {
        let (codes, row_stats) = (codes.read("CA")?, row_stats.read("SCA")?);
        let codes = codes.slice()?;
        let row_stats = stats(&row_stats, "SCA", rows, format_args!("row of CA"))?;
        let mut outliers =
            outlier_cols.as_ref().map_or(Ok(Vec::new()), |columns| read_columns(columns, k))?;
        let out = Tensor::empty(shape, dtype)?;
        let outlier_shape = [numbers(rows), numbers(outliers.len())];
        let sub_a = if outlier_cols.is_some() { &outlier_shape[..] } else { &[0] };
        let sub_a = Tensor::empty(sub_a, dtype)?;
        use_torch_threads();
        with_float!(dtype, "A", T => {
            let input = input.slice::<T>()?;
            gather(input, k, &outliers, sub_a.write("subA")?.slice_mut()?);
            outliers.sort_unstable();
            let bias = bias.as_ref().map(|b| read_bias::<T>(b, &[n])).transpose()?;
            let bias = bias.as_ref().map(Source::slice).transpose()?;
            let mut out = out.write("out")?;
            let y = out.slice_mut()?;
            Ok(halfbyte::int8_mixed_scaled_mm(
                input, codes, row_stats, &weight, &outliers, bias, y,
            )?)
        })?;
        Ok(([out], Some(sub_a)))
    })
}

/// `out[m][i] = a[m][columns[i]]`.
fn gather<T: Element>(a: &[T], row: usize, columns: &[usize], out: &mut [T]) {
    if columns.is_empty() {
        return;
    }
    for (a, out) in a.chunks_exact(row).zip(out.chunks_exact_mut(columns.len())) {
        out.iter_mut().zip(columns).for_each(|(out, &column)| *out = a[column]);
    }
}

/// A whole layer, and its outlier columns.
fn linear(
    a: &Tensor,
    weight: &Tensor,
    scales: &Tensor,
    bias: Option<&Tensor>,
    threshold: f64,
) -> Result<(Tensor, Vec<usize>)> {
    let readable = Readable::new(weight, scales, LINEAR)?;
    let weight = readable.weight()?;
    let (n, k) = (weight.out_features(), weight.in_features());
    product_shape(a, "A", (k, n), |shape, rows| {
        let input = a.read("A")?;
        let out = Tensor::empty(shape, input.dtype())?;
        use_torch_threads();
        let outliers = with_float!(input.dtype(), "A", T => {
            let bias = bias.map(|b| read_bias::<T>(b, &[n])).transpose()?;
            let bias = bias.as_ref().map(Source::slice).transpose()?;
            let (x, threshold) = (input.slice::<T>()?, magnitude(threshold));
            let mut out = out.write("out")?;
            Ok(halfbyte::int8_linear(x, rows, &weight, threshold, bias, out.slice_mut()?)?)
        })?;
        Ok((out, outliers))
    })
}

fn int8_linear(
    a: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Option<Tensor>,
    threshold: f64,
) -> Result<Tensor> {
    linear(&a, &weight, &scales, bias.as_ref(), threshold).map(|(out, _)| out)
}

fn int8_linear_outliers(
    a: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Option<Tensor>,
    threshold: f64,
) -> Result<[Tensor; 2]> {
    let (out, outliers) = linear(&a, &weight, &scales, bias.as_ref(), threshold)?;
    Ok([out, column_tensor(&outliers)?])
}

fn int8_linear_grad_input(grad_output: Tensor, weight: Tensor, scales: Tensor) -> Result<Tensor> {
    let readable = Readable::new(&weight, &scales, LINEAR)?;
    let weight = readable.weight()?;
    let (n, k) = (weight.out_features(), weight.in_features());
    product_shape(&grad_output, "grad_output", (n, k), |shape, rows| {
        let grad = grad_output.read("grad_output")?;
        let out = Tensor::empty(shape, grad.dtype())?;
        use_torch_threads();
        with_float!(grad.dtype(), "grad_output", T => {
            let (g, mut out) = (grad.slice::<T>()?, out.write("out")?);
            Ok(halfbyte::int8_linear_grad_input(g, rows, &weight, out.slice_mut()?)?)
        })?;
        Ok(out)
    })
}

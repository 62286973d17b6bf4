//! The ops of `LLM.int8()`: arguments from the dispatcher to the core crate's slices and back.
//!
//! Schemas, fakes and autograd formulas are in `python/halfbyte/_ops_int8.py`. Activations of more
//! than two dimensions are matrices of their last one: a statistic belongs to each of those rows.

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::device::Device;
use crate::dtype::{Scalar, ScalarType, with_float};
use crate::error::{Error, Result};
use crate::gpu::Queue;
use crate::gpu::outliers::Found;
use crate::memory::{Source, expect_dtype};
use crate::ops::check_float;
use crate::stack::ops;
use crate::tensor::Tensor;
use crate::threads::use_torch_threads;
use crate::weight::{elements, numbers};
use halfbyte::NonFinite;
use halfbyte_gpu::ops as gpu;
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
}

// ---- arguments ---------------------------------------------------------------------------------

/// The rows and columns that a tensor `[..., columns]` is read as.
pub(crate) fn rows_and_columns(tensor: &Tensor, what: &str) -> Result<(usize, usize)> {
    match tensor.sizes()?.split_last() {
        Some((&columns, leading)) => Ok((elements(leading)?, columns as usize)),
        None => Err(Error::Value(format!("{what} must have at least one dimension, got none"))),
    }
}

/// Refuses all but a tensor of float32 with one for each of `expected` rows or columns.
pub(crate) fn check_stats(
    stats: &Source<'_>,
    what: &str,
    expected: usize,
    of: Arguments<'_>,
) -> Result<()> {
    expect_dtype::<f32>(stats.place().name, stats.dtype())?;
    if stats.len() == expected {
        return Ok(());
    }
    Err(Error::Value(format!(
        "{what} must hold {expected} float32 values, one for each {of}, got {}",
        stats.len()
    )))
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
pub(crate) fn column_tensor(columns: &[usize]) -> Result<Tensor> {
    let tensor = Tensor::empty(&[numbers(columns.len())], i64::scalar_type(), Device::cpu())?;
    for (slot, &column) in tensor.write("outlier_cols")?.slice_mut()?.iter_mut().zip(columns) {
        *slot = numbers(column);
    }
    Ok(tensor)
}

// ---- codes and statistics ----------------------------------------------------------------------

fn int8_vectorwise_quant(a: Tensor, threshold: f64) -> Result<([Tensor; 2], Option<Tensor>)> {
    let (rows, columns) = rows_and_columns(&a, "A")?;
    let source = a.read("A")?;
    check_float_a(&source)?;
    let device = source.device();
    let codes = Tensor::empty(a.sizes()?, i8::scalar_type(), device)?;
    let row_stats = Tensor::empty(&[numbers(rows)], f32::scalar_type(), device)?;
    let (mut q, mut r) = (codes.write("codes")?, row_stats.write("row_stats")?);
    if let Some(queue) = Queue::of(&source)? {
        let found = Found::new(&queue, columns, threshold > 0.0)?;
        let scratch = queue.workspace(gpu::int8_vectorwise_quant_workspace(columns))?;
        gpu::int8_vectorwise_quant(
            queue.stream(),
            source.floats_on(&queue, "A")?,
            columns,
            magnitude(threshold),
            q.on(&queue)?,
            r.on(&queue)?,
            found.outliers(&queue)?,
            scratch.slice(),
        )?;
        drop((q, r));
        return Ok(([codes, row_stats], found.columns(&queue)?));
    }
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
pub(crate) fn check_float_a(a: &Source<'_>) -> Result<()> {
    with_float!(a.dtype(), "A", T => expect_dtype::<T>(a.place().name, a.dtype()))
}

/// The columns; without a threshold they were not looked for.
fn outlier_cols(threshold: f64, outliers: &[usize]) -> Result<Option<Tensor>> {
    (threshold > 0.0).then(|| column_tensor(outliers)).transpose()
}

fn int8_double_quant(a: Tensor, threshold: f64) -> Result<([Tensor; 4], Option<Tensor>)> {
    let (rows, columns) = rows_and_columns(&a, "A")?;
    let source = a.read("A")?;
    check_float_a(&source)?;
    let device = source.device();
    let row_codes = Tensor::empty(a.sizes()?, i8::scalar_type(), device)?;
    let col_codes = Tensor::empty(a.sizes()?, i8::scalar_type(), device)?;
    let row_stats = Tensor::empty(&[numbers(rows)], f32::scalar_type(), device)?;
    let col_stats = Tensor::empty(&[numbers(columns)], f32::scalar_type(), device)?;
    if let Some(queue) = Queue::of(&source)? {
        let found = Found::new(&queue, columns, threshold > 0.0)?;
        let scratch = queue.workspace(gpu::int8_vectorwise_quant_workspace(columns))?;
        gpu::int8_double_quant(
            queue.stream(),
            source.floats_on(&queue, "A")?,
            columns,
            magnitude(threshold),
            row_codes.write("row_codes")?.on(&queue)?,
            col_codes.write("col_codes")?.on(&queue)?,
            row_stats.write("row_stats")?.on(&queue)?,
            col_stats.write("col_stats")?.on(&queue)?,
            found.outliers(&queue)?,
            scratch.slice(),
        )?;
        return Ok(([row_codes, col_codes, row_stats, col_stats], found.columns(&queue)?));
    }
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
    expect_dtype::<i8>(codes.place().name, codes.dtype())?;
    check_stats(&row_stats, "stats", rows, format_args!("row of A"))?;
    let out = Tensor::empty(a.sizes()?, check_float(dtype)?, codes.device())?;
    if let Some(queue) = Queue::of(&codes)? {
        let (q, r) = (codes.on(&queue)?, row_stats.on(&queue)?);
        let y = out.write("out")?.floats_on(&queue, "dtype")?;
        gpu::int8_vectorwise_dequant(queue.stream(), q, columns, r, y)?;
        return Ok(out);
    }
    let (q, r) = (codes.slice()?, row_stats.slice()?);
    use_torch_threads();
    with_float!(dtype, "dtype", T => {
        let mut out = out.write("out")?;
        Ok(halfbyte::int8_vectorwise_dequant(q, columns, r, out.slice_mut::<T>()?)?)
    })?;
    Ok(out)
}

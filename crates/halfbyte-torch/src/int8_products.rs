//! The products of `LLM.int8()`; see [`int8`](crate::int8).

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::device::Device;
use crate::dtype::{Scalar, ScalarType, with_float};
use crate::error::{Error, Result};
use crate::gpu::Queue;
use crate::gpu::outliers::Found;
use crate::int8::{check_float_a, check_stats, column_tensor, magnitude, rows_and_columns};
use crate::memory::{Destination, Source, expect_dtype};
use crate::ops::check_float;
use crate::products::{expect_shape, product_shape};
use crate::stack::ops;
use crate::tensor::Tensor;
use crate::threads::use_torch_threads;
use crate::weight::numbers;
use halfbyte::{Element, Weight8, f16};
use halfbyte_gpu::ops as gpu;

ops! {
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
    Int8LinearListed = c"int8_linear.listed" => int8_linear_listed(
        a: Tensor, weight: Tensor, scales: Tensor, bias: Option<Tensor>, threshold: f64)
        -> [Tensor; 3];
    Int8LinearGradInput = c"int8_linear_grad_input" => int8_linear_grad_input(
        grad_output: Tensor, weight: Tensor, scales: Tensor) -> Tensor;
}

// ---- arguments ---------------------------------------------------------------------------------

/// A bias `[out_features]` of any floating-point dtype as `dtype`.
pub(crate) fn read_bias<'a>(
    bias: &'a Tensor,
    shape: &[usize],
    dtype: ScalarType,
) -> Result<Source<'a>> {
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
    bias.read_to("bias", dtype)
}

/// Columns as a caller lists them: int64, each in `0..columns`.
fn read_columns(tensor: &Source<'_>, columns: usize) -> Result<Vec<usize>> {
    tensor
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
        expect_dtype::<i8>(codes.place().name, codes.dtype())?;
        check_stats(&scales, what.1, out_features, format_args!("row of {}", what.0))?;
        Ok(Self { codes, scales, out_features, in_features })
    }

    fn weight(&self) -> Result<Weight8<'_>> {
        let (codes, scales) = (self.codes.slice()?, self.scales.slice()?);
        Ok(Weight8::new(codes, scales, self.out_features, self.in_features)?)
    }

    fn weight_on(&self, queue: &Queue) -> Result<gpu::Weight8> {
        let (codes, scales) = (self.codes.on(queue)?, self.scales.on(queue)?);
        Ok(gpu::Weight8::new(codes, scales, self.out_features, self.in_features)?)
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

// ---- products ----------------------------------------------------------------------------------

fn int8_linear_matmul(a: Tensor, b: Tensor) -> Result<Tensor> {
    let (n, k) = matrix(&b, "B")?;
    product_shape(&a, "A", (k, n), |shape, _| {
        let (a, b) = (a.read("A")?, b.read("B")?);
        expect_dtype::<i8>(a.place().name, a.dtype())?;
        expect_dtype::<i8>(b.place().name, b.dtype())?;
        let out = Tensor::empty(shape, i32::scalar_type(), a.device())?;
        sums(&a, &b, k, &mut out.write("out")?)?;
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
        sums(&a, &b, k, &mut out)?;
        out.finish()
    })
}

fn sums(a: &Source<'_>, b: &Source<'_>, k: usize, out: &mut Destination<'_>) -> Result<()> {
    if let Some(queue) = Queue::of(a)? {
        let (a, b, out) = (a.on(&queue)?, b.on(&queue)?, out.on(&queue)?);
        return Ok(gpu::int8_linear_matmul(queue.stream(), a, b, k, out)?);
    }
    let (a, b, out) = (a.slice()?, b.slice()?, out.slice_mut()?);
    use_torch_threads();
    Ok(halfbyte::int8_linear_matmul(a, b, k, out)?)
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
    expect_dtype::<i32>(acc.place().name, acc.dtype())?;
    check_stats(&row_stats, "row_stats", rows, format_args!("row of A"))?;
    check_stats(&col_stats, "col_stats", columns, format_args!("column of A"))?;
    let bias = bias.as_ref().map(|b| read_bias(b, &[columns], f32::scalar_type())).transpose()?;
    let out = Tensor::empty(a.sizes()?, check_float(dtype)?, acc.device())?;
    if let Some(queue) = Queue::of(&acc)? {
        let bias = bias.as_ref().map(|bias| bias.on(&queue)).transpose()?;
        let (r, c) = (row_stats.on(&queue)?, col_stats.on(&queue)?);
        let y = out.write("out")?.floats_on(&queue, "dtype")?;
        gpu::int8_mm_dequant(queue.stream(), acc.on(&queue)?, r, c, bias, y)?;
        return Ok(out);
    }
    let (acc, row_stats, col_stats) = (acc.slice()?, row_stats.slice()?, col_stats.slice()?);
    let bias = bias.as_ref().map(Source::slice).transpose()?;
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
    let weight = Readable::new(&b, &col_stats, ("B", "col_stats"))?;
    let (n, k) = (weight.out_features, weight.in_features);
    product_shape(&a, "A", (k, n), |shape, rows| {
        let (codes, row_stats) = (a.read("A")?, row_stats.read("row_stats")?);
        expect_dtype::<i8>(codes.place().name, codes.dtype())?;
        check_stats(&row_stats, "row_stats", rows, format_args!("row of A"))?;
        let out = Tensor::empty(shape, check_float(dtype)?, codes.device())?;
        let bias = bias.as_ref().map(|b| read_bias(b, &[n], dtype)).transpose()?;
        if let Some(queue) = Queue::of(&codes)? {
            let (codes, row_stats) = (codes.on(&queue)?, row_stats.on(&queue)?);
            let bias = bias.as_ref().map(|b| b.floats_as(&queue, dtype)).transpose()?;
            let y = out.write("out")?.floats_on(&queue, "dtype")?;
            let weight = weight.weight_on(&queue)?;
            gpu::int8_scaled_mm(queue.stream(), codes, row_stats, &weight, bias, y)?;
            return Ok(out);
        }
        let (codes, row_stats, weight) = (codes.slice()?, row_stats.slice()?, weight.weight()?);
        use_torch_threads();
        with_float!(dtype, "dtype", T => {
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
    let weight = Readable::new(&weight, &scales, LINEAR)?;
    let (n, k) = (weight.out_features, weight.in_features);
    let input = a.read("A")?;
    let (dtype, device) = (input.dtype(), input.device());
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
        expect_dtype::<i8>(codes.place().name, codes.dtype())?;
        check_stats(&row_stats, "SCA", rows, format_args!("row of CA"))?;
        let columns = outlier_cols.as_ref().map(|list| list.read("outlier_cols")).transpose()?;
        if let Some(columns) = &columns {
            expect_dtype::<i64>(columns.place().name, columns.dtype())?;
        }
        let listed = columns.as_ref().map_or(0, Source::len);
        let out = Tensor::empty(shape, dtype, device)?;
        let outlier_shape = [numbers(rows), numbers(listed)];
        let sub_a = if columns.is_some() { &outlier_shape[..] } else { &[0] };
        let sub_a = Tensor::empty(sub_a, dtype, device)?;
        let bias = bias.as_ref().map(|b| read_bias(b, &[n], dtype)).transpose()?;
        if let Some(queue) = Queue::of(&input)? {
            let stream = queue.stream();
            let found = Found::new(&queue, k, listed > 0)?;
            let (x, y) = (input.floats_on(&queue, "A")?, out.write("out")?.floats_on(&queue, "A")?);
            let outliers = found.outliers(&queue)?;
            if let (Some(columns), Some(outliers)) = (&columns, outliers) {
                let columns = columns.on(&queue)?;
                let gathered = sub_a.write("subA")?.floats_on(&queue, "A")?;
                gpu::int8_gather_columns(stream, x, k, columns, gathered)?;
                gpu::int8_outliers(stream, columns, k, outliers)?;
            }
            let (codes, row_stats) = (codes.on(&queue)?, row_stats.on(&queue)?);
            let bias = bias.as_ref().map(|b| b.floats_as(&queue, dtype)).transpose()?;
            let weight = weight.weight_on(&queue)?;
            gpu::int8_mixed_scaled_mm(stream, x, codes, row_stats, &weight, outliers, bias, y)?;
            return Ok(([out], Some(sub_a)));
        }
        let (codes, row_stats, weight) = (codes.slice()?, row_stats.slice()?, weight.weight()?);
        let mut outliers =
            columns.as_ref().map_or(Ok(Vec::new()), |columns| read_columns(columns, k))?;
        use_torch_threads();
        with_float!(dtype, "A", T => {
            let input = input.slice::<T>()?;
            gather(input, k, &outliers, sub_a.write("subA")?.slice_mut()?);
            outliers.sort_unstable();
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

/// The outlier columns of a layer's input.
enum Columns {
    Host(Vec<usize>),
    Device(Queue, Found),
}

impl Columns {
    /// int64, as many as there are. On a GPU this waits.
    fn counted(self) -> Result<Option<Tensor>> {
        match self {
            Self::Host(columns) => column_tensor(&columns).map(Some),
            Self::Device(queue, found) => found.columns(&queue),
        }
    }

    /// int32 `[in_features]`, of which the first ones count, and int32 `[1]`, how many.
    fn listed(self, in_features: usize) -> Result<Option<[Tensor; 2]>> {
        let found = match self {
            Self::Device(_, found) => return Ok(found.list()),
            Self::Host(columns) => columns,
        };
        let dtype = i32::scalar_type();
        let columns = Tensor::empty(&[numbers(in_features)], dtype, Device::cpu())?;
        let count = Tensor::empty(&[1], dtype, Device::cpu())?;
        let mut slots = columns.write("outlier_cols")?;
        let slots = slots.slice_mut()?;
        slots.fill(0);
        slots.iter_mut().zip(&found).for_each(|(slot, &column)| *slot = column as i32);
        count.write("outlier count")?.slice_mut()?.fill(found.len() as i32);
        Ok(Some([columns, count]))
    }
}

/// A whole layer, and its outlier columns if they are asked for.
fn linear(
    a: &Tensor,
    weight: &Tensor,
    scales: &Tensor,
    bias: Option<&Tensor>,
    threshold: f64,
    listed: bool,
) -> Result<(Tensor, Option<Columns>)> {
    let weight = Readable::new(weight, scales, LINEAR)?;
    let (n, k) = (weight.out_features, weight.in_features);
    product_shape(a, "A", (k, n), |shape, rows| {
        let input = a.read("A")?;
        let dtype = input.dtype();
        check_float_a(&input)?;
        let out = Tensor::empty(shape, dtype, input.device())?;
        let bias = bias.map(|b| read_bias(b, &[n], dtype)).transpose()?;
        if let Some(queue) = Queue::of(&input)? {
            let found = Found::new(&queue, k, listed)?;
            let bytes = gpu::int8_linear_workspace(rows, k);
            let scratch = queue.workspace(bytes)?;
            let bias = bias.as_ref().map(|b| b.floats_as(&queue, dtype)).transpose()?;
            gpu::int8_linear(
                queue.stream(),
                input.floats_on(&queue, "A")?,
                rows,
                &weight.weight_on(&queue)?,
                magnitude(threshold),
                bias,
                out.write("out")?.floats_on(&queue, "A")?,
                found.outliers(&queue)?,
                scratch.slice(),
            )?;
            return Ok((out, listed.then_some(Columns::Device(queue, found))));
        }
        let weight = weight.weight()?;
        use_torch_threads();
        let outliers = with_float!(dtype, "A", T => {
            let bias = bias.as_ref().map(Source::slice).transpose()?;
            let (x, threshold) = (input.slice::<T>()?, magnitude(threshold));
            let mut out = out.write("out")?;
            Ok(halfbyte::int8_linear(x, rows, &weight, threshold, bias, out.slice_mut()?)?)
        })?;
        Ok((out, listed.then_some(Columns::Host(outliers))))
    })
}

fn int8_linear(
    a: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Option<Tensor>,
    threshold: f64,
) -> Result<Tensor> {
    linear(&a, &weight, &scales, bias.as_ref(), threshold, false).map(|(out, _)| out)
}

fn int8_linear_outliers(
    a: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Option<Tensor>,
    threshold: f64,
) -> Result<[Tensor; 2]> {
    let (out, columns) = linear(&a, &weight, &scales, bias.as_ref(), threshold, true)?;
    let columns = columns.map(Columns::counted).transpose()?.flatten().ok_or_else(not_listed)?;
    Ok([out, columns])
}

fn int8_linear_listed(
    a: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Option<Tensor>,
    threshold: f64,
) -> Result<[Tensor; 3]> {
    let in_features = a.sizes()?.last().map_or(0, |&size| size as usize);
    let (out, columns) = linear(&a, &weight, &scales, bias.as_ref(), threshold, true)?;
    let columns = columns.map(|columns| columns.listed(in_features)).transpose()?.flatten();
    let [columns, count] = columns.ok_or_else(not_listed)?;
    Ok([out, columns, count])
}

fn not_listed() -> Error {
    Error::Torch("the outlier columns were not listed".into())
}

fn int8_linear_grad_input(grad_output: Tensor, weight: Tensor, scales: Tensor) -> Result<Tensor> {
    let weight = Readable::new(&weight, &scales, LINEAR)?;
    let (n, k) = (weight.out_features, weight.in_features);
    product_shape(&grad_output, "grad_output", (n, k), |shape, rows| {
        let grad = grad_output.read("grad_output")?;
        let out = Tensor::empty(shape, grad.dtype(), grad.device())?;
        if let Some(queue) = Queue::of(&grad)? {
            let g = grad.floats_on(&queue, "grad_output")?;
            let x = out.write("out")?.floats_on(&queue, "grad_output")?;
            let weight = weight.weight_on(&queue)?;
            gpu::int8_linear_grad_input(queue.stream(), g, rows, &weight, x)?;
            return Ok(out);
        }
        let weight = weight.weight()?;
        use_torch_threads();
        with_float!(grad.dtype(), "grad_output", T => {
            let (g, mut out) = (grad.slice::<T>()?, out.write("out")?);
            Ok(halfbyte::int8_linear_grad_input(g, rows, &weight, out.slice_mut()?)?)
        })?;
        Ok(out)
    })
}

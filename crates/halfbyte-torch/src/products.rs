//! The ops that multiply by a 4-bit weight: arguments from the dispatcher to the kernels and back.

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::dtype::with_float;
use crate::error::{Error, Result};
use crate::gpu::Queue;
use crate::memory::Source;
use crate::stack::{Ints, Str, group, ops};
use crate::tensor::Tensor;
use crate::threads::use_torch_threads;
use crate::weight::{Readable, State, Weight, elements, matrix, numbers, read_weight};
use halfbyte::Weight4;
use halfbyte_gpu::ops as gpu;

ops! {
    Gemv4bit = c"gemv_4bit" => gemv_4bit(a: Tensor, weight: GemvWeight) -> Tensor;
    Gemv4bitOut = c"gemv_4bit.out" => gemv_4bit_out(
        a: Tensor, weight: GemvWeight, out: Tensor) -> ();
    Gemm4bit = c"gemm_4bit" => gemm_4bit(
        a: Tensor, weight: GemmWeight, bias: Option<Tensor>, nested: GemmNested) -> Tensor;
    Matmul4bit = c"matmul_4bit" => matmul_4bit(
        a: Tensor, weight: Weight, bias: Option<Tensor>, state: State) -> Tensor;
    Matmul4bitOut = c"matmul_4bit.out" => matmul_4bit_out(
        a: Tensor, weight: Weight, bias: Option<Tensor>, state: State, out: Tensor) -> ();
    Matmul4bitGradInput = c"matmul_4bit_grad_input" => matmul_4bit_grad_input(
        grad_output: Tensor, weight: Weight, state: State) -> Tensor;
}

group! {
    /// A weight as upstream's `gemv_4bit` lists it.
    GemvWeight { packed: Tensor, shape: Ints, absmax: Tensor, code: Tensor, blocksize: i64 }
}

group! {
    /// A weight as upstream's `gemm_4bit` lists it.
    GemmWeight { packed: Tensor, shape: Ints, absmax: Tensor, blocksize: i64, quant_type: Str }
}

group! {
    /// Double quantization as upstream's `gemm_4bit` lists it.
    GemmNested { absmax_8bit: Option<Tensor>, code: Option<Tensor>, offset: Option<Tensor> }
}

pub(crate) fn expect_shape(out: &Tensor, shape: &[i64]) -> Result<()> {
    if out.sizes()? == shape {
        return Ok(());
    }
    Err(Error::Value(format!("out must have shape {shape:?}, got {:?}", out.sizes()?)))
}

/// The two products that a quantized weight takes part in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Product {
    /// `A [.., in] · W^T → [.., out]`.
    Forward,
    /// `A [.., out] · W → [.., in]`: the gradient of the other.
    GradInput,
}

/// The shape of the product: the leading dimensions of `a`, which messages call `what`, then the
/// features.
pub(crate) fn product_shape<R>(
    a: &Tensor,
    what: &str,
    (inner, outer): (usize, usize),
    f: impl FnOnce(&[i64], usize) -> Result<R>,
) -> Result<R> {
    let sizes = a.sizes()?;
    let Some((&last, leading)) = sizes.split_last() else {
        return Err(Error::Value(format!("{what} must have at least one dimension, got none")));
    };
    if last as usize != inner {
        return Err(Error::Value(format!(
            "the last dimension of {what} must be {inner}, got {what} of shape {sizes:?}"
        )));
    }
    let rows = elements(leading)?;
    let mut few = [0; 8];
    if sizes.len() <= few.len() {
        few[..leading.len()].copy_from_slice(leading);
        few[leading.len()] = numbers(outer);
        return f(&few[..sizes.len()], rows);
    }
    let mut many = sizes.to_vec();
    *many.last_mut().expect("not empty") = numbers(outer);
    f(&many, rows)
}

/// A checked weight where it is.
enum Operand<'a> {
    Host(Weight4<'a>),
    Device(&'a Queue, gpu::Weight4),
}

/// Multiplies into `out`, or into a tensor of its own, which it returns.
fn product(
    kind: Product,
    a: &Tensor,
    weight: &Readable<'_>,
    shape: &Ints,
    bias: Option<&Tensor>,
    out: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (rows, columns) = matrix(shape)?;
    let what = if kind == Product::Forward { "A" } else { "grad_output" };
    let queue = Queue::at(a.device()?, what.into())?;
    let table;
    let operand = if let Some(queue) = &queue {
        Operand::Device(queue, weight.matrix_on(queue, rows, columns)?)
    } else {
        table = weight.table()?;
        Operand::Host(weight.matrix(&table, rows, columns)?)
    };
    let sides = if kind == Product::Forward { (columns, rows) } else { (rows, columns) };
    let dtype = a.dtype()?;
    product_shape(a, what, sides, |result_shape, n| {
        let fresh = match out {
            Some(out) => {
                expect_shape(out, result_shape)?;
                None
            }
            None => Some(Tensor::empty(result_shape, dtype, a.device()?)?),
        };
        let Some(result) = fresh.as_ref().or(out) else { unreachable!("one of the two is there") };
        let input = a.read("A")?;
        let bias = bias.map(|bias| bias.read("bias")).transpose()?;
        let mut destination = result.write("out")?;
        destination.apart_from(&input)?;
        weight.keep_apart(&destination)?;
        if let Some(bias) = &bias {
            destination.apart_from(bias)?;
        }
        match &operand {
            Operand::Host(operand) => {
                use_torch_threads();
                with_float!(dtype, "A", T => {
                    let (input, output) = (input.slice::<T>()?, destination.slice_mut::<T>()?);
                    match kind {
                        Product::Forward => {
                            let bias = bias.as_ref().map(Source::slice::<T>).transpose()?;
                            halfbyte::matmul_4bit(input, n, operand, bias, output)?;
                        }
                        Product::GradInput => {
                            halfbyte::matmul_4bit_grad_input(input, n, operand, output)?;
                        }
                    }
                    Ok(())
                })?;
            }
            Operand::Device(queue, operand) => {
                let (input, output) =
                    (input.floats_on(queue, "A")?, destination.floats_as(queue, dtype)?);
                let bias = bias.as_ref().map(|bias| bias.floats_as(queue, dtype)).transpose()?;
                let (stream, device) = (queue.stream(), queue.device());
                match kind {
                    Product::Forward => {
                        let bytes =
                            gpu::matmul_4bit_workspace(device, n, rows, columns, input.dtype());
                        let scratch = queue.workspace(bytes)?;
                        gpu::matmul_4bit(stream, input, n, operand, bias, output, scratch.slice())?;
                    }
                    Product::GradInput => {
                        let bytes = gpu::matmul_4bit_grad_input_workspace(
                            device,
                            n,
                            rows,
                            columns,
                            input.dtype(),
                        );
                        let scratch = queue.workspace(bytes)?;
                        gpu::matmul_4bit_grad_input(
                            stream,
                            input,
                            n,
                            operand,
                            output,
                            scratch.slice(),
                        )?;
                    }
                }
            }
        }
        destination.finish()?;
        Ok(fresh)
    })
}

/// As [`product`], for the callers that leave the output to it.
fn fresh_product(
    kind: Product,
    a: &Tensor,
    weight: &Readable<'_>,
    shape: &Ints,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    product(kind, a, weight, shape, bias, None)?
        .ok_or_else(|| Error::Torch("the product was not returned".into()))
}

fn gemv(a: &Tensor, weight: GemvWeight, out: Option<&Tensor>) -> Result<Option<Tensor>> {
    let GemvWeight { packed, shape, absmax, code, blocksize } = weight;
    // The table is given, so no type is named.
    let state = State { code: Some(code), ..State::PLAIN };
    let weight = read_weight(&packed, &absmax, blocksize, None, &state)?;
    product(Product::Forward, a, &weight, &shape, None, out)
}

fn gemv_4bit(a: Tensor, weight: GemvWeight) -> Result<Tensor> {
    gemv(&a, weight, None)?.ok_or_else(|| Error::Torch("the product was not returned".into()))
}

fn gemv_4bit_out(a: Tensor, weight: GemvWeight, out: Tensor) -> Result<()> {
    gemv(&a, weight, Some(&out)).map(drop)
}

fn gemm_4bit(
    a: Tensor,
    weight: GemmWeight,
    bias: Option<Tensor>,
    nested: GemmNested,
) -> Result<Tensor> {
    let GemmWeight { packed, shape, absmax, blocksize, quant_type } = weight;
    // Upstream's convention: with double quantization `absmax` is the second level.
    let (absmax, absmax2) = match nested.absmax_8bit {
        None => (absmax, None),
        Some(first) => (first, Some(absmax)),
    };
    let state = State { absmax2, code2: nested.code, offset: nested.offset, ..State::PLAIN };
    let weight = read_weight(&packed, &absmax, blocksize, Some(&quant_type), &state)?;
    fresh_product(Product::Forward, &a, &weight, &shape, bias.as_ref())
}

fn matmul_4bit(a: Tensor, weight: Weight, bias: Option<Tensor>, state: State) -> Result<Tensor> {
    fresh_product(Product::Forward, &a, &weight.read(&state)?, &weight.shape, bias.as_ref())
}

fn matmul_4bit_out(
    a: Tensor,
    weight: Weight,
    bias: Option<Tensor>,
    state: State,
    out: Tensor,
) -> Result<()> {
    let (readable, bias) = (weight.read(&state)?, bias.as_ref());
    product(Product::Forward, &a, &readable, &weight.shape, bias, Some(&out)).map(drop)
}

fn matmul_4bit_grad_input(grad_output: Tensor, weight: Weight, state: State) -> Result<Tensor> {
    fresh_product(Product::GradInput, &grad_output, &weight.read(&state)?, &weight.shape, None)
}

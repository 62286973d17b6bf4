//! The ops of layers of experts: arguments from the dispatcher to the core crate's slices and back.
//!
//! Schemas, fakes and autograd formulas are in `python/halfbyte/_ops_experts.py`.

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::dtype::with_float;
use crate::error::{Error, Result};
use crate::int8::magnitude;
use crate::int8_products::read_bias;
use crate::memory::Source;
use crate::stack::{Ints, ops};
use crate::tensor::Tensor;
use crate::threads::use_torch_threads;
use crate::weight::{Readable, State, Weight, elements, numbers};
use halfbyte::{Experts4, Experts8, Routing, TokenRows};

ops! {
    ExpertsMatmul4bit = c"experts_matmul_4bit" => experts_matmul_4bit(
        a: Tensor, weight: Weight, expert_ids: Tensor, bias: Option<Tensor>, state: State)
        -> Tensor;
    ExpertsMatmul4bitGradInput = c"experts_matmul_4bit_grad_input" => experts_matmul_4bit_grad_input(
        grad_output: Tensor, weight: Weight, expert_ids: Tensor, shared: bool, state: State)
        -> Tensor;
    ExpertsMatmul8bit = c"experts_matmul_8bit" => experts_matmul_8bit(
        a: Tensor, weight: Tensor, scales: Tensor, expert_ids: Tensor, bias: Option<Tensor>,
        threshold: f64) -> Tensor;
    ExpertsMatmul8bitGradInput = c"experts_matmul_8bit_grad_input" => experts_matmul_8bit_grad_input(
        grad_output: Tensor, weight: Tensor, scales: Tensor, expert_ids: Tensor, shared: bool)
        -> Tensor;
}

/// The most experts that a weight may have: their numbers of rows are counted in memory, which a
/// shape without elements would let grow without bounds.
const MOST_EXPERTS: i64 = 1 << 20;

/// `[experts, out_features, in_features]`.
fn experts_shape(sizes: &[i64], what: &str) -> Result<[usize; 3]> {
    match *sizes {
        [experts, out_features, in_features] if experts <= MOST_EXPERTS => {
            elements(sizes)?;
            Ok([experts as usize, out_features as usize, in_features as usize])
        }
        _ => Err(Error::Value(format!(
            "{what} must be [experts, out_features, in_features] with at most {MOST_EXPERTS} \
             experts, got {sizes:?}"
        ))),
    }
}

/// Where tokens go: `expert_ids` is int64 `[tokens, slots]`.
fn routing(expert_ids: &Tensor, experts: usize) -> Result<Routing> {
    let [tokens, slots] = *expert_ids.sizes()? else {
        return Err(Error::Value(format!(
            "expert_ids must have two dimensions, [tokens, slots], got shape {:?}",
            expert_ids.sizes()?
        )));
    };
    let ids = expert_ids.read("expert_ids")?;
    Ok(Routing::new(ids.slice()?, tokens as usize, slots as usize, experts)?)
}

/// Whether `a` is `[tokens, features]` or `[tokens, slots, features]`.
fn token_rows(a: &Tensor, what: &str, routing: &Routing, features: usize) -> Result<TokenRows> {
    let (tokens, slots) = (numbers(routing.tokens()), numbers(routing.slots()));
    let (one, each) = ([tokens, numbers(features)], [tokens, slots, numbers(features)]);
    match a.sizes()? {
        sizes if *sizes == one => Ok(TokenRows::One),
        sizes if *sizes == each => Ok(TokenRows::Each),
        sizes => Err(Error::Value(format!(
            "{what} must have shape {one:?} or {each:?} (expert_ids has shape {:?}), got {sizes:?}",
            [tokens, slots]
        ))),
    }
}

/// Checks a gradient `[tokens, slots, out_features]`; the shape of what it becomes.
fn grad_shape(
    grad_output: &Tensor,
    routing: &Routing,
    [_, n, k]: [usize; 3],
    shared: bool,
) -> Result<(TokenRows, [i64; 3])> {
    let (tokens, slots) = (numbers(routing.tokens()), numbers(routing.slots()));
    let (expected, got) = ([tokens, slots, numbers(n)], grad_output.sizes()?);
    if *got != expected {
        return Err(Error::Value(format!("grad_output must have shape {expected:?}, got {got:?}")));
    }
    let rows = if shared { TokenRows::One } else { TokenRows::Each };
    Ok((rows, [tokens, slots, numbers(k)]))
}

/// A fresh `[tokens, features]` or `[tokens, slots, features]` in the dtype of `like`.
fn fresh(
    rows: TokenRows,
    [tokens, slots, features]: [i64; 3],
    like: &Source<'_>,
) -> Result<Tensor> {
    match rows {
        TokenRows::One => Tensor::empty(&[tokens, features], like.dtype(), like.device()),
        TokenRows::Each => Tensor::empty(&[tokens, slots, features], like.dtype(), like.device()),
    }
}

// ---- 4-bit weights -----------------------------------------------------------------------------

/// `shape` and the weight in it.
fn weight4<'a>(
    readable: &'a Readable<'_>,
    table: &'a [f32; 16],
    shape: &Ints,
) -> Result<([usize; 3], Experts4<'a>)> {
    let shape = shape.with(|shape| experts_shape(shape, "shape"))?;
    let [experts, out_features, in_features] = shape;
    let blocks = readable.blocksize.over(out_features * in_features).count();
    let padded = experts.saturating_mul(blocks).saturating_mul(readable.blocksize.get());
    let packed = readable.codes(padded)?;
    let scales = readable.scales()?;
    let weight = Experts4::new(packed, scales, table, readable.blocksize, shape)?;
    Ok((shape, weight))
}

fn experts_matmul_4bit(
    a: Tensor,
    weight: Weight,
    expert_ids: Tensor,
    bias: Option<Tensor>,
    state: State,
) -> Result<Tensor> {
    let readable = weight.read(&state)?;
    let table = readable.table()?;
    let ([experts, n, k], operand) = weight4(&readable, &table, &weight.shape)?;
    let routing = routing(&expert_ids, experts)?;
    let rows = token_rows(&a, "A", &routing, k)?;
    let input = a.read("A")?;
    let sizes = [numbers(routing.tokens()), numbers(routing.slots()), numbers(n)];
    let out = fresh(TokenRows::Each, sizes, &input)?;
    use_torch_threads();
    with_float!(input.dtype(), "A", T => {
        let bias = bias.as_ref().map(|b| read_bias(b, &[experts, n], input.dtype())).transpose()?;
        let bias = bias.as_ref().map(Source::slice).transpose()?;
        let (x, mut y) = (input.slice::<T>()?, out.write("out")?);
        Ok(halfbyte::experts_matmul_4bit(x, rows, &routing, &operand, bias, y.slice_mut()?)?)
    })?;
    Ok(out)
}

fn experts_matmul_4bit_grad_input(
    grad_output: Tensor,
    weight: Weight,
    expert_ids: Tensor,
    shared: bool,
    state: State,
) -> Result<Tensor> {
    let readable = weight.read(&state)?;
    let table = readable.table()?;
    let (shape, operand) = weight4(&readable, &table, &weight.shape)?;
    let routing = routing(&expert_ids, shape[0])?;
    let (rows, sizes) = grad_shape(&grad_output, &routing, shape, shared)?;
    let grad = grad_output.read("grad_output")?;
    let out = fresh(rows, sizes, &grad)?;
    use_torch_threads();
    with_float!(grad.dtype(), "grad_output", T => {
        let (g, mut x) = (grad.slice::<T>()?, out.write("out")?);
        let x = x.slice_mut()?;
        Ok(halfbyte::experts_matmul_4bit_grad_input(g, rows, &routing, &operand, x)?)
    })?;
    Ok(out)
}

// ---- 8-bit weights -----------------------------------------------------------------------------

/// The weight `[experts, out_features, in_features]`, its scales `[experts, out_features]`, read.
struct Readable8<'a> {
    codes: Source<'a>,
    scales: Source<'a>,
    shape: [usize; 3],
}

impl<'a> Readable8<'a> {
    fn new(codes: &'a Tensor, scales: &'a Tensor) -> Result<Self> {
        let shape = experts_shape(codes.sizes()?, "the shape of CB")?;
        let (expected, got) = ([numbers(shape[0]), numbers(shape[1])], scales.sizes()?);
        if *got != expected {
            return Err(Error::Value(format!("SCB must have shape {expected:?}, got {got:?}")));
        }
        Ok(Self { codes: codes.read("CB")?, scales: scales.read("SCB")?, shape })
    }

    fn weight(&self) -> Result<Experts8<'_>> {
        Ok(Experts8::new(self.codes.slice()?, self.scales.slice()?, self.shape)?)
    }
}

fn experts_matmul_8bit(
    a: Tensor,
    weight: Tensor,
    scales: Tensor,
    expert_ids: Tensor,
    bias: Option<Tensor>,
    threshold: f64,
) -> Result<Tensor> {
    let readable = Readable8::new(&weight, &scales)?;
    let ([experts, n, k], operand) = (readable.shape, readable.weight()?);
    let routing = routing(&expert_ids, experts)?;
    let rows = token_rows(&a, "A", &routing, k)?;
    let input = a.read("A")?;
    let sizes = [numbers(routing.tokens()), numbers(routing.slots()), numbers(n)];
    let out = fresh(TokenRows::Each, sizes, &input)?;
    use_torch_threads();
    with_float!(input.dtype(), "A", T => {
        let bias = bias.as_ref().map(|b| read_bias(b, &[experts, n], input.dtype())).transpose()?;
        let bias = bias.as_ref().map(Source::slice).transpose()?;
        let (x, mut y) = (input.slice::<T>()?, out.write("out")?);
        let (y, threshold) = (y.slice_mut()?, magnitude(threshold));
        Ok(halfbyte::experts_matmul_8bit(x, rows, &routing, &operand, threshold, bias, y)?)
    })?;
    Ok(out)
}

fn experts_matmul_8bit_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    scales: Tensor,
    expert_ids: Tensor,
    shared: bool,
) -> Result<Tensor> {
    let readable = Readable8::new(&weight, &scales)?;
    let operand = readable.weight()?;
    let routing = routing(&expert_ids, readable.shape[0])?;
    let (rows, sizes) = grad_shape(&grad_output, &routing, readable.shape, shared)?;
    let grad = grad_output.read("grad_output")?;
    let out = fresh(rows, sizes, &grad)?;
    use_torch_threads();
    with_float!(grad.dtype(), "grad_output", T => {
        let (g, mut x) = (grad.slice::<T>()?, out.write("out")?);
        let x = x.slice_mut()?;
        Ok(halfbyte::experts_matmul_8bit_grad_input(g, rows, &routing, &operand, x)?)
    })?;
    Ok(out)
}

//! The ops of layers of experts: arguments from the dispatcher to the kernels and back.
//!
//! Schemas, fakes and autograd formulas are in `python/halfbyte/_ops_experts.py`.

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::dtype::with_float;
use crate::error::{Error, Result};
use crate::gpu::Queue;
use crate::gpu::experts::Routed;
use crate::int8::magnitude;
use crate::int8_products::read_bias;
use crate::memory::Source;
use crate::stack::ops;
use crate::tensor::Tensor;
use crate::threads::use_torch_threads;
use crate::weight::{Readable, State, Weight, elements, numbers};
use halfbyte::{Experts4, Experts8, Routing, TokenRows};
use halfbyte_gpu::ops as gpu;

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

/// `[tokens, slots]`, the shape of `expert_ids`.
fn routes(expert_ids: &Tensor) -> Result<[usize; 2]> {
    match *expert_ids.sizes()? {
        [tokens, slots] => Ok([tokens as usize, slots as usize]),
        ref sizes => Err(Error::Value(format!(
            "expert_ids must have two dimensions, [tokens, slots], got shape {sizes:?}"
        ))),
    }
}

/// Where tokens go, on the CPU: `expert_ids` is int64.
fn routing(expert_ids: &Tensor, [tokens, slots]: [usize; 2], experts: usize) -> Result<Routing> {
    let ids = expert_ids.read("expert_ids")?;
    Ok(Routing::new(ids.slice()?, tokens, slots, experts)?)
}

/// Whether `a` is `[tokens, features]` or `[tokens, slots, features]`.
fn token_rows(a: &Tensor, what: &str, routes: [usize; 2], features: usize) -> Result<TokenRows> {
    let [tokens, slots] = routes.map(numbers);
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
    routes: [usize; 2],
    [_, n, k]: [usize; 3],
    shared: bool,
) -> Result<(TokenRows, [i64; 3])> {
    let [tokens, slots] = routes.map(numbers);
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

/// Elements of all experts, each filled up to whole blocks.
fn padded(readable: &Readable<'_>, [experts, out_features, in_features]: [usize; 3]) -> usize {
    let blocks = readable.blocksize.over(out_features * in_features).count();
    experts.saturating_mul(blocks).saturating_mul(readable.blocksize.get())
}

fn weight4<'a>(
    readable: &'a Readable<'_>,
    table: &'a [f32; 16],
    shape: [usize; 3],
) -> Result<Experts4<'a>> {
    let packed = readable.codes(padded(readable, shape))?;
    Ok(Experts4::new(packed, readable.scales()?, table, readable.blocksize, shape)?)
}

fn weight4_on(readable: &Readable<'_>, queue: &Queue, shape: [usize; 3]) -> Result<gpu::Experts4> {
    let n = padded(readable, shape);
    let (packed, scales) = (readable.codes_on(queue, n)?, readable.scales_on(queue, n)?);
    Ok(gpu::Experts4::new(packed, scales, readable.table_on(queue)?, readable.blocksize, shape)?)
}

fn experts_matmul_4bit(
    a: Tensor,
    weight: Weight,
    expert_ids: Tensor,
    bias: Option<Tensor>,
    state: State,
) -> Result<Tensor> {
    let readable = weight.read(&state)?;
    let shape = weight.shape.with(|shape| experts_shape(shape, "shape"))?;
    let ([experts, n, k], routes) = (shape, routes(&expert_ids)?);
    let rows = token_rows(&a, "A", routes, k)?;
    let input = a.read("A")?;
    let dtype = input.dtype();
    let [tokens, slots] = routes.map(numbers);
    let out = fresh(TokenRows::Each, [tokens, slots, numbers(n)], &input)?;
    let bias = bias.as_ref().map(|b| read_bias(b, &[experts, n], dtype)).transpose()?;
    if let Some(queue) = &Queue::of(&input)? {
        let operand = weight4_on(&readable, queue, shape)?;
        let (x, y) = (input.floats_on(queue, "A")?, out.write("out")?.floats_on(queue, "A")?);
        let bias = bias.as_ref().map(|bias| bias.floats_as(queue, dtype)).transpose()?;
        let ids = expert_ids.read("expert_ids")?;
        let routed = Routed::new(queue, &ids, routes, experts)?;
        let (stream, routing) = (queue.stream(), routed.routing());
        gpu::experts_matmul_4bit(stream, x, rows, routing, &operand, bias, y)?;
        return Ok(out);
    }
    let table = readable.table()?;
    let operand = weight4(&readable, &table, shape)?;
    let routing = routing(&expert_ids, routes, experts)?;
    use_torch_threads();
    with_float!(dtype, "A", T => {
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
    let shape = weight.shape.with(|shape| experts_shape(shape, "shape"))?;
    let routes = routes(&expert_ids)?;
    let (rows, sizes) = grad_shape(&grad_output, routes, shape, shared)?;
    let grad = grad_output.read("grad_output")?;
    let out = fresh(rows, sizes, &grad)?;
    if let Some(queue) = &Queue::of(&grad)? {
        let operand = weight4_on(&readable, queue, shape)?;
        let g = grad.floats_on(queue, "grad_output")?;
        let x = out.write("out")?.floats_on(queue, "grad_output")?;
        let ids = expert_ids.read("expert_ids")?;
        let routed = Routed::new(queue, &ids, routes, shape[0])?;
        let routing = routed.routing();
        let bytes = gpu::experts_matmul_4bit_grad_input_workspace(routing, rows, shape[2]);
        let scratch = queue.workspace(bytes)?;
        gpu::experts_matmul_4bit_grad_input(
            queue.stream(),
            g,
            rows,
            routed.ids(),
            routing,
            &operand,
            x,
            scratch.slice(),
        )?;
        return Ok(out);
    }
    let table = readable.table()?;
    let operand = weight4(&readable, &table, shape)?;
    let routing = routing(&expert_ids, routes, shape[0])?;
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

    fn weight_on(&self, queue: &Queue) -> Result<gpu::Experts8> {
        Ok(gpu::Experts8::new(self.codes.on(queue)?, self.scales.on(queue)?, self.shape)?)
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
    let ([experts, n, k], routes) = (readable.shape, routes(&expert_ids)?);
    let rows = token_rows(&a, "A", routes, k)?;
    let input = a.read("A")?;
    let dtype = input.dtype();
    let [tokens, slots] = routes.map(numbers);
    let out = fresh(TokenRows::Each, [tokens, slots, numbers(n)], &input)?;
    let bias = bias.as_ref().map(|b| read_bias(b, &[experts, n], dtype)).transpose()?;
    let threshold = magnitude(threshold);
    if let Some(queue) = &Queue::of(&input)? {
        let operand = readable.weight_on(queue)?;
        let (x, y) = (input.floats_on(queue, "A")?, out.write("out")?.floats_on(queue, "A")?);
        let bias = bias.as_ref().map(|bias| bias.floats_as(queue, dtype)).transpose()?;
        let ids = expert_ids.read("expert_ids")?;
        let routed = Routed::new(queue, &ids, routes, experts)?;
        let routing = routed.routing();
        let bytes = gpu::experts_matmul_8bit_workspace(routing, rows, k, threshold);
        let scratch = queue.workspace(bytes)?;
        gpu::experts_matmul_8bit(
            queue.stream(),
            x,
            rows,
            routed.ids(),
            routing,
            &operand,
            threshold,
            bias,
            y,
            scratch.slice(),
        )?;
        return Ok(out);
    }
    let operand = readable.weight()?;
    let routing = routing(&expert_ids, routes, experts)?;
    use_torch_threads();
    with_float!(dtype, "A", T => {
        let bias = bias.as_ref().map(Source::slice).transpose()?;
        let (x, mut y) = (input.slice::<T>()?, out.write("out")?);
        let y = y.slice_mut()?;
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
    let routes = routes(&expert_ids)?;
    let (rows, sizes) = grad_shape(&grad_output, routes, readable.shape, shared)?;
    let grad = grad_output.read("grad_output")?;
    let out = fresh(rows, sizes, &grad)?;
    if let Some(queue) = &Queue::of(&grad)? {
        let operand = readable.weight_on(queue)?;
        let g = grad.floats_on(queue, "grad_output")?;
        let x = out.write("out")?.floats_on(queue, "grad_output")?;
        let ids = expert_ids.read("expert_ids")?;
        let [experts, _, k] = readable.shape;
        let routed = Routed::new(queue, &ids, routes, experts)?;
        let routing = routed.routing();
        let bytes = gpu::experts_matmul_8bit_grad_input_workspace(routing, rows, k);
        let scratch = queue.workspace(bytes)?;
        gpu::experts_matmul_8bit_grad_input(
            queue.stream(),
            g,
            rows,
            routed.ids(),
            routing,
            &operand,
            x,
            scratch.slice(),
        )?;
        return Ok(out);
    }
    let operand = readable.weight()?;
    let routing = routing(&expert_ids, routes, readable.shape[0])?;
    use_torch_threads();
    with_float!(grad.dtype(), "grad_output", T => {
        let (g, mut x) = (grad.slice::<T>()?, out.write("out")?);
        let x = x.slice_mut()?;
        Ok(halfbyte::experts_matmul_8bit_grad_input(g, rows, &routing, &operand, x)?)
    })?;
    Ok(out)
}

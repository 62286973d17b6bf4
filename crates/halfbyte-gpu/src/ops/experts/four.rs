//! `experts_matmul_4bit`: activations times the 4-bit weights of their experts, and the gradient of
//! the activations.
//!
//! The ways are those of [`matmul_4bit`](super::super::matmul_4bit), with its bounds:
//!
//! | way | when | a tile |
//! |---|---|---|
//! | few rows | forward, up to 8 rows, or up to 2 for each expert (16 without tensor cores) | 4 rows |
//! | tensor cores | CUDA; float16 from 7.5 on, bfloat16 from 8.0 on; `in_features` a multiple of 32, `out_features` even | 16, 64 or 128 rows |
//! | plain | everything else | 64 rows |
//!
//! The way depends on the sizes, the dtype and the device, never on the routes. Sums are not split.

use super::{Routing, sum_slots};
use crate::error::{Result, check_dtype, check_len};
use crate::ops::matmul_4bit::plan::{Machine, Product, STEP, Shape};
use crate::ops::weight::{Scales, Table4, by_dtype, shift};
use crate::{Arg, Device, DeviceSlice, Floats, Grid, Stream, sources};
use halfbyte::{BlockSize, TokenRows};

/// 4-bit weights of several experts on the device, `[experts, out_features, in_features]`.
///
/// Each expert has its own blocks: they run over its flattened matrix, which is filled up with
/// zeros to whole blocks if it must be. The experts follow each other, in `packed` as in the
/// scales. (Where `out_features * in_features` is a multiple of the block size, this is the layout
/// of the whole tensor quantized at once.)
#[derive(Clone, Copy, Debug)]
pub struct Experts4 {
    packed: DeviceSlice<u8>,
    scales: Scales,
    table: Table4,
    blocksize: BlockSize,
    experts: usize,
    out_features: usize,
    in_features: usize,
}

impl Experts4 {
    /// Ties the parts together. Nested scales are blocks of the list of all experts' scales.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) unless `scales` holds
    /// `blocks = ceil(out_features * in_features / blocksize)` entries for each expert, `packed`
    /// `blocks * blocksize / 2` bytes, and a table in memory 16 values.
    pub fn new(
        packed: DeviceSlice<u8>,
        scales: Scales,
        table: Table4,
        blocksize: BlockSize,
        [experts, out_features, in_features]: [usize; 3],
    ) -> Result<Self> {
        let each = blocksize.over(out_features.saturating_mul(in_features)).count();
        let padded = each.saturating_mul(blocksize.get());
        let all = blocksize.over(experts.saturating_mul(padded));
        check_len("packed", all.packed_len(), packed.len())?;
        scales.check(all)?;
        table.check()?;
        Ok(Self { packed, scales, table, blocksize, experts, out_features, in_features })
    }

    /// Number of experts.
    #[must_use]
    pub const fn experts(&self) -> usize {
        self.experts
    }

    /// Rows of each expert's weight.
    #[must_use]
    pub const fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of each expert's weight.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.in_features
    }
}

/// Each row of `input` times the weight of its expert, plus the expert's bias, accumulated in
/// float32 and rounded once to the dtype of `input`:
/// [`halfbyte::experts_matmul_4bit`] without waiting for the routes.
///
/// - `input`: `[tokens, in_features]` or `[tokens, slots, in_features]`, as `token_rows` says.
/// - `routing`: as [`route`](super::route) left it.
/// - `bias`: `[experts, out_features]`, if any, of the same dtype.
/// - `out`: `[tokens, slots, out_features]`, of the same dtype. Rows without an expert become
///   zero, rows whose id is out of range NaN.
///
/// One launch. No workspace.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length, or `routing` another
/// number of experts; [`Error::DType`](crate::Error::DType) when `bias` or `out` has another
/// dtype; else what loading the kernel or the driver reports.
pub fn experts_matmul_4bit(
    stream: &Stream,
    input: Floats,
    token_rows: TokenRows,
    routing: &Routing,
    weight: &Experts4,
    bias: Option<Floats>,
    out: Floats,
) -> Result<()> {
    let (n, k) = (weight.out_features, weight.in_features);
    check_len("weight", routing.experts(), weight.experts)?;
    check_len("input", routing.count(token_rows).saturating_mul(k), input.len())?;
    check_len("out", routing.rows().saturating_mul(n), out.len())?;
    check_dtype("out", input.dtype(), out.dtype())?;
    if let Some(bias) = bias {
        check_len("bias", weight.experts.saturating_mul(n), bias.len())?;
        check_dtype("bias", input.dtype(), bias.dtype())?;
    }
    let call = Call { input, sharing: routing.sharing(token_rows), routing, weight, bias };
    call.launch(stream, false, Out::Rounded(out))
}

/// The gradient of [`experts_matmul_4bit`] for its input: each row of `grad_output` times the
/// transpose of its expert's weight, accumulated in float32. Under [`TokenRows::One`] the rows of
/// a token are summed, in float32 too and by ascending slots. Rounded once to the dtype of
/// `grad_output`.
///
/// - `grad_output`: `[tokens, slots, out_features]`. Rows without an expert are not read.
/// - `expert_ids`: `[tokens, slots]`, of which `routing` was made.
/// - `out`: `[tokens, in_features]` or `[tokens, slots, in_features]`, as `token_rows` says, of the
///   same dtype. Rows without an expert count as zero, rows whose id is out of range as NaN.
/// - `workspace`: at least [`experts_matmul_4bit_grad_input_workspace`] bytes, of any content.
///
/// One launch, or two when rows are summed.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length, `routing` another
/// number of experts, or the workspace is too short; [`Error::DType`](crate::Error::DType) when
/// `out` has another dtype; else what loading the kernel or the driver reports.
#[allow(clippy::too_many_arguments, reason = "the op's arguments, and what the device needs")]
pub fn experts_matmul_4bit_grad_input(
    stream: &Stream,
    grad_output: Floats,
    token_rows: TokenRows,
    expert_ids: DeviceSlice<i64>,
    routing: &Routing,
    weight: &Experts4,
    out: Floats,
    mut workspace: DeviceSlice<u8>,
) -> Result<()> {
    let (n, k) = (weight.out_features, weight.in_features);
    check_len("weight", routing.experts(), weight.experts)?;
    check_len("expert_ids", routing.rows(), expert_ids.len())?;
    check_len("grad_output", routing.rows().saturating_mul(n), grad_output.len())?;
    check_len("out", routing.count(token_rows).saturating_mul(k), out.len())?;
    check_dtype("out", grad_output.dtype(), out.dtype())?;
    let call = Call { input: grad_output, sharing: 1, routing, weight, bias: None };
    if routing.sharing(token_rows) == 1 {
        return call.launch(stream, true, Out::Rounded(out));
    }
    let sums = workspace.carve("workspace", routing.rows().saturating_mul(k))?;
    call.launch(stream, true, Out::Sums(sums))?;
    sum_slots(stream, sums, expert_ids, routing, k, out)
}

/// Bytes of workspace that [`experts_matmul_4bit_grad_input`] takes. Zero unless rows are summed.
#[must_use]
pub fn experts_matmul_4bit_grad_input_workspace(
    routing: &Routing,
    token_rows: TokenRows,
    in_features: usize,
) -> usize {
    if routing.sharing(token_rows) == 1 {
        return 0;
    }
    DeviceSlice::<u8>::carved_bytes::<f32>(routing.rows().saturating_mul(in_features))
}

/// Where results go.
#[derive(Clone, Copy)]
enum Out {
    /// Rounded to the dtype of the input.
    Rounded(Floats),
    /// As float32, to be summed. Rows without an expert are not written.
    Sums(DeviceSlice<f32>),
}

impl Out {
    const fn is_empty(self) -> bool {
        match self {
            Self::Rounded(out) => out.is_empty(),
            Self::Sums(sums) => sums.is_empty(),
        }
    }

    /// `out` and `sums` of the kernels.
    fn args(self) -> [Arg<'static>; 2] {
        match self {
            Self::Rounded(out) => [out.into(), Arg::NULL],
            Self::Sums(sums) => [Arg::NULL, sums.into()],
        }
    }
}

/// A checked call of either product.
struct Call<'a> {
    input: Floats,
    /// Rows of the result that read one row of the input.
    sharing: usize,
    routing: &'a Routing,
    weight: &'a Experts4,
    bias: Option<Floats>,
}

impl Call<'_> {
    fn launch(&self, stream: &Stream, grad: bool, out: Out) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let product = self.product(grad);
        let shape = self.shape(stream.device(), &product).filter(|_| match out {
            Out::Rounded(out) => out.pointer().is_multiple_of(4),
            Out::Sums(_) => true,
        });
        match (out, shape) {
            (Out::Rounded(out), shape) if !grad && self.few(shape.is_some()) => {
                self.few_rows(stream, out)
            }
            (_, Some(shape)) => self.tensor_cores(stream, &product, shape, out),
            (_, None) => self.plain(stream, &product, out),
        }
    }

    /// The product of one expert, of those that could have rows.
    fn product(&self, grad: bool) -> Product {
        let rows = self.routing.rows();
        let each = rows.div_ceil(self.weight.experts.min(rows).max(1));
        Product::new(grad, self.weight.out_features, self.weight.in_features, each)
    }

    fn shape(&self, device: &Device, product: &Product) -> Option<&'static Shape> {
        Shape::routed(&Machine::of(device), product, self.input.dtype())
    }

    /// Whether experts have so few rows that reading their weights takes the time.
    fn few(&self, tensor_cores: bool) -> bool {
        let (rows, each) = (self.routing.rows(), if tensor_cores { 2 } else { 16 });
        u32::try_from(self.weight.in_features).is_ok()
            && (rows <= 8 || rows <= each * self.weight.experts)
    }

    fn few_rows(&self, stream: &Stream, out: Floats) -> Result<()> {
        /// As in `kernels/experts_matvec_4bit.cu`.
        const ROWS: usize = 4;
        const FEATURES: usize = 4;
        let (weight, routing) = (self.weight, self.routing);
        let [absmax, absmax8, code2, absmax2, offset, shift2] = weight.scales.args();
        let [kind, table] = weight.table.args();
        let groups = routing.tiles(ROWS).saturating_mul(weight.out_features.div_ceil(FEATURES));
        stream.launch(
            &sources::EXPERTS_MATVEC_4BIT,
            by_dtype!(self.input.dtype(), "experts_matvec_4bit"),
            Grid::new(groups, 128),
            &[
                self.input.into(),
                weight.packed.into(),
                absmax,
                absmax8,
                code2,
                absmax2,
                offset,
                shift2,
                kind,
                table,
                routing.order().into(),
                routing.starts().into(),
                (weight.experts as u32).into(),
                (self.sharing as u32).into(),
                self.bias.into(),
                out.into(),
                weight.out_features.into(),
                (weight.in_features as u32).into(),
                shift(weight.blocksize).into(),
            ],
        )
    }

    fn tensor_cores(
        &self,
        stream: &Stream,
        product: &Product,
        shape: &Shape,
        out: Out,
    ) -> Result<()> {
        let (weight, routing) = (self.weight, self.routing);
        let [absmax, absmax8, code2, absmax2, offset, shift2] = weight.scales.args();
        let [kind, table] = weight.table.args();
        let [out, sums] = out.args();
        let tiles = routing.tiles(shape.rows());
        let across = product.columns.div_ceil(shape.columns());
        let source = if product.grad {
            &sources::EXPERTS_MATMUL_4BIT_GRAD
        } else {
            &sources::EXPERTS_MATMUL_4BIT
        };
        stream.launch(
            source,
            shape.routed_kernel(product.grad, self.input.dtype()),
            Grid::new(tiles.saturating_mul(across), shape.threads())
                .shared(shape.routed_shared_bytes()),
            &[
                weight.packed.into(),
                absmax,
                absmax8,
                code2,
                absmax2,
                offset,
                shift2,
                kind,
                table,
                shift(weight.blocksize).into(),
                routing.order().into(),
                routing.starts().into(),
                (weight.experts as u32).into(),
                (tiles as u32).into(),
                (self.sharing as u32).into(),
                self.input.into(),
                self.bias.into(),
                out,
                sums,
                (weight.out_features as u32).into(),
                (weight.in_features as u32).into(),
                (product.depth.div_ceil(STEP) as u32).into(),
                product.flags(weight.packed, self.input).into(),
            ],
        )
    }

    fn plain(&self, stream: &Stream, product: &Product, out: Out) -> Result<()> {
        const TILE: usize = 64;
        let (weight, routing) = (self.weight, self.routing);
        let [absmax, absmax8, code2, absmax2, offset, shift2] = weight.scales.args();
        let [kind, table] = weight.table.args();
        let [out, sums] = out.args();
        let tiles = routing.tiles(TILE);
        stream.launch(
            &sources::EXPERTS_MATMUL_4BIT_PLAIN,
            by_dtype!(self.input.dtype(), "experts_matmul_4bit_plain"),
            Grid::new(tiles.saturating_mul(product.columns.div_ceil(TILE)), 256),
            &[
                weight.packed.into(),
                absmax,
                absmax8,
                code2,
                absmax2,
                offset,
                shift2,
                kind,
                table,
                shift(weight.blocksize).into(),
                routing.order().into(),
                routing.starts().into(),
                (weight.experts as u32).into(),
                (tiles as u32).into(),
                (self.sharing as u32).into(),
                self.input.into(),
                self.bias.into(),
                out,
                sums,
                weight.out_features.into(),
                weight.in_features.into(),
                u32::from(product.grad).into(),
            ],
        )
    }
}

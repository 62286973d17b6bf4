//! `matmul_4bit`: activations times a 4-bit weight, and the gradient of the activations. The
//! dequantized weight is never stored.
//!
//! Three ways lead to the product:
//!
//! | way | when | products | the weight's elements |
//! |---|---|---|---|
//! | [`matvec_4bit`] | forward, up to 4 rows; up to 8 where tensor cores cannot or would take longer | float32 | not rounded |
//! | tensor cores | CUDA; float16 from 7.5 on, bfloat16 from 8.0 on; `in_features` a multiple of 32 | exact, summed in float32 | rounded to the dtype, as [`dequantize_4bit`](super::dequantize_4bit) gives them |
//! | plain | everything else: float32, other runtimes, odd shapes, an `out` that is not aligned to 4 bytes | float32 | not rounded |
//!
//! The distance of a result from the exact one (float64 over the decoded weight) is at most
//! `u |exact| + (v + 2^-22 depth) sum |a w|`, where `u` is the rounding of the result: 2^-8 for
//! bfloat16, 2^-11 for float16, 2^-24 for float32; `v` is the rounding of the weight: `u` on tensor
//! cores, else zero; `depth` is the length of the sum. For float16 on tensor cores 2^-25 `sum |a|`
//! is added (its subnormal weights), and a weight beyond 65504 is infinite there. All ways give the
//! same bits in every run on one kind of device.

pub(super) mod plan;

use super::matvec_4bit::{MATVEC_4BIT_MAX_ROWS, matvec_4bit};
use super::weight::{Weight4, by_dtype, shift};
use crate::error::{Result, check_dtype, check_len};
use crate::{Arg, Device, DeviceSlice, Floats, Grid, Stream, sources};
use halfbyte::DType;
use plan::{Machine, Plan, Product};

/// `out = input · dequantize(weight)^T + bias`, accumulated in float32, rounded once to the dtype
/// of `input`.
///
/// - `input`: `[rows, in_features]`, row-major.
/// - `bias`: `[out_features]`, if any, of the same dtype.
/// - `out`: `[rows, out_features]`, of the same dtype.
/// - `workspace`: at least [`matmul_4bit_workspace`] bytes, of any content.
///
/// One launch, or two when the sums are split.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length, or the workspace is
/// too short; [`Error::DType`](crate::Error::DType) when `bias` or `out` has another dtype; else what
/// loading the kernel or the driver reports.
pub fn matmul_4bit(
    stream: &Stream,
    input: Floats,
    rows: usize,
    weight: &Weight4,
    bias: Option<Floats>,
    out: Floats,
    workspace: DeviceSlice<u8>,
) -> Result<()> {
    if let Some(bias) = bias {
        check_len("bias", weight.out_features(), bias.len())?;
        check_dtype("bias", input.dtype(), bias.dtype())?;
    }
    let product = Product::new(false, weight.out_features(), weight.in_features(), rows);
    product.check("input", input, out)?;
    let odd_address = !out.pointer().is_multiple_of(4) && rows <= MATVEC_4BIT_MAX_ROWS;
    if odd_address || product.is_for_matvec(stream.device(), input.dtype()) {
        return matvec_4bit(stream, input, rows, weight, bias, out);
    }
    product.launch(stream, input, weight, bias, out, workspace)
}

/// `out = grad_output · dequantize(weight)`: the gradient of [`matmul_4bit`] for its input.
///
/// - `grad_output`: `[rows, out_features]`, row-major.
/// - `out`: `[rows, in_features]`, of the same dtype.
/// - `workspace`: at least [`matmul_4bit_grad_input_workspace`] bytes, of any content.
///
/// # Errors
/// As [`matmul_4bit`].
pub fn matmul_4bit_grad_input(
    stream: &Stream,
    grad_output: Floats,
    rows: usize,
    weight: &Weight4,
    out: Floats,
    workspace: DeviceSlice<u8>,
) -> Result<()> {
    let product = Product::new(true, weight.out_features(), weight.in_features(), rows);
    product.check("grad_output", grad_output, out)?;
    product.launch(stream, grad_output, weight, None, out, workspace)
}

/// Bytes of workspace that [`matmul_4bit`] takes for `rows` rows of `dtype` against a weight
/// `[out_features, in_features]` on `device`. Zero when the sums need not be split.
#[must_use]
pub fn matmul_4bit_workspace(
    device: &Device,
    rows: usize,
    out_features: usize,
    in_features: usize,
    dtype: DType,
) -> usize {
    let product = Product::new(false, out_features, in_features, rows);
    if product.is_for_matvec(device, dtype) { 0 } else { product.workspace(device, dtype) }
}

/// Bytes of workspace that [`matmul_4bit_grad_input`] takes for `rows` rows of `dtype` against a
/// weight `[out_features, in_features]` on `device`. Zero when the sums need not be split.
#[must_use]
pub fn matmul_4bit_grad_input_workspace(
    device: &Device,
    rows: usize,
    out_features: usize,
    in_features: usize,
    dtype: DType,
) -> usize {
    Product::new(true, out_features, in_features, rows).workspace(device, dtype)
}

impl Product {
    fn check(&self, what: &'static str, input: Floats, out: Floats) -> Result<()> {
        check_len(what, self.rows.saturating_mul(self.depth), input.len())?;
        check_len("out", self.rows.saturating_mul(self.columns), out.len())?;
        check_dtype("out", input.dtype(), out.dtype())
    }

    /// How the product goes on tensor cores; `None` when the plain tile has to do it.
    fn plan(&self, device: &Device, dtype: DType) -> Option<Plan> {
        Plan::best(&Machine::of(device), self, dtype)
    }

    /// Whether the forward product is one for [`matvec_4bit`]: up to four rows, and up to eight
    /// where tensor cores cannot do it or are estimated to take longer.
    fn is_for_matvec(&self, device: &Device, dtype: DType) -> bool {
        match self.rows {
            0..=4 => true,
            5..=MATVEC_4BIT_MAX_ROWS => self
                .plan(device, dtype)
                .is_none_or(|plan| !plan.beats_matvec(&Machine::of(device), self)),
            _ => false,
        }
    }

    fn workspace(&self, device: &Device, dtype: DType) -> usize {
        let sums = self.plan(device, dtype).map_or(0, |plan| plan.sums(self));
        if sums == 0 { 0 } else { DeviceSlice::<u8>::carved_bytes::<f32>(sums) }
    }

    /// How the kernels of `kernels/matmul_4bit.h` may copy.
    pub(super) fn flags(&self, packed: DeviceSlice<u8>, input: Floats) -> u32 {
        const PACKED_IS_ALIGNED: u32 = 1;
        const INPUT_IS_ALIGNED: u32 = 2;
        let mut flags = 0;
        if packed.pointer().is_multiple_of(16) {
            flags |= PACKED_IS_ALIGNED;
        }
        if input.pointer().is_multiple_of(16) && self.depth.is_multiple_of(8) {
            flags |= INPUT_IS_ALIGNED;
        }
        flags
    }

    fn launch(
        &self,
        stream: &Stream,
        input: Floats,
        weight: &Weight4,
        bias: Option<Floats>,
        out: Floats,
        workspace: DeviceSlice<u8>,
    ) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        match self.plan(stream.device(), input.dtype()) {
            Some(plan) if out.pointer().is_multiple_of(4) => {
                self.tensor_cores(stream, &plan, input, weight, bias, out, workspace)
            }
            _ => self.plain(stream, input, weight, bias, out),
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the op's arguments and the plan")]
    fn tensor_cores(
        &self,
        stream: &Stream,
        plan: &Plan,
        input: Floats,
        weight: &Weight4,
        bias: Option<Floats>,
        out: Floats,
        mut workspace: DeviceSlice<u8>,
    ) -> Result<()> {
        let bias = Arg::from(bias);
        let sums = plan.sums(self);
        let partials = if sums == 0 {
            DeviceSlice::<f32>::empty()
        } else {
            workspace.carve::<f32>("workspace", sums)?
        };
        let flags = self.flags(weight.packed(), input);
        let shape = plan.shape;
        let source = if self.grad { &sources::MATMUL_4BIT_GRAD } else { &sources::MATMUL_4BIT };
        let grid = Grid::new(shape.tiles(self), shape.threads())
            .y(plan.splits as u32)
            .shared(shape.shared_bytes());
        let [absmax, absmax8, code2, absmax2, offset, shift2] = weight.scales().args();
        let [kind, table] = weight.table().args();
        stream.launch(
            source,
            shape.kernel(self.grad, input.dtype()),
            grid,
            &[
                weight.packed().into(),
                absmax,
                absmax8,
                code2,
                absmax2,
                offset,
                shift2,
                kind,
                table,
                shift(weight.blocksize()).into(),
                input.into(),
                if sums == 0 { bias } else { Arg::NULL },
                out.into(),
                partials.into(),
                self.rows.into(),
                Arg::U32(weight.out_features() as u32),
                Arg::U32(weight.in_features() as u32),
                Arg::U32(plan.steps as u32),
                Arg::U32(flags),
            ],
        )?;
        if sums == 0 {
            return Ok(());
        }
        stream.launch(
            &sources::MATMUL_4BIT_PLAIN,
            by_dtype!(out.dtype(), "matmul_4bit_sum"),
            Grid::new(self.columns.div_ceil(256), 256).y(self.rows.min(65_535) as u32),
            &[
                partials.into(),
                Arg::U32(plan.splits as u32),
                bias,
                out.into(),
                self.rows.into(),
                self.columns.into(),
            ],
        )
    }

    fn plain(
        &self,
        stream: &Stream,
        input: Floats,
        weight: &Weight4,
        bias: Option<Floats>,
        out: Floats,
    ) -> Result<()> {
        const TILE: usize = 64;
        let [absmax, absmax8, code2, absmax2, offset, shift2] = weight.scales().args();
        let [kind, table] = weight.table().args();
        stream.launch(
            &sources::MATMUL_4BIT_PLAIN,
            by_dtype!(input.dtype(), "matmul_4bit_plain"),
            Grid::new(self.rows.div_ceil(TILE).saturating_mul(self.columns.div_ceil(TILE)), 256),
            &[
                weight.packed().into(),
                absmax,
                absmax8,
                code2,
                absmax2,
                offset,
                shift2,
                kind,
                table,
                shift(weight.blocksize()).into(),
                input.into(),
                bias.into(),
                out.into(),
                self.rows.into(),
                weight.out_features().into(),
                weight.in_features().into(),
                Arg::U32(u32::from(self.grad)),
            ],
        )
    }
}

//! `experts_matmul_8bit`: activations times the 8-bit weights of their experts under the rule of
//! [`int8_linear`](super::super::int8_linear), and the gradient of the activations.
//!
//! The ways are those of `LLM.int8()`, all with the same results in the forward:
//!
//! | way | when | a tile |
//! |---|---|---|
//! | few rows | forward, up to 8 rows for each expert | 8 rows |
//! | tensor cores | CUDA; the gradient in float16, and in bfloat16 from 8.0 on | 32, 64 or 128 rows |
//! | plain | everything else | 64 rows |
//!
//! The way depends on the sizes, the dtype and the device, never on the routes.

use super::{Routing, sum_slots};
use crate::error::{Result, check_dtype, check_len};
use crate::ops::int8::grad;
use crate::ops::int8::product::{self, FEW, FEW_ROWS, TILE_SHARED, TILE_THREADS, stride};
use crate::ops::int8::rows::{THREADS, clear, words};
use crate::ops::int8::{check_depth, groups};
use crate::ops::weight::by_dtype;
use crate::{Arg, DeviceSlice, Floats, Grid, Runtime, Source, Stream, sources};
use halfbyte::TokenRows;
use std::ffi::CStr;

/// 8-bit weights of several experts on the device, `[experts, out_features, in_features]`: int8
/// codes and one float32 scale (`SCB`) for each row of each expert.
#[derive(Clone, Copy, Debug)]
pub struct Experts8 {
    codes: DeviceSlice<i8>,
    scales: DeviceSlice<f32>,
    experts: usize,
    out_features: usize,
    in_features: usize,
}

impl Experts8 {
    /// Ties the parts together.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) unless `codes` holds
    /// `experts * out_features * in_features` values and `scales` `experts * out_features`;
    /// [`Error::Core`](crate::Error::Core) when `in_features` passes
    /// [`INT8_MAX_DEPTH`](halfbyte::INT8_MAX_DEPTH).
    pub fn new(
        codes: DeviceSlice<i8>,
        scales: DeviceSlice<f32>,
        [experts, out_features, in_features]: [usize; 3],
    ) -> Result<Self> {
        let rows = experts.saturating_mul(out_features);
        check_len("codes", rows.saturating_mul(in_features), codes.len())?;
        check_len("scales", rows, scales.len())?;
        check_depth(in_features)?;
        Ok(Self { codes, scales, experts, out_features, in_features })
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

/// Each row of `input` times the weight of its expert under the rule of
/// [`int8_linear`](super::super::int8_linear), plus the expert's bias:
/// [`halfbyte::experts_matmul_8bit`] without waiting for the routes, bit for bit. (A NaN stays a
/// NaN; its payload may differ.)
///
/// Outlier columns are those of all rows that an expert has. Codes are made once for each row of
/// `input`, of all columns; the product takes out again, exactly, what outliers of its expert have
/// added to the int32 sums.
///
/// - `input`: `[tokens, in_features]` or `[tokens, slots, in_features]`, as `token_rows` says.
/// - `expert_ids`: `[tokens, slots]`, of which `routing` was made.
/// - `threshold`: magnitude from which on an activation counts as an outlier; 0 for none.
/// - `bias`: `[experts, out_features]`, if any, of the same dtype.
/// - `out`: `[tokens, slots, out_features]`, of the same dtype. Rows without an expert become
///   zero, rows whose id is out of range NaN.
/// - `workspace`: at least [`experts_matmul_8bit_workspace`] bytes, of any content.
///
/// Two launches, four with a threshold.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length, `routing` another
/// number of experts, or the workspace is too short; [`Error::DType`](crate::Error::DType) when
/// `bias` or `out` has another dtype; else what loading the kernels or the driver reports.
#[allow(clippy::too_many_arguments, reason = "the op's arguments, and what the device needs")]
pub fn experts_matmul_8bit(
    stream: &Stream,
    input: Floats,
    token_rows: TokenRows,
    expert_ids: DeviceSlice<i64>,
    routing: &Routing,
    weight: &Experts8,
    threshold: f32,
    bias: Option<Floats>,
    out: Floats,
    mut workspace: DeviceSlice<u8>,
) -> Result<()> {
    let (n, k, experts) = (weight.out_features, weight.in_features, weight.experts);
    let rows = routing.count(token_rows);
    check_len("weight", routing.experts(), experts)?;
    check_len("expert_ids", routing.rows(), expert_ids.len())?;
    check_len("input", rows.saturating_mul(k), input.len())?;
    check_len("out", routing.rows().saturating_mul(n), out.len())?;
    check_dtype("out", input.dtype(), out.dtype())?;
    if let Some(bias) = bias {
        check_len("bias", experts.saturating_mul(n), bias.len())?;
        check_dtype("bias", input.dtype(), bias.dtype())?;
    }
    let a = workspace.carve::<i8>("workspace", rows * stride(k))?;
    let row_stats = workspace.carve::<f32>("workspace", rows)?;
    let lists =
        if threshold > 0.0 { Some(Lists::carve(&mut workspace, experts, k)?) } else { None };
    if out.is_empty() {
        return Ok(());
    }
    if let Some(lists) = &lists {
        clear(stream, lists.flags)?;
    }
    let sharing = routing.sharing(token_rows);
    stream.launch(
        &sources::EXPERTS_INT8_ROWS,
        by_dtype!(input.dtype(), "experts_int8_row_codes"),
        Grid::new(groups(stream, rows), THREADS),
        &[
            input.into(),
            a.into(),
            row_stats.into(),
            lists.as_ref().map(|lists| lists.flags).into(),
            expert_ids.into(),
            (sharing as u32).into(),
            (experts as u32).into(),
            rows.into(),
            k.into(),
            stride(k).into(),
            threshold.into(),
        ],
    )?;
    if let Some(lists) = &lists {
        lists.fill(stream, experts, k)?;
    }
    let (source, kernel, grid, tiles) = forward_kernel(stream, routing, n, input);
    stream.launch(
        source,
        kernel,
        grid,
        &[
            a.into(),
            weight.codes.into(),
            row_stats.into(),
            weight.scales.into(),
            input.into(),
            lists.as_ref().map(|lists| lists.columns).into(),
            lists.as_ref().map(|lists| lists.counts).into(),
            bias.into(),
            out.into(),
            routing.order().into(),
            routing.starts().into(),
            (experts as u32).into(),
            (sharing as u32).into(),
            (tiles as u32).into(),
            n.into(),
            k.into(),
            stride(k).into(),
        ],
    )
}

/// Bytes of workspace that [`experts_matmul_8bit`] takes: codes and statistics of the rows of
/// activations, and with a threshold a list of columns for each expert.
#[must_use]
pub fn experts_matmul_8bit_workspace(
    routing: &Routing,
    token_rows: TokenRows,
    in_features: usize,
    threshold: f32,
) -> usize {
    let rows = routing.count(token_rows);
    let lists = if threshold > 0.0 { Lists::bytes(routing.experts(), in_features) } else { 0 };
    DeviceSlice::carved_bytes::<i8>(rows.saturating_mul(stride(in_features)))
        .saturating_add(DeviceSlice::carved_bytes::<f32>(rows))
        .saturating_add(lists)
}

/// The outlier columns of each expert.
struct Lists {
    /// A bit a column, `[experts, words]`.
    flags: DeviceSlice<u32>,
    /// `[experts, in_features]`, of which the first `counts[expert]` are written.
    columns: DeviceSlice<i32>,
    counts: DeviceSlice<i32>,
}

impl Lists {
    fn bytes(experts: usize, columns: usize) -> usize {
        DeviceSlice::carved_bytes::<u32>(experts.saturating_mul(words(columns)))
            .saturating_add(DeviceSlice::carved_bytes::<i32>(experts.saturating_mul(columns)))
            .saturating_add(DeviceSlice::carved_bytes::<i32>(experts))
    }

    fn carve(workspace: &mut DeviceSlice<u8>, experts: usize, columns: usize) -> Result<Self> {
        Ok(Self {
            flags: workspace.carve("workspace", experts * words(columns))?,
            columns: workspace.carve("workspace", experts * columns)?,
            counts: workspace.carve("workspace", experts)?,
        })
    }

    /// From the flags.
    fn fill(&self, stream: &Stream, experts: usize, columns: usize) -> Result<()> {
        stream.launch(
            &sources::EXPERTS_INT8_ROWS,
            c"experts_int8_columns",
            Grid::new(groups(stream, experts), THREADS),
            &[
                self.flags.into(),
                self.columns.into(),
                self.counts.into(),
                experts.into(),
                columns.into(),
            ],
        )
    }
}

/// The rows of an expert, of those that could have rows.
fn rows_each(routing: &Routing) -> usize {
    routing.rows().div_ceil(routing.experts().min(routing.rows()).max(1))
}

/// The kernel of a forward product, its grid, and the most tiles of rows.
fn forward_kernel(
    stream: &Stream,
    routing: &Routing,
    outputs: usize,
    input: Floats,
) -> (&'static Source, &'static CStr, Grid, usize) {
    let device = stream.device();
    let each = rows_each(routing);
    let grid = |rows: usize, across: usize, threads: u32| {
        let tiles = routing.tiles(rows);
        (Grid::new(tiles.saturating_mul(across), threads), tiles)
    };
    if each <= FEW_ROWS {
        let name = by_dtype!(input.dtype(), "experts_int8_few_8");
        let (grid, tiles) = grid(FEW_ROWS, outputs.div_ceil(FEW.1), FEW.0);
        return (&sources::EXPERTS_INT8_PLAIN, name, grid, tiles);
    }
    if device.runtime() != Runtime::Cuda || device.capability() < 75 {
        let name = by_dtype!(input.dtype(), "experts_int8_tile");
        let (rows, threads) = product::PLAIN;
        let (grid, tiles) = grid(rows, outputs.div_ceil(rows), threads);
        return (&sources::EXPERTS_INT8_PLAIN, name, grid, tiles);
    }
    // Large tiles read less, small ones fill the device sooner.
    let (large, small) = (&product::LARGE, &product::SMALL);
    let enough = routing.rows().div_ceil(large.rows) * large.across(outputs) * 4
        >= device.multiprocessors() as usize * 3;
    let (tile, name) = if each > small.rows && enough {
        (large, by_dtype!(input.dtype(), "experts_int8_large"))
    } else {
        (small, by_dtype!(input.dtype(), "experts_int8_small"))
    };
    let (grid, tiles) = grid(tile.rows, tile.across(outputs), TILE_THREADS);
    (&sources::EXPERTS_INT8, name, grid.shared(TILE_SHARED), tiles)
}

/// The gradient of [`experts_matmul_8bit`] for its input, taken as if nothing had been rounded:
/// each row of `grad_output` times the dequantized weight of its expert, with the bounds of
/// [`int8_linear_grad_input`](super::super::int8_linear_grad_input). Under [`TokenRows::One`] the
/// rows of a token are summed, in float32 and by ascending slots. Rounded once to the dtype of
/// `grad_output`.
///
/// - `grad_output`: `[tokens, slots, out_features]`. Rows without an expert are not read.
/// - `expert_ids`: `[tokens, slots]`, of which `routing` was made.
/// - `out`: `[tokens, in_features]` or `[tokens, slots, in_features]`, as `token_rows` says, of the
///   same dtype. Rows without an expert count as zero, rows whose id is out of range as NaN.
/// - `workspace`: at least [`experts_matmul_8bit_grad_input_workspace`] bytes, of any content.
///
/// One launch, or two when rows are summed.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length, `routing` another
/// number of experts, or the workspace is too short; [`Error::DType`](crate::Error::DType) when
/// `out` has another dtype; else what loading the kernels or the driver reports.
#[allow(clippy::too_many_arguments, reason = "the op's arguments, and what the device needs")]
pub fn experts_matmul_8bit_grad_input(
    stream: &Stream,
    grad_output: Floats,
    token_rows: TokenRows,
    expert_ids: DeviceSlice<i64>,
    routing: &Routing,
    weight: &Experts8,
    out: Floats,
    mut workspace: DeviceSlice<u8>,
) -> Result<()> {
    let (n, k) = (weight.out_features, weight.in_features);
    check_len("weight", routing.experts(), weight.experts)?;
    check_len("expert_ids", routing.rows(), expert_ids.len())?;
    check_len("grad_output", routing.rows().saturating_mul(n), grad_output.len())?;
    check_len("out", routing.count(token_rows).saturating_mul(k), out.len())?;
    check_dtype("out", grad_output.dtype(), out.dtype())?;
    if routing.sharing(token_rows) == 1 {
        return launch_grad(stream, grad_output, routing, weight, [out.into(), Arg::NULL]);
    }
    let products = workspace.carve::<f32>("workspace", routing.rows().saturating_mul(k))?;
    launch_grad(stream, grad_output, routing, weight, [Arg::NULL, products.into()])?;
    sum_slots(stream, products, expert_ids, routing, k, out)
}

/// Bytes of workspace that [`experts_matmul_8bit_grad_input`] takes. Zero unless rows are summed.
#[must_use]
pub fn experts_matmul_8bit_grad_input_workspace(
    routing: &Routing,
    token_rows: TokenRows,
    in_features: usize,
) -> usize {
    super::experts_matmul_4bit_grad_input_workspace(routing, token_rows, in_features)
}

/// `out`: where rounded results go, and where those in float32; one of them is null.
fn launch_grad(
    stream: &Stream,
    grad_output: Floats,
    routing: &Routing,
    weight: &Experts8,
    out: [Arg<'_>; 2],
) -> Result<()> {
    let (n, k) = (weight.out_features, weight.in_features);
    let grid = |(rows, columns): (usize, usize), threads: u32| {
        let tiles = routing.tiles(rows);
        (Grid::new(tiles.saturating_mul(k.div_ceil(columns)), threads), tiles)
    };
    let dtype = grad_output.dtype();
    let (source, kernel, (grid, tiles)) = if grad::tensor_cores(stream.device(), dtype) {
        let ((rows, columns, _), small) = (grad::LARGE, grad::SMALL);
        let enough = routing.rows().div_ceil(rows) * k.div_ceil(columns) * 4
            >= stream.device().multiprocessors() as usize * 3;
        let (tile, name) = if rows_each(routing) > small.0 && enough {
            (grad::LARGE, by_dtype!(dtype, "experts_int8_grad_large"))
        } else {
            (small, by_dtype!(dtype, "experts_int8_grad_small"))
        };
        let (grid, tiles) = grid((tile.0, tile.1), grad::TILE_THREADS);
        (&sources::EXPERTS_INT8_GRAD, name, (grid.shared(tile.2), tiles))
    } else {
        let name = by_dtype!(dtype, "experts_int8_grad_plain");
        (&sources::EXPERTS_INT8_GRAD_PLAIN, name, grid(grad::PLAIN, grad::PLAIN_THREADS))
    };
    stream.launch(
        source,
        kernel,
        grid,
        &[
            grad_output.into(),
            weight.codes.into(),
            weight.scales.into(),
            out[0],
            out[1],
            routing.order().into(),
            routing.starts().into(),
            (weight.experts as u32).into(),
            1u32.into(),
            (tiles as u32).into(),
            n.into(),
            k.into(),
        ],
    )
}

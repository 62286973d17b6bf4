//! The int8 product: bare sums, or scaled, with outlier columns and bias in the same launch.

use super::rows::{self, Shape};
use super::{
    Outliers, Weight8, by_dtype, check_bias, check_depth, check_dtype, check_len, check_matrix,
};
use crate::{
    Arg, Device, DeviceSlice, Error, Floats, Grid, Result, Runtime, Source, Stream, sources,
};
use std::ffi::CStr;

/// Rows that read the weight once, without tensor cores.
pub(in crate::ops) const FEW_ROWS: usize = 8;
/// Threads of a group there, and outputs that it takes.
pub(in crate::ops) const FEW: (u32, usize) = (128, 8);
/// Without tensor cores, passes of [`FEW_ROWS`] rows beat the tile up to here.
const FEW_ROWS_PLAIN: usize = 16;
/// Rows and outputs of a group of the tile without tensor cores, and its threads.
pub(in crate::ops) const PLAIN: (usize, u32) = (64, 256);

/// A tile on tensor cores.
pub(in crate::ops) struct Tile {
    pub(in crate::ops) rows: usize,
    outputs: usize,
}

/// Both have 128 threads and 48 KiB of shared memory, in 3 and 4 stages.
pub(in crate::ops) const LARGE: Tile = Tile { rows: 128, outputs: 128 };
pub(in crate::ops) const SMALL: Tile = Tile { rows: 64, outputs: 32 };
pub(in crate::ops) const TILE_THREADS: u32 = 128;
pub(in crate::ops) const TILE_SHARED: u32 = 48 * 1024;
/// Codes of a row of [`int8_linear`]'s workspace are filled up to a multiple of this.
const ALIGNMENT: usize = 16;

impl Tile {
    /// Tiles side by side.
    pub(in crate::ops) const fn across(&self, outputs: usize) -> usize {
        outputs.div_ceil(self.outputs)
    }

    const fn groups(&self, rows: usize, outputs: usize) -> usize {
        rows.div_ceil(self.rows) * self.across(outputs)
    }
}

/// One product: `a` of int8 codes, `stride` a row, with a weight.
struct Product {
    a: DeviceSlice<i8>,
    stride: usize,
    row_stats: DeviceSlice<f32>,
    rows: usize,
    weight: Weight8,
    input: Option<Floats>,
    outliers: Option<Outliers>,
    bias: Option<Floats>,
}

/// What a product writes.
enum Target {
    Sums(DeviceSlice<i32>),
    Floats(Floats),
}

/// The names of one kernel for each target.
macro_rules! by_target {
    ($target:expr, $op:literal) => {
        match $target {
            Target::Sums(_) => {
                const NAME: &[u8] = concat!($op, "_i32\0").as_bytes();
                const {
                    match CStr::from_bytes_with_nul(NAME) {
                        Ok(name) => name,
                        Err(_) => panic!("one NUL, at the end"),
                    }
                }
            }
            Target::Floats(out) => by_dtype!(out.dtype(), $op),
        }
    };
}

impl Product {
    fn launch(&self, stream: &Stream, target: &Target) -> Result<()> {
        let outputs = self.weight.out_features;
        if self.rows == 0 || outputs == 0 {
            return Ok(());
        }
        let (source, kernel, grid) = choose(stream.device(), self.rows, outputs, target);
        stream.launch(
            source,
            kernel,
            grid,
            &[
                self.a.into(),
                self.weight.codes.into(),
                self.row_stats.into(),
                self.weight.scales.into(),
                self.input.into(),
                self.outliers.map(|outliers| outliers.columns).into(),
                self.outliers.map(|outliers| outliers.count).into(),
                self.bias.into(),
                match target {
                    Target::Sums(out) => Arg::from(*out),
                    Target::Floats(out) => Arg::from(*out),
                },
                self.rows.into(),
                outputs.into(),
                self.weight.in_features.into(),
                self.stride.into(),
            ],
        )
    }
}

/// The kernel for a product of that size.
fn choose(
    device: &Device,
    rows: usize,
    outputs: usize,
    target: &Target,
) -> (&'static Source, &'static CStr, Grid) {
    let tensor_cores = device.runtime() == Runtime::Cuda && device.capability() >= 75;
    if rows <= if tensor_cores { FEW_ROWS } else { FEW_ROWS_PLAIN } {
        let name = match rows {
            1 => by_target!(target, "int8_few_1"),
            2..=4 => by_target!(target, "int8_few_4"),
            _ => by_target!(target, "int8_few_8"),
        };
        let grid = Grid::new(outputs.div_ceil(FEW.1), FEW.0).y(rows.div_ceil(FEW_ROWS) as u32);
        return (&sources::INT8_MATMUL_PLAIN, name, grid);
    }
    if !tensor_cores {
        let name = by_target!(target, "int8_tile");
        let groups = rows.div_ceil(PLAIN.0) * outputs.div_ceil(PLAIN.0);
        return (&sources::INT8_MATMUL_PLAIN, name, Grid::new(groups, PLAIN.1));
    }
    // Large tiles read less, small ones fill the device sooner.
    let enough = LARGE.groups(rows, outputs) * 4 >= device.multiprocessors() as usize * 3;
    let (tile, name) = if rows > SMALL.rows && enough {
        (LARGE, by_target!(target, "int8_matmul_large"))
    } else {
        (SMALL, by_target!(target, "int8_matmul_small"))
    };
    let grid = Grid::new(tile.groups(rows, outputs), TILE_THREADS).shared(TILE_SHARED);
    (&sources::INT8_MATMUL, name, grid)
}

/// `out = a · b^T`, exactly.
///
/// - `a`: `[m, depth]`, `b`: `[n, depth]`, row-major int8.
/// - `out`: `[m, n]`. Without depth it is zeros of whatever length it has.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::Core`] when `depth` passes
/// [`INT8_MAX_DEPTH`](halfbyte::INT8_MAX_DEPTH); else what the launch reports.
pub fn int8_linear_matmul(
    stream: &Stream,
    a: DeviceSlice<i8>,
    b: DeviceSlice<i8>,
    depth: usize,
    out: DeviceSlice<i32>,
) -> Result<()> {
    let (rows, n) = (check_matrix("a", a.len(), depth)?, check_matrix("b", b.len(), depth)?);
    check_depth(depth)?;
    if depth == 0 {
        return rows::clear(stream, out);
    }
    check_len("out", rows.saturating_mul(n), out.len())?;
    let weight =
        Weight8 { codes: b, scales: DeviceSlice::empty(), out_features: n, in_features: depth };
    let product = Product {
        a,
        stride: depth,
        row_stats: DeviceSlice::empty(),
        rows,
        weight,
        input: None,
        outliers: None,
        bias: None,
    };
    product.launch(stream, &Target::Sums(out))
}

/// `out = (a · weight^T) * row_stats * scales / 127^2 + bias`, fused.
///
/// - `a`: `[rows, in_features]` int8, row-major; `row_stats`: `[rows]`.
/// - `bias`: `[out_features]` of `out`'s dtype, if any.
/// - `out`: `[rows, out_features]`.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::DType`] for a bias of another dtype
/// than `out`; else what the launch reports.
pub fn int8_scaled_mm(
    stream: &Stream,
    a: DeviceSlice<i8>,
    row_stats: DeviceSlice<f32>,
    weight: &Weight8,
    bias: Option<Floats>,
    out: Floats,
) -> Result<()> {
    scaled(stream, None, a, row_stats, weight, None, bias, out)
}

/// As [`int8_scaled_mm`], and columns `outliers` of `input` times those of the dequantized weight
/// on top, in the same pass.
///
/// - `input`: `[rows, in_features]`, what `a` was quantized from, of `out`'s dtype.
/// - `outliers`: on the device, from [`int8_vectorwise_quant`](super::int8_vectorwise_quant) or
///   [`int8_outliers`](super::int8_outliers). (The codes of these columns should be 0 in `a`.)
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::DType`] for an input or a bias of
/// another dtype than `out`; else what the launch reports.
#[allow(clippy::too_many_arguments)] // as the core's
pub fn int8_mixed_scaled_mm(
    stream: &Stream,
    input: Floats,
    a: DeviceSlice<i8>,
    row_stats: DeviceSlice<f32>,
    weight: &Weight8,
    outliers: Option<Outliers>,
    bias: Option<Floats>,
    out: Floats,
) -> Result<()> {
    scaled(stream, Some(input), a, row_stats, weight, outliers, bias, out)
}

#[allow(clippy::too_many_arguments)] // as above
fn scaled(
    stream: &Stream,
    input: Option<Floats>,
    a: DeviceSlice<i8>,
    row_stats: DeviceSlice<f32>,
    weight: &Weight8,
    outliers: Option<Outliers>,
    bias: Option<Floats>,
    out: Floats,
) -> Result<()> {
    let rows = row_stats.len();
    check_len("a", rows.saturating_mul(weight.in_features), a.len())?;
    check_len("out", rows.saturating_mul(weight.out_features), out.len())?;
    check_bias(bias, weight.out_features, out)?;
    if let (Some(input), Some(outliers)) = (input, outliers) {
        outliers.check(weight.in_features)?;
        check_len("input", a.len(), input.len())?;
        check_dtype("input", out.dtype(), input.dtype())?;
    }
    let (weight, stride) = (*weight, weight.in_features);
    Product { a, stride, row_stats, rows, weight, input, outliers, bias }
        .launch(stream, &Target::Floats(out))
}

/// Codes of a row in [`int8_linear`]'s workspace.
pub(in crate::ops) const fn stride(columns: usize) -> usize {
    columns.div_ceil(ALIGNMENT).saturating_mul(ALIGNMENT)
}

/// Bytes of scratch that [`int8_linear`] takes for `rows` rows of `columns` elements.
#[must_use]
pub const fn int8_linear_workspace(rows: usize, columns: usize) -> usize {
    DeviceSlice::carved_bytes::<i8>(rows.saturating_mul(stride(columns)))
        .saturating_add(DeviceSlice::carved_bytes::<f32>(rows))
        .saturating_add(DeviceSlice::carved_bytes::<i32>(columns))
        .saturating_add(DeviceSlice::carved_bytes::<i32>(1))
        .saturating_add(rows::int8_vectorwise_quant_workspace(columns))
}

/// A whole `LLM.int8()` layer: quantizes the rows of `input`
/// ([`int8_vectorwise_quant`](super::int8_vectorwise_quant)), multiplies and adds the outliers
/// ([`int8_mixed_scaled_mm`]). Two launches without a threshold or for a few short rows, else four;
/// none waits for the host.
///
/// - `input`: `[rows, in_features]`, row-major.
/// - `threshold`: magnitude from which on an activation counts as an outlier; 0 for none.
/// - `bias`: `[out_features]` of `input`'s dtype, if any.
/// - `out`: `[rows, out_features]`, of `input`'s dtype.
/// - `outliers`: where the outlier columns go, if they are asked for.
/// - `workspace`: at least [`int8_linear_workspace`] bytes.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length or the workspace is too small;
/// [`Error::DType`] when dtypes differ; else what the launches report.
#[allow(clippy::too_many_arguments)] // the core's, and where results and scratch go
pub fn int8_linear(
    stream: &Stream,
    input: Floats,
    rows: usize,
    weight: &Weight8,
    threshold: f32,
    bias: Option<Floats>,
    out: Floats,
    outliers: Option<Outliers>,
    mut workspace: DeviceSlice<u8>,
) -> Result<()> {
    let columns = weight.in_features;
    check_len("input", rows.saturating_mul(columns), input.len())?;
    check_len("out", rows.saturating_mul(weight.out_features), out.len())?;
    check_dtype("out", input.dtype(), out.dtype())?;
    check_bias(bias, weight.out_features, out)?;
    outliers.map_or(Ok(()), |outliers| outliers.check(columns))?;

    let needed = int8_linear_workspace(rows, columns);
    if workspace.len() < needed {
        return Err(Error::Length { what: "workspace", expected: needed, got: workspace.len() });
    }
    let stride = stride(columns);
    let codes = workspace.carve::<i8>("workspace", rows * stride)?;
    let row_stats = workspace.carve::<f32>("workspace", rows)?;
    let own = Outliers {
        columns: workspace.carve("workspace", columns)?,
        count: workspace.carve("workspace", 1)?,
    };
    // A caller who asks gets an empty list when there is no threshold.
    let outliers = outliers.or((threshold > 0.0).then_some(own));
    let shape = Shape { rows, columns, stride };
    rows::quantize(stream, input, shape, threshold, codes, row_stats, outliers, workspace)?;
    let product = Product {
        a: codes,
        stride,
        row_stats,
        rows,
        weight: *weight,
        input: Some(input),
        outliers,
        bias,
    };
    product.launch(stream, &Target::Floats(out))
}

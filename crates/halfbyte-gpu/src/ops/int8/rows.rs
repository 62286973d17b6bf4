//! The element by element half of `LLM.int8()`: rows to int8 codes, codes back to elements, int32
//! sums to elements, and lists of outlier columns.

use super::{Outliers, by_dtype, check_dtype, check_len, check_matrix, groups};
use crate::{Arg, DeviceSlice, Error, Floats, Grid, Result, Stream, sources};

/// Threads of a group of every kernel in `int8_rows.cu` but the few-rows one.
pub(in crate::ops) const THREADS: u32 = 256;
/// Threads of the group that does a small matrix in one launch.
const FEW_THREADS: u32 = 512;
/// Elements that one group does as fast as it takes to launch two more kernels.
const FEW_ELEMENTS: usize = 32 * 1024;
/// Columns that the flags in that group's shared memory are for.
const FEW_COLUMNS: usize = 32 * 1024;

/// The flags of outlier columns, one bit a column.
pub(in crate::ops) const fn words(columns: usize) -> usize {
    columns.div_ceil(32)
}

/// Quantizes each row of `a` to int8 under its own largest magnitude.
///
/// With a `threshold` above zero, elements of that magnitude or more count as outliers: they have
/// no part in a row's statistic, and the codes of their columns are 0 in every row.
///
/// - `a`: `[rows, columns]`, row-major.
/// - `codes`: `[rows, columns]`.
/// - `row_stats`: `[rows]`, the largest magnitude of each row below the threshold.
/// - `outliers`: where the outlier columns go, if they are asked for; without a threshold there
///   are none.
/// - `workspace`: at least [`int8_vectorwise_quant_workspace`] bytes.
///
/// A row that holds NaN has the statistic NaN and codes 0, one that holds an infinity (and no
/// threshold) the statistic infinity and codes 0.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length or the workspace is too small; else what the
/// launch reports.
#[allow(clippy::too_many_arguments)] // the op's, and where its three results go
pub fn int8_vectorwise_quant(
    stream: &Stream,
    a: Floats,
    columns: usize,
    threshold: f32,
    codes: DeviceSlice<i8>,
    row_stats: DeviceSlice<f32>,
    outliers: Option<Outliers>,
    workspace: DeviceSlice<u8>,
) -> Result<()> {
    check_matrix("a", a.len(), columns)?;
    check_len("codes", a.len(), codes.len())?;
    check_rows(a.len(), columns, row_stats)?;
    outliers.map_or(Ok(()), |outliers| outliers.check(columns))?;
    let rows = row_stats.len();
    let shape = Shape { rows, columns, stride: columns };
    quantize(stream, a, shape, threshold, codes, row_stats, outliers, workspace).map(drop)
}

/// Bytes of scratch that [`int8_vectorwise_quant`] and [`int8_double_quant`] take for rows of
/// `columns` elements.
#[must_use]
pub const fn int8_vectorwise_quant_workspace(columns: usize) -> usize {
    DeviceSlice::carved_bytes::<u32>(words(columns))
}

/// `row_stats` has one entry a row; without columns the number of rows is whatever it says.
fn check_rows(len: usize, columns: usize, row_stats: DeviceSlice<f32>) -> Result<()> {
    if columns == 0 {
        return Ok(());
    }
    check_len("row_stats", len / columns, row_stats.len())
}

/// Activations and their codes: `stride` codes a row, of which those behind `columns` are 0.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) stride: usize,
}

/// [`int8_vectorwise_quant`] on checked arguments. Gives the flags of the outlier columns, if
/// there is a threshold and they were written: a small matrix goes without.
#[allow(clippy::too_many_arguments)] // as the op
pub(super) fn quantize(
    stream: &Stream,
    a: Floats,
    shape: Shape,
    threshold: f32,
    codes: DeviceSlice<i8>,
    row_stats: DeviceSlice<f32>,
    outliers: Option<Outliers>,
    mut workspace: DeviceSlice<u8>,
) -> Result<DeviceSlice<u32>> {
    let flags = workspace.carve::<u32>("workspace", words(shape.columns))?;
    let columns = Arg::from(outliers.map(|outliers| outliers.columns));
    let count = Arg::from(outliers.map(|outliers| outliers.count));
    let (rows, stride) = (shape.rows, shape.stride);
    let few = rows * shape.columns <= FEW_ELEMENTS && shape.columns <= FEW_COLUMNS;
    if few && (threshold > 0.0 || outliers.is_some()) {
        stream.launch(
            &sources::INT8_ROWS,
            by_dtype!(a.dtype(), "int8_few_row_codes"),
            Grid::new(1, FEW_THREADS),
            &[
                a.into(),
                codes.into(),
                row_stats.into(),
                flags.into(),
                columns,
                count,
                rows.into(),
                shape.columns.into(),
                stride.into(),
                threshold.into(),
            ],
        )?;
        return Ok(flags);
    }
    let marks = threshold > 0.0 || outliers.is_some();
    if marks {
        clear(stream, flags)?;
    }
    stream.launch(
        &sources::INT8_ROWS,
        by_dtype!(a.dtype(), "int8_row_codes"),
        Grid::new(groups(stream, rows), THREADS),
        &[
            a.into(),
            codes.into(),
            row_stats.into(),
            flags.into(),
            rows.into(),
            shape.columns.into(),
            stride.into(),
            threshold.into(),
        ],
    )?;
    if marks {
        stream.launch(
            &sources::INT8_ROWS,
            c"int8_outlier_columns",
            Grid::new(groups(stream, rows).max(1), THREADS),
            &[
                flags.into(),
                codes.into(),
                columns,
                count,
                rows.into(),
                shape.columns.into(),
                stride.into(),
            ],
        )?;
    }
    Ok(flags)
}

/// Sets 32-bit words to zero.
pub(in crate::ops) fn clear<T>(stream: &Stream, words: DeviceSlice<T>) -> Result<()> {
    const { assert!(size_of::<T>() == 4) };
    stream.launch(
        &sources::INT8_ROWS,
        c"int8_clear",
        Grid::new(groups(stream, words.len().div_ceil(THREADS as usize)), THREADS),
        &[words.into(), words.len().into()],
    )
}

/// `out = codes * row_stats / 127`, row by row, in float32, rounded once to `out`'s dtype.
///
/// - `codes`, `out`: `[rows, columns]`, row-major.
/// - `row_stats`: `[rows]`.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; else what the launch reports.
pub fn int8_vectorwise_dequant(
    stream: &Stream,
    codes: DeviceSlice<i8>,
    columns: usize,
    row_stats: DeviceSlice<f32>,
    out: Floats,
) -> Result<()> {
    check_matrix("codes", codes.len(), columns)?;
    check_len("out", codes.len(), out.len())?;
    check_rows(codes.len(), columns, row_stats)?;
    if out.is_empty() {
        return Ok(());
    }
    let rows = row_stats.len();
    stream.launch(
        &sources::INT8_ROWS,
        by_dtype!(out.dtype(), "int8_dequantize"),
        Grid::new(groups(stream, rows), THREADS),
        &[codes.into(), row_stats.into(), out.into(), rows.into(), columns.into()],
    )
}

/// Quantizes `a` twice: by rows, as [`int8_vectorwise_quant`] does, and by columns.
///
/// - `a`, `row_codes`, `col_codes`: `[rows, columns]`, row-major.
/// - `row_stats`: `[rows]`; `col_stats`: `[columns]`, the largest magnitudes below the threshold.
/// - `outliers`: where the outlier columns go; both kinds of codes are 0 there.
/// - `workspace`: at least [`int8_vectorwise_quant_workspace`] bytes.
///
/// # Errors
/// As [`int8_vectorwise_quant`].
#[allow(clippy::too_many_arguments)] // two results of two parts each
pub fn int8_double_quant(
    stream: &Stream,
    a: Floats,
    columns: usize,
    threshold: f32,
    row_codes: DeviceSlice<i8>,
    col_codes: DeviceSlice<i8>,
    row_stats: DeviceSlice<f32>,
    col_stats: DeviceSlice<f32>,
    outliers: Option<Outliers>,
    workspace: DeviceSlice<u8>,
) -> Result<()> {
    check_matrix("a", a.len(), columns)?;
    check_len("row_codes", a.len(), row_codes.len())?;
    check_len("col_codes", a.len(), col_codes.len())?;
    check_rows(a.len(), columns, row_stats)?;
    check_len("col_stats", columns, col_stats.len())?;
    outliers.map_or(Ok(()), |outliers| outliers.check(columns))?;
    let rows = row_stats.len();
    let shape = Shape { rows, columns, stride: columns };
    let flags = quantize(stream, a, shape, threshold, row_codes, row_stats, outliers, workspace)?;
    stream.launch(
        &sources::INT8_ROWS,
        by_dtype!(a.dtype(), "int8_column_codes"),
        Grid::new(columns.div_ceil(32), THREADS),
        &[
            a.into(),
            col_codes.into(),
            col_stats.into(),
            flags.into(),
            rows.into(),
            columns.into(),
            threshold.into(),
        ],
    )
}

/// `out = acc * row_stats * col_stats / 127^2 + bias`, in float32, rounded once to `out`'s dtype.
///
/// - `acc`, `out`: `[m, n]`, row-major.
/// - `row_stats`: `[m]`; `col_stats`, `bias`: `[n]`.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; else what the launch reports.
pub fn int8_mm_dequant(
    stream: &Stream,
    acc: DeviceSlice<i32>,
    row_stats: DeviceSlice<f32>,
    col_stats: DeviceSlice<f32>,
    bias: Option<DeviceSlice<f32>>,
    out: Floats,
) -> Result<()> {
    let (rows, columns) = (row_stats.len(), col_stats.len());
    check_len("acc", rows.saturating_mul(columns), acc.len())?;
    check_len("out", acc.len(), out.len())?;
    bias.map_or(Ok(()), |bias| check_len("bias", columns, bias.len()))?;
    if out.is_empty() {
        return Ok(());
    }
    stream.launch(
        &sources::INT8_ROWS,
        by_dtype!(out.dtype(), "int8_rescale"),
        Grid::new(groups(stream, rows), THREADS),
        &[
            acc.into(),
            row_stats.into(),
            col_stats.into(),
            bias.into(),
            out.into(),
            rows.into(),
            columns.into(),
        ],
    )
}

/// A caller's list of columns as [`Outliers`]: ascending, equal ones kept. Numbers below 0 or from
/// `in_features` on are left out, because nothing here can report them.
///
/// - `columns`: at most `in_features` numbers in any order.
/// - `outliers`: the result, with room for `in_features` columns.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::Argument`] for more columns than
/// `in_features`; else what the launch reports.
pub fn int8_outliers(
    stream: &Stream,
    columns: DeviceSlice<i64>,
    in_features: usize,
    outliers: Outliers,
) -> Result<()> {
    outliers.check(in_features)?;
    if columns.len() > in_features {
        return Err(Error::Argument {
            what: "outlier columns",
            expected: format!("at most the {in_features} columns of the matrix"),
            got: columns.len().to_string(),
        });
    }
    stream.launch(
        &sources::INT8_ROWS,
        c"int8_sort_columns",
        Grid::new(1, THREADS),
        &[
            columns.into(),
            outliers.columns.into(),
            outliers.count.into(),
            columns.len().into(),
            in_features.into(),
        ],
    )
}

/// `out[m][j] = a[m][columns[j]]`; 0 where `a` has no such column.
///
/// - `a`: `[rows, in_features]`, row-major; `out`: `[rows, columns.len()]`, of `a`'s dtype.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; [`Error::DType`] when the dtypes differ; else
/// what the launch reports.
pub fn int8_gather_columns(
    stream: &Stream,
    a: Floats,
    in_features: usize,
    columns: DeviceSlice<i64>,
    out: Floats,
) -> Result<()> {
    let rows = check_matrix("a", a.len(), in_features)?;
    check_len("out", rows.saturating_mul(columns.len()), out.len())?;
    check_dtype("out", a.dtype(), out.dtype())?;
    if out.is_empty() {
        return Ok(());
    }
    stream.launch(
        &sources::INT8_ROWS,
        by_dtype!(a.dtype(), "int8_gather"),
        Grid::new(groups(stream, rows), THREADS),
        &[
            a.into(),
            columns.into(),
            out.into(),
            rows.into(),
            in_features.into(),
            columns.len().into(),
        ],
    )
}

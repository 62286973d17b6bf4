//! The int8 product, from activations to finished results, for one weight or one an expert.
//!
//! ```text
//! for each pass of rows that fits PASS bytes:
//!     pack the rows: codes in tiles, what they hold in outlier columns      (in parallel)
//!     for each task = (a part: rows of one weight, some of its outputs):    (in parallel)
//!         for each panel of these outputs:
//!             sums = 0
//!             for each stretch of DEPTH columns:
//!                 panel = those weights, as the tile reads them             (in L1)
//!                 for each tile of rows: sums += tile · panel               (in registers)
//!             sums = sums * scales
//!             for each stretch of OUTLIERS outlier columns:
//!                 columns = those of the panel's weights, decoded
//!                 for each tile: sums += outliers · columns
//!         round(sums + bias)
//! ```
//!
//! Parts of at most [`FEW_ROWS`] rows read the weight as it lies, a task's part of it for
//! [`BATCH`] rows at a time, and keep one vector of sums for each (row, output): packing would cost
//! more than the product.
//!
//! While tiles are multiplied, what the next panel is packed from is asked for ([`Coming`]).
//!
//! Where an instruction multiplies unsigned by signed bytes (VNNI), the weight is stored with 128
//! added ([`Micro::LIFT`]) and the sums start at -128 times the sum of the row's codes. Wrapping
//! arithmetic gives the exact sum, because that fits (see [`super::INT8_MAX_DEPTH`]). No
//! instruction that saturates is used. A processor with matrix tiles (AMX) would be one more
//! [`Micro`].

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod i8mm;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(test)]
mod tests;

use super::{Weight8, decode, rows, scalar};
use crate::Element;
use crate::isa::Isa;
use crate::threads::{self, Chunks, Shared};
use std::cell::Cell;
use std::ops::Range;

/// Sixteen 32-bit lanes: packed codes, int32 sums or float32 values, as the stage has it.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([i32; LANES]);
const LANES: usize = 16;

impl Line {
    const ZERO: Self = Self([0; LANES]);
}

/// Packed rows of a pass, in bytes. Every pass packs the weight anew.
const PASS: usize = 2 << 20;
/// Rows of a pass at most, so that their sums with a task's outputs stay in L2 (256 KiB).
const MAX_ROWS: usize = 512;
/// Columns of one stretch: a panel of them (32 KiB) stays in L1 while tiles stream past.
const DEPTH: usize = 1024;
/// Groups of columns between two looks at what is coming.
const STEP: usize = 8;
/// Outlier columns of one stretch.
const OUTLIERS: usize = 1024;
/// The most rows that read the weight as it lies.
const FEW_ROWS: usize = 16;
/// Rows that share each load of the weight there.
const BATCH: usize = 6;
/// Outputs that the few-rows way takes at once.
const TOGETHER: usize = 4;
/// Bytes of a few-rows task's weight: some 5 us of reading, and they stay in L2.
const FEW_TASK: usize = 64 * 1024;
/// Rows of the output that are asked for before they are written.
const OUT_AHEAD: usize = 8;
/// Panels of a task. Results are written when all of them are there: a row's lie side by side.
const PANELS: usize = 4;

/// What an instruction set brings.
///
/// # Safety
/// Every function requires the instruction set to be present on this machine, and nothing else:
/// the slices are checked.
trait Micro: 'static {
    /// Rows of a tile.
    const ROWS: usize;
    /// Lines of outputs of a panel: it has `16 * LINES` outputs.
    const LINES: usize;
    /// Columns in a 32-bit lane: 4 as int8, or 2 as int16.
    const GROUP: usize;
    /// What a packed weight has over its code.
    const LIFT: i32;

    /// Packs up to `16 * LINES` weight rows of equal length, [`GROUP`](Self::GROUP) columns a
    /// lane: lines `LINES * g ..` hold columns `GROUP * g ..` of every row. What lies behind the
    /// last row or column may be anything.
    unsafe fn pack_panel(rows: &[&[i8]], panel: &mut [Line]);

    /// `sums[m][n] += Σ rows[g][m] · panel[g][n]`, wrapping, for `ROWS` rows and `LINES` lines.
    /// `rows` holds [`ROWS`](Self::ROWS) lanes a group.
    ///
    /// Only the first `used` rows count; the others' sums may become anything.
    unsafe fn multiply(
        rows: &[i32],
        panel: &[Line],
        sums: &mut [Line],
        used: usize,
        coming: &mut Coming,
    );

    /// `values[m][n] = fma(rows[j][m], columns[j][n], values[m][n])` for each `j` in order.
    unsafe fn multiply_add(rows: &[f32], columns: &[Line], values: &mut [Line]);

    /// Turns int32 sums into float32, times `row` and then `columns`.
    unsafe fn scale(sums: &mut [Line], row: f32, columns: &[Line]);

    /// `values[n] = fma(row[j], columns[j][n], values[n])` for each `j` in order; each column has as
    /// many lines as `values`.
    unsafe fn add_columns(row: &[f32], columns: &[Line], values: &mut [Line]);

    /// Adds the bias, rounds and stores the first `out.len()` values.
    unsafe fn finish<T: Element>(values: &[Line], bias: Option<&[T]>, out: &mut [T]);

    /// The sums of `rows` with [`TOGETHER`] weight rows, less [`LIFT`](Self::LIFT) times the sums
    /// of `rows`. All of `weight` are as long; each of `rows` is at least as long and 0 beyond, up
    /// to a multiple of 64.
    unsafe fn dots<const M: usize>(
        rows: [&[i8]; M],
        weight: [&[i8]; TOGETHER],
    ) -> [[i32; TOGETHER]; M];
}

/// What a product writes: float elements, scaled; or the bare sums.
trait Target: Copy + Send + Sync + Default + 'static {
    const SCALED: bool;
    /// # Safety
    /// The instruction set is present.
    unsafe fn store<M: Micro>(values: &[Line], bias: Option<&[Self]>, out: &mut [Self]);
    /// The result of a sum, by the definition.
    fn define(sum: i32, value: impl FnOnce(i32) -> f32, bias: Option<Self>) -> Self;
}

impl Target for i32 {
    const SCALED: bool = false;
    unsafe fn store<M: Micro>(values: &[Line], _: Option<&[Self]>, out: &mut [Self]) {
        out.copy_from_slice(&values.as_flattened_lanes()[..out.len()]);
    }
    fn define(sum: i32, _: impl FnOnce(i32) -> f32, _: Option<Self>) -> Self {
        sum
    }
}

impl<T: Element> Target for T {
    const SCALED: bool = true;
    unsafe fn store<M: Micro>(values: &[Line], bias: Option<&[Self]>, out: &mut [Self]) {
        // SAFETY: by the caller's contract.
        unsafe { M::finish(values, bias, out) }
    }
    fn define(sum: i32, value: impl FnOnce(i32) -> f32, bias: Option<Self>) -> Self {
        let value = value(sum);
        T::from_f32(bias.map_or(value, |b| value + b.to_f32()))
    }
}

trait Lanes32 {
    fn as_flattened_lanes(&self) -> &[i32];
}

impl Lanes32 for [Line] {
    fn as_flattened_lanes(&self) -> &[i32] {
        // SAFETY: a line is 16 int32 without padding.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.len() * LANES) }
    }
}

/// The left side: rows of activations, quantized already or about to be.
#[derive(Clone, Copy)]
pub(super) struct Left<'a, T> {
    /// `[rows, depth]`; may be empty if there are `codes` and no outliers.
    pub input: &'a [T],
    /// `[rows, depth]`, or none: then rows are encoded as they are packed.
    pub codes: Option<&'a [i8]>,
    /// One a position in the [`Order`] (or none for bare sums).
    pub stats: &'a [f32],
    pub depth: usize,
}

/// Rows of weights that are read soon. A tile asks for a few of their lines at every step, into L2:
/// without an array of addresses, whose upkeep would cost what it gains.
struct Coming {
    at: *const i8,
    /// Lines of a row, and those left of the present one.
    row_lines: usize,
    left: usize,
    /// From behind a row to the next one.
    skip: usize,
    lines: usize,
    per_step: usize,
}

impl Coming {
    /// Columns `columns` of rows `rows`, in about `steps` steps.
    fn new(
        weight: &Weight8<'_>,
        rows: &Range<usize>,
        columns: &Range<usize>,
        steps: usize,
    ) -> Self {
        const LINE: usize = size_of::<Line>();
        const MOST: usize = 2;
        let row_lines = columns.len().div_ceil(LINE);
        let lines = rows.len() * row_lines;
        Self {
            at: weight.codes.as_ptr().wrapping_add(rows.start * weight.in_features + columns.start),
            row_lines,
            left: row_lines,
            skip: weight.in_features.wrapping_sub(row_lines * LINE),
            lines,
            per_step: lines.div_ceil(steps.max(1)).min(MOST),
        }
    }

    /// Asks for the lines of one step.
    #[inline]
    fn step(&mut self) {
        for _ in 0..self.per_step.min(self.lines) {
            ask(self.at);
            self.at = self.at.wrapping_add(size_of::<Line>());
            self.lines -= 1;
            self.left -= 1;
            if self.left == 0 {
                self.left = self.row_lines;
                self.at = self.at.wrapping_add(self.skip);
            }
        }
    }
}

/// Starts bringing a cache line into L2.
#[inline]
fn ask(line: *const i8) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unused_unsafe)] // newer compilers know that it is safe
    // SAFETY: a hint, of any address whatever.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(line);
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint, of any address whatever. (The intrinsic is not stable.)
    unsafe {
        std::arch::asm!(
            "prfm pldl2keep, [{}]",
            in(reg) line,
            options(nostack, preserves_flags, readonly)
        );
    }
}

impl<T: Element> Left<'_, T> {
    /// The codes of row `i`, quantized under `stat`. Outlier columns of given codes are taken as
    /// they are.
    fn row(&self, isa: Isa, i: usize, stat: f32, outliers: &[usize], codes: &mut [i8]) {
        let at = i * self.depth..(i + 1) * self.depth;
        if let Some(all) = self.codes {
            codes.copy_from_slice(&all[at]);
            return;
        }
        // SAFETY: `isa` was detected on this machine.
        unsafe { rows::encode(isa, &self.input[at], scalar::scale(stat), codes) };
        for &j in outliers {
            codes[j] = 0;
        }
    }

    /// What row `i` holds in some columns.
    fn take<'o>(&self, i: usize, columns: &[usize], to: impl Iterator<Item = &'o mut f32>) {
        for (to, &j) in to.zip(columns) {
            *to = self.input[i * self.depth + j].to_f32();
        }
    }
}

/// Rows that one weight multiplies.
pub(super) struct Group<'a, O> {
    pub weight: Weight8<'a>,
    pub bias: Option<&'a [O]>,
    /// Ascending columns.
    pub outliers: &'a [usize],
    /// Positions in the [`Order`].
    pub rows: Range<usize>,
}

/// Which row of the input stands at a position, and where its result goes.
#[derive(Clone, Copy)]
pub(super) enum Order<'a> {
    /// Position `i` is row `i` of both.
    Same,
    /// Position `i` is row `out[i]` of the output and row `out[i] / share` of the input.
    Routed { out: &'a [usize], share: usize },
}

impl Order<'_> {
    fn input(self, i: usize) -> usize {
        match self {
            Self::Same => i,
            Self::Routed { out, share } => out[i] / share,
        }
    }
    fn out(self, i: usize) -> usize {
        match self {
            Self::Same => i,
            Self::Routed { out, .. } => out[i],
        }
    }
}

/// `out[order.out(i)] = left[order.input(i)] · weight^T`, scaled, for the rows `i` of each group.
/// All weights have the same shape.
pub(super) fn run<T: Element, O: Product>(
    isa: Isa,
    left: &Left<'_, T>,
    order: Order<'_>,
    groups: &[Group<'_, O>],
    out: &mut [O],
) {
    let out = Shared::new(out);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if avx512::is_available() => {
            Engine::<T, O, avx512::Avx512>::run(isa, left, order, groups, &out);
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => Engine::<T, O, avx2::Avx2>::run(isa, left, order, groups, &out),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon if i8mm::is_available() => {
            Engine::<T, O, i8mm::I8mm>::run(isa, left, order, groups, &out);
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon if neon::has_dot() => {
            Engine::<T, O, neon::Neon<true>>::run(isa, left, order, groups, &out);
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => Engine::<T, O, neon::Neon<false>>::run(isa, left, order, groups, &out),
        _ => define(left, order, groups, &out),
    }
}

/// A type that a product can write: float32, float16, bfloat16, or int32 for the bare sums.
#[allow(private_bounds)] // how it is written is this module's business
pub(super) trait Product: Target {}
impl<O: Target> Product for O {}

/// By the definition, one value after the other.
fn define<T: Element, O: Target>(
    left: &Left<'_, T>,
    order: Order<'_>,
    groups: &[Group<'_, O>],
    out: &Shared<'_, O>,
) {
    let mut codes = vec![0; left.depth];
    for group in groups {
        let n = group.weight.out_features;
        for i in group.rows.clone() {
            let row = order.input(i);
            let stat = left.stats.get(i).copied().unwrap_or_default();
            left.row(Isa::Scalar, row, stat, group.outliers, &mut codes);
            // SAFETY: one part at a time.
            let out = unsafe { out.part(order.out(i) * n..(order.out(i) + 1) * n) };
            for (o, out) in out.iter_mut().enumerate() {
                let (weight, scale) = (group.weight.row(o), group.weight.scales.get(o));
                let value = |sum| {
                    let scale = scale.expect("one scale an output");
                    let y = scalar::scaled(sum, stat, *scale);
                    group.outliers.iter().fold(y, |y, &j| {
                        let a = left.input[row * left.depth + j].to_f32();
                        a.mul_add(decode(weight[j], *scale), y)
                    })
                };
                *out = O::define(scalar::dot(&codes, weight), value, group.bias.map(|b| b[o]));
            }
        }
    }
}

/// Rows of one group that go together through a pass.
struct Part {
    group: usize,
    rows: Range<usize>,
    /// Where they start in `Packed::codes`, in lanes.
    codes: usize,
    /// Where they start in `Packed::outliers`.
    outliers: usize,
    /// Where they start in `Packed::starts`.
    starts: usize,
}

impl Part {
    fn is_few(&self) -> bool {
        self.rows.len() <= FEW_ROWS
    }
}

/// The packed rows of a pass.
#[derive(Default)]
struct Packed {
    /// Tiles, `ROWS` lanes a group of columns; or the rows of a part with few as they are.
    codes: Vec<i32>,
    /// Of each tile, what its rows hold in outlier columns: `ROWS` values a column.
    outliers: Vec<f32>,
    /// Where the sums of each row start.
    starts: Vec<i32>,
}

/// What a thread needs to work on a panel.
#[derive(Default)]
struct Scratch {
    panel: Vec<Line>,
    scales: Vec<Line>,
    sums: Vec<Line>,
    codes: Vec<i8>,
}

thread_local! {
    // Kept from call to call: fresh pages cost more than a small product.
    static PACKED: Cell<Packed> = Cell::default();
    static SCRATCH: Cell<Scratch> = Cell::default();
}

fn with<S: Default, R>(
    kept: &'static std::thread::LocalKey<Cell<S>>,
    work: impl FnOnce(&mut S) -> R,
) -> R {
    let mut scratch = kept.take();
    let result = work(&mut scratch);
    kept.set(scratch);
    result
}

fn grow<V: Copy + Default>(buffer: &mut Vec<V>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, V::default());
    }
}

impl Default for Line {
    fn default() -> Self {
        Self::ZERO
    }
}

struct Engine<'a, T, O, M> {
    isa: Isa,
    left: &'a Left<'a, T>,
    order: Order<'a>,
    groups: &'a [Group<'a, O>],
    out: &'a Shared<'a, O>,
    micro: std::marker::PhantomData<fn() -> M>,
}

impl<'a, T: Element, O: Target, M: Micro> Engine<'a, T, O, M> {
    fn run(
        isa: Isa,
        left: &'a Left<'a, T>,
        order: Order<'a>,
        groups: &'a [Group<'a, O>],
        out: &'a Shared<'a, O>,
    ) {
        let engine = Self { isa, left, order, groups, out, micro: std::marker::PhantomData };
        with(&PACKED, |packed| {
            let lanes = left.depth.div_ceil(M::GROUP).max(Self::plain_lanes(left.depth));
            let outliers = groups.iter().map(|group| group.outliers.len()).max().unwrap_or(0);
            let row = 4 * (lanes + outliers);
            let most = (PASS / row.max(1)).min(MAX_ROWS).next_multiple_of(M::ROWS).max(M::ROWS);
            let mut parts: Vec<Part> = Vec::new();
            let mut taken = 0;
            for (group, Group { rows, .. }) in groups.iter().enumerate() {
                let mut start = rows.start;
                while start < rows.end {
                    let now = (most - taken).min(rows.end - start);
                    parts.push(Part {
                        group,
                        rows: start..start + now,
                        codes: 0,
                        outliers: 0,
                        starts: 0,
                    });
                    start += now;
                    taken += now;
                    if taken == most {
                        engine.pass(&mut parts, packed);
                        parts.clear();
                        taken = 0;
                    }
                }
            }
            engine.pass(&mut parts, packed);
        });
    }

    /// Lanes of a row as the few-rows way reads it: whole lines.
    fn plain_lanes(depth: usize) -> usize {
        depth.div_ceil(64) * LANES
    }

    fn tile_lanes(&self) -> usize {
        self.left.depth.div_ceil(M::GROUP) * M::ROWS
    }

    fn pass(&self, parts: &mut [Part], packed: &mut Packed) {
        let (mut codes, mut outliers, mut starts) = (0, 0, 0);
        // Every tile is packed by a task of its own; so are the rows of a part with few.
        let mut units = Vec::new();
        for (p, part) in parts.iter_mut().enumerate() {
            (part.codes, part.outliers, part.starts) = (codes, outliers, starts);
            starts += part.rows.len();
            let j = self.groups[part.group].outliers.len();
            if part.is_few() {
                codes += part.rows.len() * Self::plain_lanes(self.left.depth);
                outliers += part.rows.len() * j;
                units.push((p, 0));
            } else {
                let tiles = part.rows.len().div_ceil(M::ROWS);
                codes += tiles * self.tile_lanes();
                outliers += tiles * j * M::ROWS;
                units.extend((0..tiles).map(|tile| (p, tile)));
            }
        }
        grow(&mut packed.codes, codes);
        grow(&mut packed.outliers, outliers);
        grow(&mut packed.starts, starts);
        let parts = &*parts;
        {
            let codes = Shared::new(&mut packed.codes);
            let outliers = Shared::new(&mut packed.outliers);
            let starts = Shared::new(&mut packed.starts);
            let pack = |i: usize| {
                let (p, tile) = units[i];
                with(&SCRATCH, |scratch| {
                    // SAFETY: units are disjoint.
                    unsafe {
                        self.pack(&parts[p], tile, &codes, &outliers, &starts, &mut scratch.codes);
                    }
                });
            };
            if units.len() <= 2 {
                (0..units.len()).for_each(pack);
            } else {
                threads::run(units.len(), pack);
            }
        }
        let packed = &*packed;
        let tasks: Vec<(usize, Range<usize>)> = parts
            .iter()
            .enumerate()
            .flat_map(|(p, part)| {
                let n = self.groups[part.group].weight.out_features;
                let chunks = if part.is_few() {
                    Chunks::new(n, FEW_TASK / self.left.depth.max(1), LANES)
                } else {
                    Chunks::new(n, PANELS * M::LINES * LANES, LANES)
                };
                (0..chunks.count()).map(move |i| (p, chunks.range(i)))
            })
            .collect();
        threads::run(tasks.len(), |i| {
            let (p, outputs) = &tasks[i];
            let part = &parts[*p];
            with(&SCRATCH, |scratch| {
                if part.is_few() {
                    self.few(part, outputs, packed, scratch);
                } else {
                    self.panels(part, outputs, packed, scratch);
                }
            });
        });
    }

    /// Packs one tile, or all rows of a part with few.
    ///
    /// # Safety
    /// No other call packs the same tile of the same part.
    unsafe fn pack(
        &self,
        part: &Part,
        tile: usize,
        codes: &Shared<'_, i32>,
        outliers: &Shared<'_, f32>,
        starts: &Shared<'_, i32>,
        scratch: &mut Vec<i8>,
    ) {
        let (depth, columns) = (self.left.depth, self.groups[part.group].outliers);
        let j = columns.len();
        let reach = if part.is_few() { FEW_ROWS } else { M::ROWS };
        let first = tile * reach;
        let rows = part.rows.start + first..part.rows.end.min(part.rows.start + first + reach);
        // SAFETY: by the caller's contract.
        let starts = unsafe { starts.part(part.starts + first..part.starts + first + rows.len()) };
        let padded = Self::plain_lanes(depth) * 4;
        grow(scratch, padded);
        let row_codes = &mut scratch[..padded];
        row_codes[depth..].fill(0);
        if part.is_few() {
            for (m, i) in rows.enumerate() {
                let row = self.order.input(i);
                self.left.row(self.isa, row, self.stat(i), columns, &mut row_codes[..depth]);
                starts[m] = start::<M>(row_codes);
                let at = part.outliers + m * j;
                // SAFETY: by the caller's contract.
                self.left.take(row, columns, unsafe { outliers.part(at..at + j) }.iter_mut());
                let at = part.codes + m * padded / 4;
                // SAFETY: by the caller's contract.
                let lanes = unsafe { codes.part(at..at + padded / 4) };
                for (lane, codes) in lanes.iter_mut().zip(row_codes.as_chunks::<4>().0) {
                    *lane = i32::from_ne_bytes(codes.map(i8::cast_unsigned));
                }
            }
            return;
        }
        let at = part.codes + tile * self.tile_lanes();
        // SAFETY: by the caller's contract.
        let lanes = unsafe { codes.part(at..at + self.tile_lanes()) };
        let at = part.outliers + tile * j * M::ROWS;
        // SAFETY: by the caller's contract.
        let outliers = unsafe { outliers.part(at..at + j * M::ROWS) };
        if rows.len() < M::ROWS {
            lanes.fill(0);
            outliers.fill(0.0);
        }
        for (m, i) in rows.enumerate() {
            let row = self.order.input(i);
            self.left.row(self.isa, row, self.stat(i), columns, &mut row_codes[..depth]);
            starts[m] = start::<M>(row_codes);
            if depth > 0 {
                spread::<M>(row_codes, &mut lanes[m..]);
            }
            if j > 0 {
                self.left.take(row, columns, outliers[m..].iter_mut().step_by(M::ROWS));
            }
        }
    }

    /// Some panels of outputs for all tiles of a part.
    fn panels(&self, part: &Part, outputs: &Range<usize>, packed: &Packed, scratch: &mut Scratch) {
        let group = &self.groups[part.group];
        let Group { weight, bias, .. } = group;
        let tile_sums = M::ROWS * M::LINES;
        let panel_sums = part.rows.len().div_ceil(M::ROWS) * tile_sums;
        let wide = M::LINES * LANES;
        let panel_at = |start: usize| start..outputs.end.min(start + wide);
        let count = outputs.len().div_ceil(wide);
        grow(&mut scratch.sums, count * panel_sums);
        let sums = &mut scratch.sums[..count * panel_sums];
        for (i, sums) in sums.chunks_exact_mut(panel_sums).enumerate() {
            let now = panel_at(outputs.start + i * wide);
            let next = panel_at(now.end);
            self.multiply(part, &now, &next, packed, &mut scratch.panel, sums);
            if O::SCALED {
                load_scales(&weight.scales[now.clone()], M::LINES, &mut scratch.scales);
                for (i, row) in part.rows.clone().zip(sums.chunks_exact_mut(M::LINES)) {
                    // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
                    unsafe { M::scale(row, scalar::row_factor(self.stat(i)), &scratch.scales) };
                }
                let panel = &mut scratch.panel;
                each_outliers(group, &now, M::LINES, panel, |first, columns| {
                    let count = columns.len() / M::LINES;
                    for (tile, values) in sums.chunks_exact_mut(tile_sums).enumerate() {
                        let all = group.outliers.len();
                        let at = part.outliers + (tile * all + first) * M::ROWS;
                        let rows = &packed.outliers[at..][..count * M::ROWS];
                        // SAFETY: as above.
                        unsafe { M::multiply_add(rows, columns, values) };
                    }
                });
            }
        }
        // Rows of the output lie apart, too far for the processor to see the next one coming.
        let out_row = |i: usize| {
            let at = self.order.out(i) * weight.out_features;
            // SAFETY: tasks have disjoint rows or disjoint outputs.
            unsafe { self.out.part(at + outputs.start..at + outputs.end) }
        };
        let ask_for = |i: usize| {
            if i < part.rows.end {
                let bytes = out_row(i).as_ptr_range();
                let mut line = bytes.start.cast::<i8>();
                while line < bytes.end.cast() {
                    ask(line);
                    line = line.wrapping_add(size_of::<Line>());
                }
            }
        };
        let start = part.rows.start;
        (start..start + OUT_AHEAD).for_each(ask_for);
        for (m, i) in part.rows.clone().enumerate() {
            ask_for(i + OUT_AHEAD);
            let out = out_row(i);
            for (p, sums) in sums.chunks_exact(panel_sums).enumerate() {
                let now = panel_at(outputs.start + p * wide);
                let bias = bias.map(|b| &b[now.clone()]);
                let out = &mut out[now.start - outputs.start..now.end - outputs.start];
                // SAFETY: `M` as above.
                unsafe { O::store::<M>(&sums[m * M::LINES..][..M::LINES], bias, out) }
            }
        }
    }

    /// The sums of one panel; `next` is the one that comes then.
    fn multiply(
        &self,
        part: &Part,
        outputs: &Range<usize>,
        next: &Range<usize>,
        packed: &Packed,
        panel: &mut Vec<Line>,
        sums: &mut [Line],
    ) {
        let (depth, weight) = (self.left.depth, &self.groups[part.group].weight);
        let tiles = part.rows.len().div_ceil(M::ROWS);
        let starts = &packed.starts[part.starts..][..part.rows.len()];
        for (m, row) in sums.chunks_exact_mut(M::LINES).enumerate() {
            row.fill(Line([*starts.get(m).unwrap_or(&0); LANES]));
        }
        for start in (0..depth).step_by(DEPTH) {
            let now = start..depth.min(start + DEPTH);
            let mut rows = [&[][..]; 2 * LANES];
            for (row, o) in rows.iter_mut().zip(outputs.clone()) {
                *row = &weight.row(o)[now.clone()];
            }
            let groups = now.len().div_ceil(M::GROUP);
            grow(panel, groups * M::LINES);
            let panel = &mut panel[..groups * M::LINES];
            // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
            unsafe { M::pack_panel(&rows[..outputs.len()], panel) };
            // The next stretch of the same outputs, or the first of the next ones.
            let (rows, columns) = match now.end {
                end if end < depth => (outputs, end..depth.min(end + DEPTH)),
                _ => (next, 0..depth.min(DEPTH)),
            };
            let mut coming = Coming::new(weight, rows, &columns, tiles * groups.div_ceil(STEP));
            for (tile, sums) in sums.chunks_exact_mut(M::ROWS * M::LINES).enumerate() {
                let at = part.codes + tile * self.tile_lanes() + start / M::GROUP * M::ROWS;
                let rows = &packed.codes[at..][..groups * M::ROWS];
                let used = part.rows.len() - tile * M::ROWS;
                // SAFETY: as above.
                unsafe { M::multiply(rows, panel, sums, used, &mut coming) };
            }
        }
    }

    /// The statistic at position `i`; bare sums have none.
    fn stat(&self, i: usize) -> f32 {
        self.left.stats.get(i).copied().unwrap_or_default()
    }

    /// Some outputs of a part with few rows.
    fn few(&self, part: &Part, outputs: &Range<usize>, packed: &Packed, scratch: &mut Scratch) {
        let group = &self.groups[part.group];
        let Group { weight, bias, .. } = group;
        let lines = outputs.len().div_ceil(LANES);
        grow(&mut scratch.sums, part.rows.len() * lines);
        let sums = &mut scratch.sums[..part.rows.len() * lines];
        for (i, sums) in sums.chunks_mut(BATCH * lines).enumerate() {
            let first = i * BATCH;
            match sums.len() / lines {
                1 => self.batch::<1>(part, first, outputs, packed, sums),
                2 => self.batch::<2>(part, first, outputs, packed, sums),
                3 => self.batch::<3>(part, first, outputs, packed, sums),
                4 => self.batch::<4>(part, first, outputs, packed, sums),
                5 => self.batch::<5>(part, first, outputs, packed, sums),
                _ => self.batch::<BATCH>(part, first, outputs, packed, sums),
            }
        }
        if O::SCALED {
            load_scales(&weight.scales[outputs.clone()], lines, &mut scratch.scales);
            for (i, row) in part.rows.clone().zip(sums.chunks_exact_mut(lines)) {
                // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
                unsafe { M::scale(row, scalar::row_factor(self.stat(i)), &scratch.scales) };
            }
            let panel = &mut scratch.panel;
            each_outliers(group, outputs, lines, panel, |first, columns| {
                let count = columns.len() / lines;
                for (m, values) in sums.chunks_exact_mut(lines).enumerate() {
                    let at = part.outliers + m * group.outliers.len() + first;
                    let row = &packed.outliers[at..][..count];
                    // SAFETY: as above.
                    unsafe { M::add_columns(row, columns, values) };
                }
            });
        }
        let bias = bias.map(|b| &b[outputs.clone()]);
        for (i, row) in part.rows.clone().zip(sums.chunks_exact(lines)) {
            let at = self.order.out(i) * weight.out_features;
            // SAFETY: tasks have disjoint rows or disjoint outputs; `M` as above.
            unsafe {
                let out = self.out.part(at + outputs.start..at + outputs.end);
                O::store::<M>(row, bias, out);
            }
        }
    }

    /// The sums of `R` rows of a part with few.
    fn batch<const R: usize>(
        &self,
        part: &Part,
        first_row: usize,
        outputs: &Range<usize>,
        packed: &Packed,
        sums: &mut [Line],
    ) {
        let weight = &self.groups[part.group].weight;
        let lanes = Self::plain_lanes(self.left.depth);
        let rows: [&[i8]; R] = std::array::from_fn(|m| {
            let row = &packed.codes[part.codes + (first_row + m) * lanes..][..lanes];
            // SAFETY: an int32 is four int8.
            unsafe { std::slice::from_raw_parts(row.as_ptr().cast(), lanes * 4) }
        });
        let starts = &packed.starts[part.starts + first_row..][..R];
        let lines = sums.len() / R;
        for (i, first) in outputs.clone().step_by(TOGETHER).enumerate() {
            let weights: [&[i8]; TOGETHER] =
                std::array::from_fn(|i| weight.row((first + i).min(outputs.end - 1)));
            // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
            let four = unsafe { M::dots::<R>(rows, weights) };
            let (line, lane) = (i * TOGETHER / LANES, i * TOGETHER % LANES);
            for ((four, start), row) in four.iter().zip(starts).zip(sums.chunks_exact_mut(lines)) {
                for (to, sum) in row[line].0[lane..].iter_mut().zip(four) {
                    *to = sum.wrapping_add(*start);
                }
            }
        }
    }
}

/// Decodes the outlier columns of some outputs, `lines` lines each, a stretch of columns at a
/// time, and hands them on with the number of the first.
fn each_outliers<O>(
    group: &Group<'_, O>,
    outputs: &Range<usize>,
    lines: usize,
    decoded: &mut Vec<Line>,
    mut then: impl FnMut(usize, &[Line]),
) {
    for (stretch, columns) in group.outliers.chunks(OUTLIERS).enumerate() {
        grow(decoded, columns.len() * lines);
        let decoded = &mut decoded[..columns.len() * lines];
        decoded.fill(Line::ZERO);
        for (n, o) in outputs.clone().enumerate() {
            let (row, scale) = (group.weight.row(o), group.weight.scales[o]);
            let (line, lane) = (n / LANES, n % LANES);
            for (j, decoded) in columns.iter().zip(decoded.chunks_exact_mut(lines)) {
                decoded[line].0[lane] = bits(decode(row[*j], scale));
            }
        }
        then(stretch * OUTLIERS, decoded);
    }
}

/// The scales of some outputs, in `lines` lines; zeros behind them.
fn load_scales(scales: &[f32], lines: usize, to: &mut Vec<Line>) {
    to.clear();
    to.resize(lines, Line::ZERO);
    for (line, scales) in to.iter_mut().zip(scales.chunks(LANES)) {
        line.0.iter_mut().zip(scales).for_each(|(to, &scale)| *to = bits(scale));
    }
}

fn bits(value: f32) -> i32 {
    value.to_bits().cast_signed()
}

/// Where the sums of a row start.
fn start<M: Micro>(codes: &[i8]) -> i32 {
    // In stretches that an int16 can hold, which vectorizes well.
    let stretch = |codes: &[i8]| codes.iter().map(|&q| i16::from(q)).sum::<i16>();
    let sum: i32 = codes.chunks(255).map(|codes| i32::from(stretch(codes))).sum();
    -M::LIFT * sum
}

/// Writes a row's codes into every `ROWS`-th lane.
fn spread<M: Micro>(codes: &[i8], lanes: &mut [i32]) {
    let lanes = lanes.iter_mut().step_by(M::ROWS);
    if M::GROUP == 4 {
        for (lane, codes) in lanes.zip(codes.as_chunks::<4>().0) {
            *lane = i32::from_ne_bytes(codes.map(i8::cast_unsigned));
        }
    } else {
        for (lane, &[a, b]) in lanes.zip(codes.as_chunks::<2>().0) {
            *lane = i32::from(b) << 16 | i32::from(a) & 0xFFFF;
        }
    }
}

//! Products of activations with a quantized weight, in float32: [`forward`] for more rows than
//! `matmul_4bit/few_rows` takes, and [`grad_input`] for any number. Both are one blocked product,
//!
//! ```text
//! sum[b][l] = Σ_t broadcast[b][t] * lanes[l][t]          lanes   broadcast   t
//! forward:    out[m][o]  = Σ_k  weight[o][k] * input[m][k]    m       o      k
//! grad_input: out[m][k]  = Σ_o  grad[m][o] * weight[o][k]     k       m      o
//! ```
//!
//! ```text
//! for each task = (a chunk of lanes, a chunk of broadcast rows):          (in parallel)
//!     for each stretch of DEPTH values of t:
//!         lanes block  = those lanes over the stretch, float32, t-major    (in L2)
//!         for each REACH broadcast rows:
//!             panel = those rows over the stretch, float32                 (in L1)
//!             for each LINES lines of 16 lanes:
//!                 tile = Σ_t panel[b][t] * line[t]                         (in registers)
//!                 sums += tile                                             (in L2)
//!     round the sums to T
//! ```
//!
//! Liberties taken with the definition in `scalar.rs`:
//!
//! 1. Whichever side is the weight is decoded on its way into the block or panel, once per chunk
//!    of up to [`MAX_ROWS`] rows, so that the dequantized weight never exists: a thread holds at
//!    most [`SCRATCH`] lines, 1 MiB, whatever the shapes. The forward product decodes rows as they
//!    lie and transposes the activations; the gradient decodes into the lanes side and only widens
//!    the gradient. Neither transposes the weight.
//! 2. Ends are filled up with zeros: the last 16 of `t` on both sides, lanes and rows of the last
//!    tile. A product of two zeros adds nothing; lanes and rows past the end are never written.
//! 3. While one tile is multiplied, what the next panel and block read is asked for ([`Ahead`]).
//! 4. Sums are fused multiply-adds, `t` cut into stretches.
//!
//! The order of summation depends on nothing but `t` and [`DEPTH`], so the bytes are the same for
//! any number of threads. A stretch is summed by one chain of fused multiply-adds and stretches
//! are added in order, hence, with `u = 2^-24`, `n` the length of the sum and `w` the weight
//! decoded to float32 ([`Weight::decode_row`]),
//!
//! ```text
//! |sum - exact| <= (min(n, DEPTH) + n.div_ceil(DEPTH)) * u / (1 - that) * Σ_t |x[t] * w[t]|
//! ```
//!
//! before the bias (one more rounding) and the rounding to `T`. [`grad_input_shared`] adds such
//! sums of several weights, with one more rounding for each.
//!
//! One call may take several weights, each with rows of its own ([`Part`]): all their tasks run
//! together. A row's sums do not depend on which rows are beside it, so that its bytes are those
//! of a call of its own.
//!
//! An instruction set supplies [`Micro`], the seam for a processor with matrix tiles (AMX) too: it
//! would keep bfloat16 pairs in the same blocks and panels. Only the filling up with zeros and the
//! transposition of activations, here, count on the layout above.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod products;
mod rows;
pub(in crate::ops) mod scalar;
mod weight;

pub(in crate::ops) use rows::{All, Routed, Rows};
pub(in crate::ops) use weight::{Run, Weight};

use super::ahead::{Ahead, prefetch};
use crate::Element;
use crate::isa::Isa;
use crate::threads::{self, Chunks, Shared};
use products::{Added, Forward, GradInput, Output, Rounded};
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

/// Sixteen float32: the unit of every block, panel and tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::ops) struct Line([f32; LANES]);
const LANES: usize = 16;
const _: () = assert!(size_of::<Line>() == 64);

impl Line {
    const ZERO: Self = Self([0.0; LANES]);
}

/// Values of `t` in one stretch: a panel of it (8 KiB) stays in L1 beside what streams from L2.
pub(in crate::ops) const DEPTH: usize = 256;
/// Distance of a block's lines. One more than needed, so that what lies at the same `t` in
/// different lines does not compete for one set of the cache.
const STRIDE: usize = DEPTH + 1;
/// Scratch for a panel, or for 16 rows of activations on their way to being transposed.
const PANEL: usize = DEPTH;
/// Lines of scratch a thread may hold: 1 MiB.
const SCRATCH: usize = (1 << 20) / size_of::<Line>();
/// Rows of activations in a task at most.
const MAX_ROWS: usize = 256;
/// Lanes in a task at most.
const MAX_LANES: usize = 512;
/// Features in a task at least, where that leaves threads without work.
const FEW_FEATURES: usize = 64;
/// The most columns of a weight that are decoded at once.
pub(in crate::ops) const MAX_RUN: usize = MAX_LANES;
const _: () = assert!(DEPTH <= MAX_RUN);
/// Sums of tokens that a thread may hold besides ([`grad_input_shared`]): 1 MiB.
const TOKEN_SUMS: usize = SCRATCH;

/// What an instruction set brings: the register tile and the ways in and out of it.
///
/// # Safety
/// Every function requires the instruction set to be present on this machine, and nothing else:
/// the slices are checked.
pub(in crate::ops) trait Micro: 'static {
    /// Lines that a tile spans at most.
    const LINES: usize;
    /// Broadcast rows of a tile.
    const REACH: usize;

    /// `sums[l][b] (+)= Σ_t panel[t / 16][b][t % 16] * block[l][t]`, over `16 * groups` values of
    /// `t`, for `lines` lines that lie `stride` apart in `block`; overwrites unless `add`.
    unsafe fn multiply(
        block: &[Line],
        stride: usize,
        lines: usize,
        panel: &[Line],
        sums: &mut [Line],
        add: bool,
        ahead: &Ahead,
    );

    /// Decodes a run, 16 codes to a line, lines `stride` apart; the last is filled up with zeros.
    unsafe fn decode4(run: &Run<'_>, out: &mut [Line], stride: usize);

    /// `code * factors[0] * factors[1]`, laid out as by `decode4`.
    unsafe fn decode8(codes: &[i8], factors: [f32; 2], out: &mut [Line], stride: usize);

    /// Widens elements, 16 to a line, lines `stride` apart; the last is filled up with zeros.
    unsafe fn widen<T: Element>(elements: &[T], out: &mut [Line], stride: usize);

    /// Rounds the first `out.len()` lanes to `T`.
    unsafe fn narrow<T: Element>(line: &Line, out: &mut [T]);

    /// `out[i][j] = rows[j][i]`.
    unsafe fn transpose(rows: [&Line; LANES], out: &mut [Line; LANES]);
}

enum Side {
    Lanes,
    Broadcast,
}

/// The two sides and the result of a product. Ranges that it is given are not empty.
trait Product: Sync {
    type M: Micro;
    /// Which side the rows of activations are; the weight's features are the other.
    const ROWS: Side;
    fn rows(&self) -> usize;
    fn features(&self) -> usize;
    /// Length of the sums.
    fn depth(&self) -> usize;
    /// Fills `block[l][t]`, lines `stride` apart; what is left of the last line of lanes and of
    /// the last 16 of `t` becomes zero.
    fn fill_block(
        &self,
        lanes: Range<usize>,
        t: Range<usize>,
        block: &mut [Line],
        stride: usize,
        spare: &mut [Line],
    );
    /// Starts bringing what `fill_block` will read into the cache: steps `steps` of `n`.
    fn fetch_block(
        &self,
        lanes: &Range<usize>,
        t: &Range<usize>,
        steps: Range<usize>,
        n: usize,
        ahead: &mut Ahead,
    );
    /// Fills one row of a panel, lines `stride` apart.
    fn fill_row(&self, b: usize, t: Range<usize>, panel: &mut [Line], stride: usize);
    /// Starts bringing what `fill_row` will read into the cache.
    fn fetch_row(&self, b: usize, t: Range<usize>, ahead: &mut Ahead);
    /// Writes `line(i, b)`, the sums of lanes `lanes.start + 16 * i ..` and row `b`, to the result.
    fn finish<'a>(
        &self,
        lanes: Range<usize>,
        broadcast: Range<usize>,
        line: impl Fn(usize, usize) -> &'a Line,
    );
}

/// How a product is cut: every chunk of rows with every chunk of features is a task.
struct Tasks {
    rows: Chunks,
    features: Chunks,
}

impl Tasks {
    /// Chunks as large as the scratch allows, which shares the work of decoding and packing among
    /// many multiplications, but enough of them to keep every thread busy, given that all products
    /// of the call have `all_rows` rows. The result does not depend on the choice.
    fn new<P: Product>(product: &P, all_rows: usize) -> Self {
        let threads = threads::num_threads();
        let rows = even(product.rows(), product.rows().div_ceil(MAX_ROWS), LANES);
        let longest = rows.range(0).len();
        let (granule, most) = match P::ROWS {
            Side::Lanes => {
                let (reach, lines) = (P::M::REACH, longest.div_ceil(LANES));
                (reach, ((SCRATCH - PANEL) / lines - STRIDE) / reach * reach)
            }
            Side::Broadcast => {
                let reached = longest.next_multiple_of(P::M::REACH);
                (LANES, ((SCRATCH - PANEL) / (STRIDE + reached) * LANES).min(MAX_LANES))
            }
        };
        let features = product.features();
        let alone = product.rows() == all_rows;
        // Products of different sizes come out even with more tasks only.
        let wanted = if alone { 4 * threads } else { 16 * threads };
        let wanted = (wanted * product.rows()).div_ceil(all_rows);
        let busy = wanted.div_ceil(rows.count()).min(features.div_ceil(FEW_FEATURES));
        let mut count = features.div_ceil(most).max(busy);
        if alone && count >= threads {
            while !(count * rows.count()).is_multiple_of(threads) {
                count += 1;
            }
        }
        Self { rows, features: even(features, count, granule) }
    }
}

/// About `count` chunks of equal size, a multiple of `granule`.
fn even(len: usize, count: usize, granule: usize) -> Chunks {
    Chunks::new(len, len.div_ceil(count), granule)
}

/// Products whose tasks run together.
struct Plan<P> {
    /// With each product, the number of tasks of those before it.
    products: Vec<(usize, P, Tasks)>,
    tasks: usize,
}

impl<P: Product> Plan<P> {
    /// Leaves out products without rows.
    fn new(products: impl Iterator<Item = P> + Clone) -> Self {
        let all_rows = products.clone().map(|p| p.rows()).sum();
        let mut plan = Self { products: Vec::new(), tasks: 0 };
        for product in products.filter(|p| p.rows() > 0) {
            let tasks = Tasks::new(&product, all_rows);
            let before = plan.tasks;
            plan.tasks += tasks.rows.count() * tasks.features.count();
            plan.products.push((before, product, tasks));
        }
        plan
    }

    fn run(&self, i: usize) {
        let at = self.products.partition_point(|(before, ..)| *before <= i) - 1;
        let (before, product, Tasks { rows, features }) = &self.products[at];
        let i = i - before;
        let rows = rows.range(i / features.count());
        let features = features.range(i % features.count());
        with_scratch(SCRATCH, |scratch| match P::ROWS {
            Side::Lanes => task(product, rows, features, scratch),
            Side::Broadcast => task(product, features, rows, scratch),
        });
    }
}

fn task<P: Product>(
    product: &P,
    lanes: Range<usize>,
    broadcast: Range<usize>,
    scratch: &mut [Line],
) {
    let (most, reach) = (P::M::LINES, P::M::REACH);
    let lines = lanes.len().div_ceil(LANES);
    let (block, scratch) = scratch.split_at_mut(lines * STRIDE);
    let (panel, sums) = scratch.split_at_mut(PANEL);
    let panels = broadcast.len().div_ceil(reach);
    let early = panels - panels.div_ceil(4).max(panels.min(4));
    let mut fetch = Ahead::new();
    let stretch = |start: usize| start..(start + DEPTH).min(product.depth());
    let mut t = stretch(0);
    while !t.is_empty() {
        let next = stretch(t.end);
        product.fill_block(lanes.clone(), t.clone(), block, STRIDE, panel);
        let panel = &mut panel[..t.len().div_ceil(LANES) * reach];
        for (p, sums) in sums.chunks_mut(lines * reach).take(panels).enumerate() {
            for i in 0..reach {
                let b = broadcast.start + p * reach + i;
                if b < broadcast.end {
                    product.fill_row(b, t.clone(), &mut panel[i..], reach);
                } else {
                    panel.iter_mut().skip(i).step_by(reach).for_each(|l| *l = Line::ZERO);
                }
            }
            // Rows and columns are too short for the processor to see them coming, and asking for
            // many at once would stall it: what is needed next is asked for between tiles.
            let (ahead, ahead_t) = if p + 1 < panels {
                (broadcast.start + (p + 1) * reach, t.clone())
            } else {
                (broadcast.start, next.clone())
            };
            let ahead = ahead..(ahead + reach).min(broadcast.end);
            let mut line = 0;
            while line < lines {
                let now = tile(lines - line, most);
                fetch.clear();
                if !ahead_t.is_empty() {
                    for b in share(&ahead, line..line + now, lines) {
                        product.fetch_row(b, ahead_t.clone(), &mut fetch);
                    }
                }
                if !next.is_empty() && p >= early {
                    let step = (p - early) * lines + line;
                    product.fetch_block(
                        &lanes,
                        &next,
                        step..step + now,
                        (panels - early) * lines,
                        &mut fetch,
                    );
                }
                let block = &block[line * STRIDE..];
                let sums = &mut sums[line * reach..][..now * reach];
                // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
                unsafe { P::M::multiply(block, STRIDE, now, panel, sums, t.start > 0, &fetch) };
                line += now;
            }
        }
        t = next;
    }
    product.finish(lanes, broadcast.clone(), |line, b| {
        let b = b - broadcast.start;
        &sums[(b / reach * lines + line) * reach + b % reach]
    });
}

/// Steps `steps` of the `n` in which a range is worked through.
fn share(range: &Range<usize>, steps: Range<usize>, n: usize) -> Range<usize> {
    let at = |step| range.start + range.len() * step / n;
    at(steps.start)..at(steps.end)
}

/// Lines of the next tile, of those that are left: a tile of one line is bound by its loads, so
/// the last four are two and two.
fn tile(left: usize, most: usize) -> usize {
    if left == 4 && most == 3 { 2 } else { left.min(most) }
}

/// Lends this thread's scratch, which stays allocated: fresh pages cost more than a small task.
fn with_scratch(lines: usize, work: impl FnOnce(&mut [Line])) {
    thread_local!(static KEPT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) });
    let mut scratch = KEPT.take();
    if scratch.len() < lines {
        scratch.resize(lines, Line::ZERO);
    }
    work(&mut scratch[..lines]);
    KEPT.set(scratch);
}

/// A weight and the rows that it meets.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Part<'a, T, W, R> {
    pub(in crate::ops) weight: W,
    pub(in crate::ops) rows: R,
    /// Of the forward product.
    pub(in crate::ops) bias: Option<&'a [T]>,
}

/// Tasks that may run in any order and at the same time.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Work<'a> {
    pub(in crate::ops) tasks: usize,
    pub(in crate::ops) run: &'a (dyn Fn(usize) + Sync),
}

impl Work<'_> {
    pub(in crate::ops) const NONE: Self = Self { tasks: 0, run: &|_| () };
}

/// Runs the tasks, spread over threads.
pub(in crate::ops) fn spread(work: Work<'_>) {
    threads::run(work.tasks, work.run);
}

/// `out = input · weight^T + bias` for the rows of each part. The tasks are handed to `spread`.
///
/// Rows of all parts have different outputs; all parts' weights have the same shape.
pub(in crate::ops) fn forward<T: Element, W: Weight, R: Rows>(
    isa: Isa,
    input: &[T],
    parts: &[Part<'_, T, W, R>],
    out: &Shared<'_, T>,
    spread: impl FnOnce(Work<'_>),
) {
    fn with<T: Element, M: Micro, W: Weight, R: Rows>(
        input: &[T],
        parts: &[Part<'_, T, W, R>],
        out: &Shared<'_, T>,
        spread: impl FnOnce(Work<'_>),
    ) {
        let forward =
            |part: &_| Forward::<T, M, W, R> { input, part: *part, out, micro: PhantomData };
        let plan = Plan::new(parts.iter().map(forward));
        spread(Work { tasks: plan.tasks, run: &|i| plan.run(i) });
    }
    let empty = parts.iter().all(|p| p.weight.out_features() == 0 || p.weight.in_features() == 0);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if !empty => with::<T, avx512::Avx512, W, R>(input, parts, out, spread),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 if !empty => with::<T, avx2::Avx2, W, R>(input, parts, out, spread),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon if !empty => with::<T, neon::Neon, W, R>(input, parts, out, spread),
        _ => {
            for part in parts {
                scalar::forward(input, part, out);
            }
            spread(Work::NONE);
        }
    }
}

/// `out = grad_output · weight` for the rows of each part.
///
/// Rows of all parts have different outputs; all parts' weights have the same shape.
pub(in crate::ops) fn grad_input<T: Element, W: Weight, R: Rows>(
    isa: Isa,
    grad_output: &[T],
    parts: &[Part<'_, T, W, R>],
    out: &mut [T],
) {
    fn with<T: Element, M: Micro, W: Weight, R: Rows>(
        grad_output: &[T],
        parts: &[Part<'_, T, W, R>],
        out: &mut [T],
    ) {
        let out = &Shared::new(out);
        let plan = Plan::new(parts.iter().map(|&Part { weight, rows, .. }| {
            let out = Rounded { out, columns: weight.in_features() };
            GradInput::<T, M, W, R, _> { grad_output, weight, rows, out, micro: PhantomData }
        }));
        threads::run(plan.tasks, |i| plan.run(i));
    }
    match isa {
        _ if out.is_empty() => (),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if !grad_output.is_empty() => {
            with::<T, avx512::Avx512, W, R>(grad_output, parts, out);
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 if !grad_output.is_empty() => {
            with::<T, avx2::Avx2, W, R>(grad_output, parts, out);
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon if !grad_output.is_empty() => {
            with::<T, neon::Neon, W, R>(grad_output, parts, out);
        }
        _ => {
            for part in parts {
                let k = part.weight.in_features();
                let sums = scalar::grad_input(grad_output, part);
                for (m, sums) in sums.chunks_exact(k).enumerate() {
                    let out = &mut out[part.rows.output(m) * k..][..k];
                    out.iter_mut().zip(sums).for_each(|(o, s)| *o = T::from_f32(*s));
                }
            }
        }
    }
}

/// As [`grad_input`], with the `sharing` rows of each token (some of them perhaps in no part)
/// summed in float32: part after part, and within a part in the order of its rows, which ascend.
///
/// - `out`: `[tokens, in_features]`.
///
/// ```text
/// for each task = (a chunk of tokens, a chunk of lanes):                  (in parallel)
///     sums = 0                                                            (in L2)
///     for each part:
///         sums += the product of the part's rows that belong to the tokens
///     round the sums to T
/// ```
pub(in crate::ops) fn grad_input_shared<T: Element, W: Weight>(
    isa: Isa,
    grad_output: &[T],
    parts: &[Part<'_, T, W, Routed<'_>>],
    sharing: usize,
    in_features: usize,
    out: &mut [T],
) {
    match isa {
        _ if out.is_empty() => (),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if !grad_output.is_empty() => {
            shared::<T, avx512::Avx512, W>(grad_output, parts, sharing, in_features, out);
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 if !grad_output.is_empty() => {
            shared::<T, avx2::Avx2, W>(grad_output, parts, sharing, in_features, out);
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon if !grad_output.is_empty() => {
            shared::<T, neon::Neon, W>(grad_output, parts, sharing, in_features, out);
        }
        _ => {
            let mut all = vec![0.0; out.len()];
            for part in parts {
                let sums = scalar::grad_input(grad_output, part);
                for (row, sums) in part.rows.rows.iter().zip(sums.chunks_exact(in_features)) {
                    let all = &mut all[row / sharing * in_features..][..in_features];
                    all.iter_mut().zip(sums).for_each(|(a, s)| *a += s);
                }
            }
            out.iter_mut().zip(all).for_each(|(o, a)| *o = T::from_f32(a));
        }
    }
}

fn shared<T: Element, M: Micro, W: Weight>(
    grad_output: &[T],
    parts: &[Part<'_, T, W, Routed<'_>>],
    sharing: usize,
    in_features: usize,
    out: &mut [T],
) {
    let tokens = out.len() / in_features;
    // Weights are decoded once for each chunk of tokens: long chunks, of lanes as few as it takes.
    let longest = TOKEN_SUMS / (FEW_FEATURES / LANES);
    let tokens = even(tokens, tokens.div_ceil(longest), 1);
    let most = (TOKEN_SUMS / tokens.range(0).len() * LANES).min(MAX_LANES);
    let busy = (4 * threads::num_threads()).div_ceil(tokens.count());
    let busy = busy.min(in_features.div_ceil(FEW_FEATURES));
    let lanes = even(in_features, in_features.div_ceil(most).max(busy), LANES);
    let out = Shared::new(out);
    threads::run(tokens.count() * lanes.count(), |i| {
        let tokens = tokens.range(i / lanes.count());
        let lanes = lanes.range(i % lanes.count());
        let lines = lanes.len().div_ceil(LANES);
        with_scratch(TOKEN_SUMS + SCRATCH, |scratch| {
            let (sums, scratch) = scratch.split_at_mut(TOKEN_SUMS);
            let sums = &mut sums[..tokens.len() * lines];
            sums.fill(Line::ZERO);
            // What a chunk of rows leaves of the scratch is enough for its sums.
            let most = ((SCRATCH - PANEL) / lines - STRIDE) / M::REACH * M::REACH;
            for &Part { weight, rows: Routed { rows, .. }, .. } in parts {
                let row = |token| rows.partition_point(|row| *row < token * sharing);
                let rows = &rows[row(tokens.start)..row(tokens.end)];
                let chunks = even(rows.len(), rows.len().div_ceil(most.min(MAX_ROWS)).max(1), 1);
                for chunk in 0..chunks.count() {
                    let rows = Routed { rows: &rows[chunks.range(chunk)], sharing: 1 };
                    let (tokens, lanes) = (tokens.clone(), lanes.clone());
                    let range = lanes.clone();
                    let out = Added { sums: Shared::new(sums), tokens, lanes, sharing };
                    let product = GradInput::<T, M, W, _, _> {
                        grad_output,
                        weight,
                        rows,
                        out,
                        micro: PhantomData,
                    };
                    task(&product, range, 0..rows.len(), scratch);
                }
            }
            for (token, sums) in tokens.zip(sums.chunks_exact(lines)) {
                for (first, line) in lanes.clone().step_by(LANES).zip(sums) {
                    let columns = first..(first + LANES).min(lanes.end);
                    let rounded = Rounded { out: &out, columns: in_features };
                    rounded.write::<M>(token, columns, line);
                }
            }
        });
    });
}

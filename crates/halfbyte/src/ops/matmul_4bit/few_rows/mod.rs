//! The product for few activation rows: each weight code is read once, and the time goes to
//! reading packed bytes (one row) or to multiply-adds (16 rows).
//!
//! ```text
//! for each output feature o, in tasks:
//!     for each block of row o: scale = the block's absmax
//!         for each code q:     acc[m] += x[m][k] * (table[q] * scale)
//!     out[m][o] = round(sum of acc[m] + bias[o])
//! ```
//!
//! Liberties taken with it:
//! 1. Codes are decoded a *group* of 8 vectors at a time, in the lane order that costs the fewest
//!    instructions ([`Kernel::CODE_AT`]); the activations are put into the same order once a call.
//! 2. In the usual case, blocks of 64 that start where rows start, scales are read where they
//!    stand ([`Halves`]) or looked up in tables of the 256 values that a second-level block can
//!    take ([`Tabulated`]). Otherwise they are first spread, one float32 for each *unit* of 8
//!    codes, that is 4 packed bytes ([`Units`]).
//! 3. For the fewest rows ([`Kernel::DIRECT_ROWS`]) decoded codes stay in registers and the scale
//!    multiplies the unit's partial sum. For more rows a tile of the weight is decoded into the
//!    first-level cache and multiplied by all rows from there.
//! 4. Rows whose units straddle two blocks (`in_features` no multiple of 8) take the tiled way
//!    with the few codes behind each border decoded again by plain code.
//!
//! Every output is one chain of multiply-adds per lane over ascending groups, then a fixed tree
//! over lanes: which thread computes it does not change its bits. The two ways of liberty 3 differ
//! from each other in the last bits, so the number of rows can.
//!
//! With `u = 2^-24`, `n = in_features`, and weights taken as the exact `table[q] * scale`, a result
//! before its final rounding lies within `(n / LANES + 16) * u * (sum |x * w| + |bias|)` of the
//! exact one, to first order and short of underflow: `n / LANES` additions in a lane at most, 8 in
//! a unit, 4 in the tree, the products and the bias. `LANES` is 16, 8 and 4 for AVX-512, AVX2 and
//! NEON.

// Everything between a function that enables an instruction set and its intrinsics is inlined into
// it, or the intrinsics become calls; arrays of registers are indexed by constants once unrolled.
#![allow(clippy::inline_always, clippy::needless_range_loop)]
#![allow(clippy::manual_midpoint)] // half the number of a code is the number of its byte

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(test)]
mod tests;

use super::Weight4;
use crate::Element;
use crate::blocks::BlockSize;
use crate::isa::Isa;
use crate::ops::gemm::{self, All, Part, Rows, Work, scalar};
use crate::ops::{NestedScales, Scales};
use crate::threads::{self, Chunks, Shared};
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The most rows for which this way beats the general product.
pub(in crate::ops) const MAX_ROWS: usize = 16;

/// Codes per unit: a unit is 4 packed bytes, and has one scale.
const UNIT: usize = 8;
/// Vectors per group.
const GROUP_VECTORS: usize = 8;
/// Output features per block of a task: their running sums stay in the caches.
const BLOCK: usize = 48;
/// Codes of a weight row per tile, at most.
const TILE: usize = 1024;
/// Activations of a tile, all rows': half of the first-level cache, which holds the weight's tile
/// and the running sums besides.
const TILE_FLOATS: usize = 6144;
/// Activations of a stretch of the direct way, all rows': less than the first-level cache.
const SEGMENT: usize = 8192;
/// Tables of second-level blocks that are kept; a power of two.
const TABLES: usize = 4;
/// Reordered activations of one pass over the weight: at most 1 MiB (or one row, if longer).
const PASS_FLOATS: usize = 1 << 18;
/// Multiply-adds worth a task of its own, about 5 us.
const TASK_WORK: usize = 1 << 17;

/// As [`super::matmul_4bit`], for any number of rows, in passes of at most [`MAX_ROWS`].
pub(super) fn forward<T: Element>(
    isa: Isa,
    input: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let part = Part { weight: *weight, rows: All(rows), bias };
    forward_parts(isa, input, &[part], &Shared::new(out), Work::NONE);
}

/// As [`forward`] for the rows of each part, which have different outputs, and `beside` runs with
/// them. A part's bytes are those of a call of its own.
pub(in crate::ops) fn forward_parts<T: Element, R: Rows>(
    isa: Isa,
    input: &[T],
    parts: &[Part<'_, T, Weight4<'_>, R>],
    out: &Shared<'_, T>,
    beside: Work<'_>,
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => spread::<T, avx512::Avx512, R>(input, parts, out, beside),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => spread::<T, avx2::Avx2, R>(input, parts, out, beside),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => spread::<T, neon::Neon, R>(input, parts, out, beside),
        _ => {
            for part in parts {
                scalar::forward(input, part, out);
            }
            gemm::spread(beside);
        }
    }
}

/// The vectors of one instruction set. All functions are unsafe for one reason: they must be
/// inlined into a function that enables the instruction set, on a machine that has it.
trait Kernel: Sized {
    /// A vector of float32.
    type V: Copy;
    /// Float32 lanes per vector, and units per group.
    const LANES: usize;
    /// Codes per group.
    const GROUP: usize = GROUP_VECTORS * Self::LANES;
    /// The code, counted from the start of its group, that lane `i % LANES` of vector `i / LANES`
    /// holds. Only the first `GROUP` entries count.
    const CODE_AT: [u8; 128];
    /// Distinct scale vectors in a group; vector `v` takes number `v * SCALES / 8`.
    const SCALES: usize;
    /// Weight rows that share each load of the activations, when tiled.
    const WEIGHT_ROWS: usize;
    /// Activation rows that share each load of the weight, when tiled.
    const ROWS: usize;
    /// The most rows that go the direct way.
    const DIRECT_ROWS: usize;
    /// The decoding table, in registers.
    type Table: Copy;
    /// A group as read.
    type Codes: Copy;

    unsafe fn table(table: &[f32; 16]) -> Self::Table;
    /// Reads the `GROUP / 2` bytes at `packed`. `PAST_END` permits reading 3 bytes more.
    unsafe fn read<const PAST_END: bool>(table: Self::Table, packed: *const u8) -> Self::Codes;
    /// The decoded vector `i` of a group. A function of its own, so that look-ups and multiply-adds
    /// alternate: all look-ups first would fill the scheduler with waiting multiply-adds.
    unsafe fn vector(table: Self::Table, codes: &Self::Codes, i: usize) -> Self::V;
    /// Lane by lane, the scales of the vectors that take scale vector `i`, from the `LANES` units'
    /// scales at `units`.
    unsafe fn scale(units: *const f32, i: usize) -> Self::V;
    /// The scales of a group whose first 64 codes have the scale `low`, the rest (if any) `high`.
    unsafe fn halves(low: f32, high: f32) -> Self::V;

    unsafe fn zero() -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// The sum of all lanes.
    unsafe fn sum(v: Self::V) -> f32;
    /// The sums of all lanes of four vectors, each as any other time.
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4] {
        let [a, b, c, d] = v;
        // SAFETY: the caller's promise.
        unsafe { [Self::sum(a), Self::sum(b), Self::sum(c), Self::sum(d)] }
    }
    /// Fetches a line of the packed weight ahead of its use. Any address will do.
    unsafe fn prefetch(at: *const u8);
    /// `LANES` elements as float32.
    unsafe fn widen<T: Element>(from: *const T) -> Self::V;
    /// Rounds and stores `LANES` elements.
    unsafe fn narrow<T: Element>(to: *mut T, v: Self::V);

    /// Stores 8 times `scale`.
    unsafe fn splat8(to: *mut f32, scale: f32);

    /// [`pack`] with the instruction set enabled.
    unsafe fn pack<T: Element>(rows: &[&[T]], layout: Layout, to: &mut [Line]);
    /// [`Product::block`] with the instruction set enabled.
    unsafe fn block(product: &Product<'_>, features: Range<usize>, sums: &mut Sums);
    /// [`finish`] with the instruction set enabled.
    unsafe fn finish<T: Element>(sums: &[f32], bias: Option<&[T]>, out: &mut [T]);
}

/// A cache line of float32.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

const _: () = assert!(size_of::<Line>() == 64);

/// Where the reordered activations lie: for each batch of at most `Kernel::ROWS` rows, for each
/// vector of each group, that vector of each row of the batch.
#[derive(Clone, Copy)]
struct Layout {
    rows: usize,
    in_features: usize,
    /// Rows of all batches but the last, which may be shorter.
    batch: usize,
    groups: usize,
    group: usize,
}

impl Layout {
    fn new<K: Kernel>(rows: usize, in_features: usize) -> Self {
        let batch = rows.div_ceil(rows.div_ceil(K::ROWS));
        Self { rows, in_features, batch, groups: in_features.div_ceil(K::GROUP), group: K::GROUP }
    }

    /// Float32 values in a batch's part per row.
    const fn padded(self) -> usize {
        self.groups * self.group
    }

    /// Start of the vectors of `group` in the batch that starts at `row`.
    const fn at(self, row: usize, group: usize) -> usize {
        row * self.padded() + group * self.group * self.batch_rows(row)
    }

    const fn batch_rows(self, row: usize) -> usize {
        let left = self.rows - row;
        if left < self.batch { left } else { self.batch }
    }
}

thread_local! {
    /// The reordered activations' memory, kept from call to call.
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Some rows of a part, which pass over its weight together.
struct Pass<'a, 'b, T, R> {
    part: &'b Part<'a, T, Weight4<'a>, R>,
    /// Number of the first row in the part.
    first: usize,
    layout: Layout,
    /// Where the reordered activations start, in lines.
    x: usize,
    tasks: Chunks,
    /// Tasks of the passes before.
    before: usize,
}

/// Passes that run together: as many as the scratch takes, at least one.
struct Wave<'a, 'b, T, R> {
    passes: Vec<Pass<'a, 'b, T, R>>,
    lines: usize,
    tasks: usize,
}

fn spread<T: Element, K: Kernel, R: Rows>(
    input: &[T],
    parts: &[Part<'_, T, Weight4<'_>, R>],
    out: &Shared<'_, T>,
    mut beside: Work<'_>,
) {
    let mut scratch = SCRATCH.take();
    let mut wave = Wave { passes: Vec::new(), lines: 0, tasks: 0 };
    for part in parts {
        let (n, k) = (part.weight.out_features, part.weight.in_features);
        let per_pass = (PASS_FLOATS / k.next_multiple_of(K::GROUP).max(1)).clamp(1, MAX_ROWS);
        for first in (0..part.rows.len()).step_by(per_pass) {
            let rows = per_pass.min(part.rows.len() - first);
            let layout = Layout::new::<K>(rows, k);
            let lines = (rows * layout.padded()).div_ceil(16);
            if (wave.lines + lines) * 16 > PASS_FLOATS && !wave.passes.is_empty() {
                wave.run::<K>(input, &mut scratch, out, beside);
                wave = Wave { passes: Vec::new(), lines: 0, tasks: 0 };
                beside = Work::NONE;
            }
            let tasks = Chunks::new(n, TASK_WORK / (rows * k).max(1), BLOCK);
            let (x, before) = (wave.lines, wave.tasks);
            wave.passes.push(Pass { part, first, layout, x, tasks, before });
            wave.lines += lines;
            wave.tasks += tasks.count();
        }
    }
    wave.run::<K>(input, &mut scratch, out, beside);
    if scratch.len() * 16 <= PASS_FLOATS {
        SCRATCH.set(scratch);
    }
}

impl<T: Element, R: Rows> Wave<'_, '_, T, R> {
    fn run<K: Kernel>(
        &self,
        input: &[T],
        scratch: &mut Vec<Line>,
        out: &Shared<'_, T>,
        beside: Work<'_>,
    ) {
        if scratch.len() < self.lines {
            scratch.resize(self.lines, Line([0.0; 16]));
        }
        for Pass { part, first, layout, x, .. } in &self.passes {
            let mut rows: [&[T]; MAX_ROWS] = [&[]; MAX_ROWS];
            let rows = &mut rows[..layout.rows];
            for (m, row) in rows.iter_mut().enumerate() {
                *row = &input[part.rows.input(first + m) * layout.in_features..];
                *row = &row[..layout.in_features];
            }
            // SAFETY: `K` is available: `forward` is given an instruction set that this machine
            // has.
            unsafe { K::pack(rows, *layout, &mut scratch[*x..]) };
        }
        let scratch: &[Line] = scratch;
        threads::run(beside.tasks + self.tasks, |i| {
            let Some(i) = i.checked_sub(beside.tasks) else { return (beside.run)(i) };
            let pass = &self.passes[self.passes.partition_point(|p| p.before <= i) - 1];
            // SAFETY: `K` is available; the scratch is as `pack` left it.
            unsafe { pass.task::<K>(i - pass.before, &scratch[pass.x..], out) };
        });
    }
}

impl<T: Element, R: Rows> Pass<'_, '_, T, R> {
    /// # Safety
    /// As for [`Kernel`]; `x` is as [`pack`] left it.
    unsafe fn task<K: Kernel>(&self, i: usize, x: &[Line], out: &Shared<'_, T>) {
        let Self { part: Part { weight, rows, bias }, first, layout, .. } = self;
        let product = Product { weight, layout: *layout, x: x.as_ptr().cast() };
        let mut sums = Sums([[0.0; BLOCK]; MAX_ROWS]);
        let features = self.tasks.range(i);
        for start in features.clone().step_by(BLOCK) {
            let block = start..(start + BLOCK).min(features.end);
            // SAFETY: the caller's promises.
            unsafe { K::block(&product, block.clone(), &mut sums) };
            for (m, sums) in sums.0.iter().take(layout.rows).enumerate() {
                let bias = bias.map(|b| &b[block.clone()]);
                let row = rows.output(first + m) * weight.out_features;
                // SAFETY: blocks do not overlap, nor do rows; `K` is available.
                unsafe {
                    let out = out.part(row + block.start..row + block.end);
                    K::finish(&sums[..block.len()], bias, out);
                }
            }
        }
    }
}

/// Reorders the activations.
///
/// # Safety
/// As for [`Kernel`]; there are `layout.rows` rows of `layout.in_features`, and `to` holds
/// `layout.rows * layout.padded()` floats.
#[inline(always)]
unsafe fn pack<T: Element, K: Kernel>(rows: &[&[T]], layout: Layout, to: &mut [Line]) {
    let to: *mut f32 = to.as_mut_ptr().cast();
    let mut codes = Line2([0.0; 128]);
    for (row, x) in rows.iter().enumerate() {
        let first = row - row % layout.batch;
        let stride = layout.batch_rows(first) * K::LANES;
        for (g, x) in x.chunks(K::GROUP).enumerate() {
            for (x, codes) in x.chunks(K::LANES).zip(codes.0.chunks_exact_mut(K::LANES)) {
                if x.len() == K::LANES {
                    // SAFETY: `x` and `codes` hold `LANES` elements.
                    unsafe { K::store(codes.as_mut_ptr(), K::widen(x.as_ptr())) };
                } else {
                    codes.fill(0.0);
                    codes.iter_mut().zip(x).for_each(|(c, x)| *c = x.to_f32());
                }
            }
            codes.0[x.len().next_multiple_of(K::LANES)..].fill(0.0);
            // SAFETY: vectors of group `g` of this row, inside the batch's part.
            let to = unsafe { to.add(layout.at(first, g) + (row - first) * K::LANES) };
            for v in 0..GROUP_VECTORS {
                for lane in 0..K::LANES {
                    let code = K::CODE_AT[v * K::LANES + lane] as usize;
                    // SAFETY: as above.
                    unsafe { *to.add(v * stride + lane) = codes.0[code] };
                }
            }
        }
    }
}

#[repr(align(64))]
struct Line2([f32; 128]);

/// The sums of a block's features, for each row.
#[repr(align(64))]
struct Sums([[f32; BLOCK]; MAX_ROWS]);

/// One pass over the weight.
struct Product<'a> {
    weight: &'a Weight4<'a>,
    layout: Layout,
    /// The reordered activations.
    x: *const f32,
}

/// A buffer on the stack, aligned to cache lines, written before it is read.
#[repr(align(64))]
struct Buffer<const N: usize>(MaybeUninit<[f32; N]>);

impl<const N: usize> Buffer<N> {
    #[inline(always)]
    const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    #[inline(always)]
    const fn ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }

    /// A part that is about to be written.
    #[inline(always)]
    fn part(&mut self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= N);
        // SAFETY: in bounds.
        unsafe { std::slice::from_raw_parts_mut(self.ptr().add(start), len) }
    }
}

/// Adds the bias, rounds and stores.
///
/// # Safety
/// As for [`Kernel`]; all three are as long.
#[inline(always)]
unsafe fn finish<T: Element, K: Kernel>(sums: &[f32], bias: Option<&[T]>, out: &mut [T]) {
    let whole = out.len() - out.len() % K::LANES;
    for i in (0..whole).step_by(K::LANES) {
        // SAFETY: `LANES` elements from `i` are in all three.
        unsafe {
            let mut v = K::load(sums.as_ptr().add(i));
            if let Some(bias) = bias {
                v = K::add(v, K::widen(bias.as_ptr().add(i)));
            }
            K::narrow(out.as_mut_ptr().add(i), v);
        }
    }
    for i in whole..out.len() {
        out[i] = T::from_f32(bias.map_or(sums[i], |b| sums[i] + b[i].to_f32()));
    }
}

impl Product<'_> {
    /// Computes the output features `features`, at most `BLOCK`.
    ///
    /// # Safety
    /// As for [`Kernel`]; `x` is as [`pack`] left it.
    #[inline(always)]
    unsafe fn block<K: Kernel>(&self, features: Range<usize>, sums: &mut Sums) {
        let mut scales = ScaleReader::new(self.weight);
        // SAFETY: the caller's promises.
        unsafe {
            if self.weight.in_features.is_multiple_of(UNIT) && self.layout.rows <= K::DIRECT_ROWS {
                match self.layout.rows {
                    1 => self.direct::<K, 1>(&mut scales, features, sums),
                    2 if K::DIRECT_ROWS >= 2 => self.direct::<K, 2>(&mut scales, features, sums),
                    3 if K::DIRECT_ROWS >= 3 => self.direct::<K, 3>(&mut scales, features, sums),
                    _ if K::DIRECT_ROWS >= 4 => self.direct::<K, 4>(&mut scales, features, sums),
                    _ => unreachable!("at most DIRECT_ROWS"),
                }
            } else {
                self.tiled::<K>(&mut scales, features, sums);
            }
        }
    }

    /// Liberty 3, first way: a pair of weight rows at a time, over a stretch of codes for which the
    /// activations fit the first-level cache.
    ///
    /// # Safety
    /// As for [`block`](Self::block); `M` is the number of rows and `in_features` a multiple of 8.
    #[inline(always)]
    unsafe fn direct<K: Kernel, const M: usize>(
        &self,
        scales: &mut ScaleReader<'_>,
        features: Range<usize>,
        sums: &mut Sums,
    ) {
        let k = self.weight.in_features;
        let segment = SEGMENT / M / 128 * 128;
        // The sums so far of each feature, `M` vectors of at most 16 lanes.
        let mut acc = Buffer::<{ 4 * BLOCK * 16 }>::new();
        let acc = acc.ptr();
        // SAFETY: the caller's promises; `acc` has room for `M <= 4` vectors for each feature.
        unsafe {
            for i in 0..features.len() * M {
                K::store(acc.add(i * K::LANES), K::zero());
            }
            for start in (0..k).step_by(segment) {
                let codes = start..k.min(start + segment);
                scales.rewind();
                let mut o = features.start;
                while o < features.end {
                    let acc = acc.add((o - features.start) * M * K::LANES);
                    if o + 2 <= features.end {
                        self.direct_rows::<K, M, 2>(scales, o, codes.clone(), acc);
                        o += 2;
                    } else {
                        self.direct_rows::<K, M, 1>(scales, o, codes.clone(), acc);
                        o += 1;
                    }
                }
            }
            for m in 0..M {
                let fours = features.len().div_ceil(4);
                for (i, sums) in sums.0[m].as_chunks_mut::<4>().0[..fours].iter_mut().enumerate() {
                    let mut four = [K::zero(); 4];
                    for (j, v) in four.iter_mut().enumerate() {
                        let i = (i * 4 + j).min(features.len() - 1);
                        *v = K::load(acc.add((i * M + m) * K::LANES));
                    }
                    *sums = K::sum4(four);
                }
            }
        }
    }

    /// # Safety
    /// As for [`direct`](Self::direct), for `codes` of the weight rows `o..o + R`, which start at a
    /// group and are at most `SEGMENT`; `sums` has `M` vectors for each weight row.
    #[inline(always)]
    unsafe fn direct_rows<K: Kernel, const M: usize, const R: usize>(
        &self,
        scales: &mut ScaleReader<'_>,
        o: usize,
        codes: Range<usize>,
        sums: *mut f32,
    ) {
        let k = self.weight.in_features;
        let first = o * k + codes.start; // in the flattened weight
        // SAFETY: the caller's promises; each way's scales are those of the rows' codes.
        unsafe {
            let mut acc = [[K::zero(); R]; M];
            let lanes = |r: usize, m: usize| sums.add((r * M + m) * K::LANES);
            for m in 0..M {
                for r in 0..R {
                    acc[m][r] = K::load(lanes(r, m));
                }
            }
            match scales.way {
                Way::Halves(absmax) => {
                    let halves = Halves { scales: absmax[first / 64..].as_ptr(), stride: k / 64 };
                    self.direct_codes::<K, M, R, _>(o, codes, halves, &mut acc);
                }
                Way::Tabulated(nested) => {
                    let stride = k / 64;
                    let first = self.weight.first_scale + first / 64;
                    let indices = &nested.absmax[first..][..(R - 1) * stride + codes.len() / 64];
                    let tables = scales.tabulate(nested, first..first + indices.len());
                    let indices = indices.as_ptr();
                    let tabulated = Tabulated { indices, first, stride, tables };
                    self.direct_codes::<K, M, R, _>(o, codes, tabulated, &mut acc);
                }
                Way::Units => {
                    let mut units = Buffer::<{ 2 * SEGMENT / UNIT }>::new();
                    for r in 0..R {
                        let units = units.part(r * (SEGMENT / UNIT), codes.len() / UNIT);
                        scales.fill_units::<K>(first + r * k, units);
                    }
                    let units = Units { scales: units.ptr(), stride: SEGMENT / UNIT };
                    self.direct_codes::<K, M, R, _>(o, codes, units, &mut acc);
                }
            }
            for m in 0..M {
                for r in 0..R {
                    K::store(lanes(r, m), acc[m][r]);
                }
            }
        }
    }

    /// # Safety
    /// As for [`direct`](Self::direct), for `codes` of the weight rows `o..o + R`, which start at a
    /// group; `scales` has theirs.
    #[inline(always)]
    unsafe fn direct_codes<K: Kernel, const M: usize, const R: usize, S: Scaling>(
        &self,
        o: usize,
        codes: Range<usize>,
        scales: S,
        acc: &mut [[K::V; R]; M],
    ) {
        let k = self.weight.in_features;
        let (whole, rest) = (codes.len() / K::GROUP, codes.len() % K::GROUP);
        // SAFETY: per step below.
        unsafe {
            let table = K::table(self.weight.table);
            let packed = self.weight.packed.as_ptr().add((o * k + codes.start) / 2);
            let x = self.x.add(self.layout.at(0, codes.start / K::GROUP));
            let rows = WeightRows::<K, S> { table, packed, row_bytes: k / 2, x, scales };
            // Groups with 3 bytes after them, in the last of the rows.
            let readable = self.weight.packed.len() - ((o + R - 1) * k + codes.start) / 2;
            let inner = whole.min(readable.saturating_sub(3) / (K::GROUP / 2));
            for g in 0..inner {
                rows.group::<M, R, true>(g, acc);
            }
            for g in inner..whole {
                rows.group::<M, R, false>(g, acc);
            }
            if rest > 0 {
                // Copies padded with zeros, codes and scales, meet zeros in `x`.
                let mut bytes = [[0u8; 64]; R];
                let mut units = [[0.0f32; 16]; R];
                for r in 0..R {
                    let packed = packed.add(r * (k / 2) + whole * K::GROUP / 2);
                    packed.copy_to_nonoverlapping(bytes[r].as_mut_ptr(), rest / 2);
                    for (i, unit) in units[r].iter_mut().take(rest / UNIT).enumerate() {
                        *unit = rows.scales.unit(r, whole * K::LANES + i);
                    }
                }
                let rows = WeightRows::<K, Units> {
                    table,
                    packed: bytes.as_ptr().cast(),
                    row_bytes: 64,
                    x: x.add(whole * K::GROUP * M),
                    scales: Units { scales: units.as_ptr().cast(), stride: 16 },
                };
                rows.group::<M, R, false>(0, acc);
            }
        }
    }

    /// Liberty 3, second way.
    ///
    /// # Safety
    /// As for [`block`](Self::block).
    #[inline(always)]
    unsafe fn tiled<K: Kernel>(
        &self,
        scales: &mut ScaleReader<'_>,
        features: Range<usize>,
        sums: &mut Sums,
    ) {
        const {
            assert!(BLOCK.is_multiple_of(K::WEIGHT_ROWS) && TILE.is_multiple_of(K::GROUP));
        }
        let (k, rows) = (self.weight.in_features, self.layout.rows);
        let mut acc = Buffer::<{ MAX_ROWS * BLOCK * 16 }>::new();
        let mut tile = Buffer::<{ 4 * TILE }>::new();
        let mut units = Buffer::<{ BLOCK * TILE / UNIT }>::new();
        let (acc, tile) = (acc.ptr(), tile.ptr());
        let width = (TILE_FLOATS / rows / 128 * 128).min(TILE);
        let padded = features.len().next_multiple_of(K::WEIGHT_ROWS);
        // The lanes of the `WEIGHT_ROWS` features from `i` on for rows from `m` on: a row's features
        // side by side.
        let lanes = |i: usize, m: usize| (i * rows + m * K::WEIGHT_ROWS) * K::LANES;
        // SAFETY: per step below; `acc` holds `LANES <= 16` floats for `padded <= BLOCK` features
        // of `rows <= MAX_ROWS` rows, `tile` `WEIGHT_ROWS <= 4` rows of `width` codes.
        unsafe {
            for i in 0..if k == 0 { padded * rows } else { 0 } {
                K::store(acc.add(i * K::LANES), K::zero());
            }
            for start in (0..k).step_by(width) {
                let codes = start..k.min(start + width);
                let groups = codes.len().div_ceil(K::GROUP);
                // All features' scales are decoded before the first is read: a read soon after
                // narrower writes waits for them to reach the cache.
                let scaling = match scales.way {
                    Way::Units => {
                        let stride = groups * K::LANES;
                        for i in 0..features.len() {
                            let units = units.part(i * stride, codes.len().div_ceil(UNIT));
                            scales.fill_units::<K>((features.start + i) * k + start, units);
                        }
                        TileScales::Units(Units { scales: units.ptr(), stride })
                    }
                    Way::Halves(absmax) => {
                        let absmax = &absmax[(features.start * k + start) / 64..];
                        TileScales::Halves(Halves { scales: absmax.as_ptr(), stride: k / 64 })
                    }
                    Way::Tabulated(_) => {
                        let stride = codes.len() / 64;
                        for i in 0..features.len() {
                            let halves = units.part(i * stride, stride);
                            scales.decode(((features.start + i) * k + start) / 64, halves);
                        }
                        TileScales::Halves(Halves { scales: units.ptr(), stride })
                    }
                };
                for i in (0..padded).step_by(K::WEIGHT_ROWS) {
                    match scaling {
                        TileScales::Units(scales) => {
                            self.decode::<K, _>(&features, i, codes.clone(), scales, tile);
                        }
                        TileScales::Halves(scales) => {
                            self.decode::<K, _>(&features, i, codes.clone(), scales, tile);
                        }
                    }
                    for m in (0..rows).step_by(self.layout.batch) {
                        let x = self.x.add(self.layout.at(m, start / K::GROUP));
                        let acc = acc.add(lanes(i, m));
                        let fresh = start == 0;
                        let vectors = groups * GROUP_VECTORS;
                        dot::<K>(self.layout.batch_rows(m), x, tile, vectors, acc, fresh);
                    }
                }
            }
            for m in 0..rows {
                let fours = features.len().div_ceil(4);
                for (i, sums) in sums.0[m].as_chunks_mut::<4>().0[..fours].iter_mut().enumerate() {
                    let mut four = [K::zero(); 4];
                    for (j, v) in four.iter_mut().enumerate() {
                        let i = (i * 4 + j).min(padded - 1);
                        let r = i % K::WEIGHT_ROWS;
                        *v = K::load(acc.add(lanes(i - r, m) + r * K::LANES));
                    }
                    *sums = K::sum4(four);
                }
            }
        }
    }

    /// Decodes `codes` of `WEIGHT_ROWS` of the `features` from number `i` on, scales applied, to a
    /// tile: vector by vector, and row by row within.
    ///
    /// # Safety
    /// As for [`block`](Self::block); `codes` starts at a group and is no longer than `TILE`; row
    /// `i` of `scales` has the scales of feature `i`; `tile` has room.
    #[inline(always)]
    unsafe fn decode<K: Kernel, S: Scaling>(
        &self,
        features: &Range<usize>,
        i: usize,
        codes: Range<usize>,
        scales: S,
        tile: *mut f32,
    ) {
        let weight = self.weight;
        let len = codes.len();
        let (whole, rest) = (len / K::GROUP, len % K::GROUP);
        let group_floats = GROUP_VECTORS * K::WEIGHT_ROWS * K::LANES;
        let mut shifted = [[MaybeUninit::uninit(); TILE / 2]; 4];
        // For each row: its number among the features, its start in the flattened weight, its
        // bytes. Past the end the last feature stands in; the sums go unread.
        let mut rows: [(usize, usize, &[u8]); 4] = [(0, 0, &[]); 4];
        // Groups with 3 bytes after them in every row.
        let mut inner = whole;
        for (r, (row, shifted)) in rows.iter_mut().zip(&mut shifted).enumerate() {
            if r < K::WEIGHT_ROWS {
                let i = (i + r).min(features.len() - 1);
                let start = (features.start + i) * weight.in_features + codes.start;
                let bytes = &weight.packed[start / 2..];
                let bytes =
                    if start.is_multiple_of(2) { bytes } else { shift(bytes, len, shifted) };
                *row = (i, start, bytes);
                inner = inner.min(bytes.len().saturating_sub(3) / (K::GROUP / 2));
            }
        }
        // SAFETY: per step below.
        unsafe {
            let table = K::table(weight.table);
            for g in 0..inner {
                for (r, &(i, _, bytes)) in rows.iter().enumerate().take(K::WEIGHT_ROWS) {
                    let packed = bytes.as_ptr().add(g * K::GROUP / 2);
                    K::prefetch(packed.wrapping_add(K::WEIGHT_ROWS * weight.in_features / 2));
                    let to = tile.add(g * group_floats + r * K::LANES);
                    decode_group::<K, S, true>(table, packed, scales, (i, g), to);
                }
            }
            for (r, &(i, start, bytes)) in rows.iter().enumerate().take(K::WEIGHT_ROWS) {
                let tile = tile.add(r * K::LANES);
                for g in inner..whole {
                    let packed = bytes.as_ptr().add(g * K::GROUP / 2);
                    let to = tile.add(g * group_floats);
                    decode_group::<K, S, false>(table, packed, scales, (i, g), to);
                }
                if rest > 0 {
                    let mut padded = [0u8; 64];
                    let bytes = &bytes[whole * K::GROUP / 2..len.div_ceil(2)];
                    padded[..bytes.len()].copy_from_slice(bytes);
                    let mut units = [0.0f32; 16];
                    for (u, unit) in units.iter_mut().take(rest.div_ceil(UNIT)).enumerate() {
                        *unit = scales.unit(i, whole * K::LANES + u);
                    }
                    let units = Units { scales: units.as_ptr(), stride: 0 };
                    let to = tile.add(whole * group_floats);
                    decode_group::<K, _, false>(table, padded.as_ptr(), units, (0, 0), to);
                    for i in 0..K::GROUP {
                        if K::CODE_AT[i] as usize >= rest {
                            let vector = i / K::LANES * K::WEIGHT_ROWS;
                            *to.add(vector * K::LANES + i % K::LANES) = 0.0;
                        }
                    }
                }
                if !start.is_multiple_of(UNIT) {
                    self.decode_borders::<K>(start, len, bytes, tile);
                }
            }
        }
    }

    /// Liberty 4: codes of a unit behind a border have the next block's scale.
    ///
    /// # Safety
    /// `tile` is a row of `len` codes from `start` on in the flattened weight, which are `bytes`.
    unsafe fn decode_borders<K: Kernel>(
        &self,
        start: usize,
        len: usize,
        bytes: &[u8],
        tile: *mut f32,
    ) {
        let weight = self.weight;
        let block = weight.blocks.blocksize().get();
        for border in (start.next_multiple_of(block)..start + len).step_by(block) {
            let first = border - start;
            let mut scale = [0.0];
            weight.scales.decode(weight.first_scale + border / block, &mut scale);
            for code in first..first.next_multiple_of(UNIT).min(len) {
                let byte = bytes[code / 2];
                let q = if code.is_multiple_of(2) { byte >> 4 } else { byte & 0x0F };
                let i = position::<K>(code % K::GROUP);
                let vector = code / K::GROUP * GROUP_VECTORS + i / K::LANES;
                let at = vector * K::WEIGHT_ROWS * K::LANES + i % K::LANES;
                // SAFETY: `code` is in the row.
                unsafe { *tile.add(at) = weight.table[q as usize] * scale[0] };
            }
        }
    }
}

/// The `len` codes from the low nibble of the first byte on, moved to start in a high one.
fn shift<'a>(bytes: &[u8], len: usize, to: &'a mut [MaybeUninit<u8>; TILE / 2]) -> &'a [u8] {
    let next = bytes[1..].iter().copied().chain([0]);
    let to = &mut to[..len.div_ceil(2)];
    for ((to, a), b) in to.iter_mut().zip(bytes).zip(next) {
        to.write(a << 4 | b >> 4);
    }
    // SAFETY: all written: `bytes` has at least as many bytes.
    unsafe { std::slice::from_raw_parts(to.as_ptr().cast(), to.len()) }
}

/// The inverse of [`Kernel::CODE_AT`].
#[inline(always)]
fn position<K: Kernel>(code: usize) -> usize {
    const {
        // Each code stands somewhere.
        let mut i = 0;
        let mut seen = 0u128;
        while i < K::GROUP {
            seen |= 1 << K::CODE_AT[i];
            i += 1;
        }
        assert!(seen == u128::MAX >> (128 - K::GROUP));
    }
    K::CODE_AT.iter().position(|&c| c as usize == code).unwrap_or(0)
}

/// Where the scales of a few weight rows' codes are.
trait Scaling: Copy {
    /// The scale of a unit.
    ///
    /// # Safety
    /// It exists.
    unsafe fn unit(self, row: usize, unit: usize) -> f32;
    /// Distinct scale vectors in a group; vector `v` takes number `v * count / 8`.
    fn count<K: Kernel>() -> usize;
    /// Scale vector `i` of a group.
    ///
    /// # Safety
    /// As for [`Kernel`]; all its scales exist.
    unsafe fn vector<K: Kernel>(self, row: usize, group: usize, i: usize) -> K::V;
}

/// One float32 for each unit, rows `stride` apart.
#[derive(Clone, Copy)]
struct Units {
    scales: *const f32,
    stride: usize,
}

impl Scaling for Units {
    #[inline(always)]
    unsafe fn unit(self, row: usize, unit: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *self.scales.add(row * self.stride + unit) }
    }
    #[inline(always)]
    fn count<K: Kernel>() -> usize {
        K::SCALES
    }
    #[inline(always)]
    unsafe fn vector<K: Kernel>(self, row: usize, group: usize, i: usize) -> K::V {
        // SAFETY: the caller's promise.
        unsafe { K::scale(self.scales.add(row * self.stride + group * K::LANES), i) }
    }
}

/// One float32 for each 64 codes, rows `stride` apart.
#[derive(Clone, Copy)]
struct Halves {
    scales: *const f32,
    stride: usize,
}

impl Scaling for Halves {
    #[inline(always)]
    unsafe fn unit(self, row: usize, unit: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *self.scales.add(row * self.stride + unit / 8) }
    }
    #[inline(always)]
    fn count<K: Kernel>() -> usize {
        1
    }
    #[inline(always)]
    unsafe fn vector<K: Kernel>(self, row: usize, group: usize, _: usize) -> K::V {
        let first = group * K::LANES;
        // SAFETY: the caller's promise.
        unsafe { K::halves(self.unit(row, first), self.unit(row, first + K::LANES / 2)) }
    }
}

/// One index for each 64 codes, rows `stride` apart, into the table of its second-level block.
#[derive(Clone, Copy)]
struct Tabulated {
    indices: *const u8,
    /// The number of the first index among all scales.
    first: usize,
    stride: usize,
    /// `TABLES` times 256 values.
    tables: *const f32,
}

impl Scaling for Tabulated {
    #[inline(always)]
    unsafe fn unit(self, row: usize, unit: usize) -> f32 {
        let i = row * self.stride + unit / 8;
        let table = (self.first + i) & ((TABLES - 1) << 8);
        // SAFETY: the caller's promise.
        unsafe { *self.tables.add(table | *self.indices.add(i) as usize) }
    }
    #[inline(always)]
    fn count<K: Kernel>() -> usize {
        1
    }
    #[inline(always)]
    unsafe fn vector<K: Kernel>(self, row: usize, group: usize, _: usize) -> K::V {
        let first = group * K::LANES;
        // SAFETY: the caller's promise.
        unsafe { K::halves(self.unit(row, first), self.unit(row, first + K::LANES / 2)) }
    }
}

/// What the direct way reads.
struct WeightRows<K: Kernel, S> {
    table: K::Table,
    /// Rows `row_bytes` apart.
    packed: *const u8,
    row_bytes: usize,
    x: *const f32,
    scales: S,
}

impl<K: Kernel, S: Scaling> WeightRows<K, S> {
    /// Adds group `g` of `R` weight rows times `M` activation rows to `acc`.
    ///
    /// # Safety
    /// As for [`Kernel`]; the group is there (and 3 bytes after it, if `PAST_END`).
    #[inline(always)]
    unsafe fn group<const M: usize, const R: usize, const PAST_END: bool>(
        &self,
        g: usize,
        acc: &mut [[K::V; R]; M],
    ) {
        let per_scale = GROUP_VECTORS / S::count::<K>();
        // SAFETY: the caller's promises.
        unsafe {
            let packed = self.packed.add(g * K::GROUP / 2);
            let x = self.x.add(g * K::GROUP * M);
            let mut codes = [K::read::<PAST_END>(self.table, packed); R];
            for r in 0..R {
                let packed = packed.add(r * self.row_bytes);
                // The same place in the next rows that this thread will come to.
                K::prefetch(packed.wrapping_add(R * self.row_bytes));
                codes[r] = K::read::<PAST_END>(self.table, packed);
            }
            for s in 0..S::count::<K>() {
                let mut part = [[K::zero(); R]; M];
                for i in 0..per_scale {
                    let v = s * per_scale + i;
                    for r in 0..R {
                        let w = K::vector(self.table, &codes[r], v);
                        for m in 0..M {
                            let x = K::load(x.add((v * M + m) * K::LANES));
                            part[m][r] = match i {
                                0 => K::mul(w, x),
                                _ => K::fma(w, x, part[m][r]),
                            };
                        }
                    }
                }
                for r in 0..R {
                    let scale = self.scales.vector::<K>(r, g, s);
                    for m in 0..M {
                        acc[m][r] = K::fma(part[m][r], scale, acc[m][r]);
                    }
                }
            }
        }
    }
}

/// Where a tile's scales are.
#[derive(Clone, Copy)]
enum TileScales {
    Units(Units),
    Halves(Halves),
}

/// Decodes a group of a tile's row, whose scales are at a row and group of `scales`.
///
/// # Safety
/// As for [`Kernel`]; `packed` has the group (and 3 bytes more, if `PAST_END`), `to` room for its
/// vectors.
#[inline(always)]
unsafe fn decode_group<K: Kernel, S: Scaling, const PAST_END: bool>(
    table: K::Table,
    packed: *const u8,
    scales: S,
    (row, group): (usize, usize),
    to: *mut f32,
) {
    // SAFETY: the caller's promises.
    unsafe {
        let codes = K::read::<PAST_END>(table, packed);
        for v in 0..GROUP_VECTORS {
            let scale = scales.vector::<K>(row, group, v * S::count::<K>() / GROUP_VECTORS);
            let w = K::mul(K::vector(table, &codes, v), scale);
            K::store(to.add(v * K::WEIGHT_ROWS * K::LANES), w);
        }
    }
}

/// Adds `vectors` of `WEIGHT_ROWS` rows of the tile times those of `batch` activation rows to the
/// lanes at `acc`, or sets them, if `fresh`.
///
/// # Safety
/// As for [`Kernel`]; the buffers hold as much.
#[inline(always)]
unsafe fn dot<K: Kernel>(
    batch: usize,
    x: *const f32,
    tile: *const f32,
    vectors: usize,
    acc: *mut f32,
    fresh: bool,
) {
    // SAFETY: the caller's promises; `batch` is at most `K::ROWS`.
    unsafe {
        macro_rules! dot {
            ($($m:literal)*) => {
                match (batch, K::WEIGHT_ROWS) {
                    $(
                        ($m, 3) if $m <= K::ROWS => dot_rows::<K, $m, 3>(x, tile, vectors, acc, fresh),
                        ($m, 4) if $m <= K::ROWS => dot_rows::<K, $m, 4>(x, tile, vectors, acc, fresh),
                    )*
                    _ => unreachable!("a batch has 1 to {} rows", K::ROWS),
                }
            };
        }
        dot!(1 2 3 4 5 6 7 8);
    }
}

/// # Safety
/// As for [`dot`].
#[inline(always)]
unsafe fn dot_rows<K: Kernel, const M: usize, const R: usize>(
    x: *const f32,
    tile: *const f32,
    vectors: usize,
    acc: *mut f32,
    fresh: bool,
) {
    // SAFETY: the caller's promises.
    unsafe {
        let mut sum = [[K::zero(); R]; M];
        let lanes = |r: usize, m: usize| acc.add((m * R + r) * K::LANES);
        if !fresh {
            for m in 0..M {
                for r in 0..R {
                    sum[m][r] = K::load(lanes(r, m));
                }
            }
        }
        for v in 0..vectors {
            let mut w = [K::zero(); R];
            for r in 0..R {
                w[r] = K::load(tile.add((v * R + r) * K::LANES));
            }
            for m in 0..M {
                let x = K::load(x.add((v * M + m) * K::LANES));
                for r in 0..R {
                    sum[m][r] = K::fma(w[r], x, sum[m][r]);
                }
            }
        }
        for m in 0..M {
            for r in 0..R {
                K::store(lanes(r, m), sum[m][r]);
            }
        }
    }
}

/// How scales reach the kernels.
#[derive(Clone, Copy)]
enum Way<'a> {
    /// [`Halves`], where they stand.
    Halves(&'a [f32]),
    /// [`Tabulated`], or decoded to [`Halves`].
    Tabulated(NestedScales<'a>),
    /// Spread to [`Units`].
    Units,
}

/// Reads the scales of the blocks that a task comes to; ascending, where they are tabulated.
struct ScaleReader<'a> {
    scales: Scales<'a>,
    /// Where in `scales` the weight's first block's is.
    first: usize,
    way: Way<'a>,
    block: usize,
    /// The second-level blocks before this one have had their tables.
    tabulated: usize,
    tables: [f32; TABLES * 256],
}

impl<'a> ScaleReader<'a> {
    #[inline(always)]
    fn new(weight: &Weight4<'a>) -> Self {
        let block = weight.blocks.blocksize().get();
        let k = weight.in_features;
        let way = match weight.scales {
            _ if block != 64 || !k.is_multiple_of(64) => Way::Units,
            Scales::Plain(absmax) => Way::Halves(&absmax[weight.first_scale..]),
            // Two rows' scales lie in no more second-level blocks than there are tables.
            Scales::Nested(nested)
                if nested.blocksize == BlockSize::B256 && 2 * k <= (TABLES - 1) * 256 * 64 =>
            {
                Way::Tabulated(nested)
            }
            Scales::Nested(_) => Way::Units,
        };
        let tables = [0.0; TABLES * 256];
        let (scales, first) = (weight.scales, weight.first_scale);
        Self { scales, first, way, block, tabulated: 0, tables }
    }

    /// Starts over from the first scale.
    #[inline(always)]
    const fn rewind(&mut self) {
        self.tabulated = 0;
    }

    /// Makes sure of the tables for the scales `range` of all, which spans at most `TABLES` second-level
    /// blocks.
    #[inline(always)]
    fn tabulate(&mut self, nested: NestedScales<'_>, range: Range<usize>) -> *const f32 {
        let needed = range.end.div_ceil(256);
        for second in self.tabulated.max(range.start / 256)..needed {
            let table = &mut self.tables[second % TABLES * 256..][..256];
            let absmax2 = nested.absmax2[second];
            for (t, c) in table.iter_mut().zip(nested.code) {
                *t = c * absmax2 + nested.offset;
            }
        }
        self.tabulated = needed;
        self.tables.as_ptr()
    }

    /// The weight's scales `start..start + out.len()`.
    #[inline(always)]
    fn decode(&self, start: usize, out: &mut [f32]) {
        let start = self.first + start;
        match self.scales {
            Scales::Plain(absmax) => out.copy_from_slice(&absmax[start..start + out.len()]),
            Scales::Nested(nested) => {
                let shift = nested.blocksize.get().trailing_zeros();
                let mut done = 0;
                while done < out.len() {
                    // The scales of one second-level block.
                    let second = (start + done) >> shift;
                    let end = (((second + 1) << shift) - start).min(out.len());
                    let indices = &nested.absmax[start + done..start + end];
                    let absmax2 = nested.absmax2[second];
                    for (o, &i) in out[done..end].iter_mut().zip(indices) {
                        *o = nested.code[i as usize] * absmax2 + nested.offset;
                    }
                    done = end;
                }
            }
        }
    }

    /// The scales of the units that start at code `start` of the flattened weight; a unit that
    /// holds codes of two blocks gets the first one's.
    ///
    /// # Safety
    /// As for [`Kernel`].
    #[inline(always)]
    unsafe fn fill_units<K: Kernel>(&self, start: usize, units: &mut [f32]) {
        let mut scales = [0.0; 64];
        let mut done = 0;
        while done < units.len() {
            let first = (start + done * UNIT) / self.block;
            let last = (start + (units.len() - 1) * UNIT) / self.block;
            let scales = &mut scales[..(last + 1 - first).min(64)];
            self.decode(first, scales);
            for (i, &scale) in scales.iter().enumerate() {
                let end = ((first + i + 1) * self.block - start).div_ceil(UNIT).min(units.len());
                let (units, rest) = units[done..end].as_chunks_mut::<8>();
                for units in units {
                    // SAFETY: 8 floats.
                    unsafe { K::splat8(units.as_mut_ptr(), scale) };
                }
                rest.fill(scale);
                done = end;
            }
        }
    }
}

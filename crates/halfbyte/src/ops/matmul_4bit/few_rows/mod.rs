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
//! 2. A scale is looked up once per block and spread to one float32 for each *unit* of 8 codes
//!    (4 bytes). Nested scales go through a table of the 256 values that the second level's
//!    current block can take.
//! 3. For the fewest rows ([`Kernel::DIRECT_ROWS`]) decoded codes stay in registers and the scale
//!    multiplies the unit's partial sum. For more rows a tile of the weight is decoded into the
//!    first-level cache and multiplied by all rows from there.
//! 4. Rows whose units straddle two blocks (`in_features` no multiple of 8) take the tiled way
//!    with the few codes behind each border decoded again by plain code.
//!
//! Every output is one chain of multiply-adds per lane over ascending groups, then a fixed tree
//! over lanes: who computes it, and beside which others, does not change its bits.
//!
//! With `u = 2^-24`, `n = in_features`, and weights taken as the exact `table[q] * scale`, a result
//! before its final rounding lies within `(n / LANES + 16) * u * (sum |x * w| + |bias|)` of the
//! exact one, to first order and short of underflow: `n / LANES` additions in a lane at most, 8 in
//! a unit, 4 in the tree, the products and the bias. `LANES` is 16, 8 and 4 for AVX-512, AVX2 and
//! NEON.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(test)]
mod tests;

use super::{Weight4, scalar};
use crate::Element;
use crate::isa::Isa;
use crate::ops::{NestedScales, Scales};
use crate::threads::{self, Chunks, Shared};
use std::cell::Cell;
use std::ops::Range;

/// The most rows for which this way beats the general product.
pub(super) const MAX_ROWS: usize = 16;

/// Codes per unit: a unit is 4 packed bytes, and has one scale.
const UNIT: usize = 8;
/// Vectors per group.
const GROUP_VECTORS: usize = 8;
/// Output features per block of a task: their running sums stay in the caches.
const BLOCK: usize = 48;
/// Codes of a weight row per tile: with the activations' tile it fits the first-level cache.
const TILE: usize = 1024;
/// The same for more than 8 rows.
const NARROW_TILE: usize = 512;
/// Codes per call of the direct way, so that spread scales stay in the first-level cache.
const SEGMENT: usize = 4096;
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
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => spread::<T, avx512::Avx512>(input, rows, weight, bias, out),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => spread::<T, avx2::Avx2>(input, rows, weight, bias, out),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => spread::<T, neon::Neon>(input, rows, weight, bias, out),
        _ => scalar::forward(input, rows, weight, bias, out),
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

    unsafe fn table(table: &[f32; 16]) -> Self::Table;
    /// Decodes the `GROUP / 2` bytes at `packed`. `PAST_END` permits reading 3 bytes more.
    unsafe fn codes<const PAST_END: bool>(
        table: Self::Table,
        packed: *const u8,
    ) -> [Self::V; GROUP_VECTORS];
    /// Lane by lane, the scales of the vectors that take scale vector `i`, from the `LANES` units'
    /// scales at `units`.
    unsafe fn scale(units: *const f32, i: usize) -> Self::V;

    unsafe fn zero() -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// The sum of all lanes.
    unsafe fn sum(v: Self::V) -> f32;
    /// Fetches a line of the packed weight ahead of its use. Any address will do.
    unsafe fn prefetch(at: *const u8);
    /// `LANES` elements as float32.
    unsafe fn widen<T: Element>(from: *const T) -> Self::V;
    /// Rounds and stores `LANES` elements.
    unsafe fn narrow<T: Element>(to: *mut T, v: Self::V);

    /// [`pack`] with the instruction set enabled.
    unsafe fn pack<T: Element>(input: &[T], layout: Layout, to: &mut [Line]);
    /// [`Product::task`] with the instruction set enabled.
    unsafe fn task<T: Element>(product: &Product<'_, T>, features: Range<usize>);
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

fn spread<T: Element, K: Kernel>(
    input: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let (n, k) = (weight.out_features, weight.in_features);
    if rows == 0 || n == 0 {
        return;
    }
    let per_pass = (PASS_FLOATS / k.next_multiple_of(K::GROUP).max(1)).clamp(1, MAX_ROWS);
    let mut scratch = SCRATCH.take();
    for first in (0..rows).step_by(per_pass) {
        let rows = per_pass.min(rows - first);
        let layout = Layout::new::<K>(rows, k);
        let lines = (rows * layout.padded()).div_ceil(16);
        if scratch.len() < lines {
            scratch.resize(lines, Line([0.0; 16]));
        }
        // SAFETY: `K` is available: `forward` is given an instruction set that this machine has.
        unsafe { K::pack(&input[first * k..(first + rows) * k], layout, &mut scratch) };
        let product = Product {
            weight,
            layout,
            x: scratch.as_ptr().cast(),
            bias,
            out: Shared::new(&mut out[first * n..(first + rows) * n]),
        };
        let tasks = Chunks::new(n, TASK_WORK / (rows * k).max(1), BLOCK);
        // SAFETY: as above; the scratch outlives the tasks and no one writes to it meanwhile.
        threads::run(tasks.count(), |i| unsafe { K::task(&product, tasks.range(i)) });
    }
    if scratch.len() * 16 <= PASS_FLOATS {
        SCRATCH.set(scratch);
    }
}

/// Reorders the activations.
///
/// # Safety
/// As for [`Kernel`]; `to` holds `layout.rows * layout.padded()` floats.
#[inline(always)]
unsafe fn pack<T: Element, K: Kernel>(input: &[T], layout: Layout, to: &mut [Line]) {
    let k = layout.in_features;
    let to: *mut f32 = to.as_mut_ptr().cast();
    let mut codes = Line2([0.0; 128]);
    for (row, x) in input.chunks_exact(k.max(1)).enumerate() {
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

/// One pass over the weight, shared by all threads.
struct Product<'a, T> {
    weight: &'a Weight4<'a>,
    layout: Layout,
    /// The reordered activations.
    x: *const f32,
    bias: Option<&'a [T]>,
    /// `[rows, out_features]`.
    out: Shared<'a, T>,
}

// SAFETY: `x` is only read while tasks run; every other field is `Sync`.
unsafe impl<T: Element> Sync for Product<'_, T> {}

/// A buffer on the stack, aligned to cache lines, written before it is read.
#[repr(align(64))]
struct Buffer<const N: usize>(std::mem::MaybeUninit<[f32; N]>);

impl<const N: usize> Buffer<N> {
    #[inline(always)]
    const fn new() -> Self {
        Self(std::mem::MaybeUninit::uninit())
    }

    #[inline(always)]
    const fn ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

impl<T: Element> Product<'_, T> {
    /// Computes and stores the output features `features`.
    ///
    /// # Safety
    /// As for [`Kernel`]; tasks' `features` do not overlap; `x` is as [`pack`] left it.
    #[inline(always)]
    unsafe fn task<K: Kernel>(&self, features: Range<usize>) {
        let mut scales = UnitScales::new(self.weight, features.len());
        let mut sums = Line3([0.0; MAX_ROWS * BLOCK]);
        for first in features.clone().step_by(BLOCK) {
            let block = first..(first + BLOCK).min(features.end);
            // SAFETY: the caller's promises; `sums` has room for `BLOCK` features of each row.
            unsafe {
                if self.weight.in_features % UNIT == 0 && self.layout.rows <= K::DIRECT_ROWS {
                    match self.layout.rows {
                        1 => self.direct::<K, 1>(&mut scales, block.clone(), &mut sums.0),
                        2 => self.direct::<K, 2>(&mut scales, block.clone(), &mut sums.0),
                        3 => self.direct::<K, 3>(&mut scales, block.clone(), &mut sums.0),
                        _ => self.direct::<K, 4>(&mut scales, block.clone(), &mut sums.0),
                    }
                } else {
                    self.tiled::<K>(&mut scales, block.clone(), &mut sums.0);
                }
                self.finish::<K>(block, &sums.0);
            }
        }
    }

    /// Adds the bias, rounds and stores: `sums` holds `BLOCK` features for each row.
    ///
    /// # Safety
    /// As for [`task`](Self::task).
    #[inline(always)]
    unsafe fn finish<K: Kernel>(&self, features: Range<usize>, sums: &[f32; MAX_ROWS * BLOCK]) {
        let n = self.weight.out_features;
        for (row, sums) in sums.chunks_exact(BLOCK).take(self.layout.rows).enumerate() {
            // SAFETY: tasks' features, and a task's blocks, do not overlap.
            let out = unsafe { self.out.part(row * n + features.start..row * n + features.end) };
            let whole = out.len() - out.len() % K::LANES;
            for i in (0..whole).step_by(K::LANES) {
                // SAFETY: `i + LANES` elements are in `out`, `sums` and the features' bias.
                unsafe {
                    let mut v = K::load(sums.as_ptr().add(i));
                    if let Some(bias) = self.bias {
                        v = K::add(v, K::widen(bias[features.start..].as_ptr().add(i)));
                    }
                    K::narrow(out.as_mut_ptr().add(i), v);
                }
            }
            for i in whole..out.len() {
                let bias = self.bias.map(|b| b[features.start + i].to_f32());
                out[i] = T::from_f32(bias.map_or(sums[i], |b| sums[i] + b));
            }
        }
    }

    /// Liberty 3, first way: a pair of weight rows at a time.
    ///
    /// # Safety
    /// As for [`task`](Self::task); `M` is the number of rows and `in_features` a multiple of 8.
    #[inline(always)]
    unsafe fn direct<K: Kernel, const M: usize>(
        &self,
        scales: &mut UnitScales<'_>,
        features: Range<usize>,
        sums: &mut [f32; MAX_ROWS * BLOCK],
    ) {
        let mut o = features.start;
        while o < features.end {
            let at = o - features.start;
            // SAFETY: the caller's promises.
            unsafe {
                if o + 2 <= features.end {
                    self.direct_rows::<K, M, 2>(scales, o, &mut sums[at..]);
                    o += 2;
                } else {
                    self.direct_rows::<K, M, 1>(scales, o, &mut sums[at..]);
                    o += 1;
                }
            }
        }
    }

    /// # Safety
    /// As for [`direct`](Self::direct), for the weight rows `o..o + R`.
    #[inline(always)]
    unsafe fn direct_rows<K: Kernel, const M: usize, const R: usize>(
        &self,
        scales: &mut UnitScales<'_>,
        o: usize,
        sums: &mut [f32],
    ) {
        let k = self.weight.in_features;
        let mut units = Buffer::<{ 2 * SEGMENT / UNIT }>::new();
        let units = units.ptr();
        // SAFETY: per step below.
        unsafe {
            let table = K::table(self.weight.table);
            let mut acc = [[K::zero(); R]; M];
            for start in (0..k).step_by(SEGMENT) {
                let len = SEGMENT.min(k - start);
                let (whole, rest) = (len / K::GROUP, len % K::GROUP);
                let packed = self.weight.packed.as_ptr().add((o * k + start) / 2);
                let x = self.x.add(self.layout.at(0, start / K::GROUP));
                for r in 0..R {
                    // `SEGMENT / UNIT` floats for each row; whole units, as `k % 8 == 0`.
                    let units = units.add(r * (SEGMENT / UNIT));
                    let units = std::slice::from_raw_parts_mut(units, len / UNIT);
                    scales.fill((o + r) * k + start, units);
                }
                let group = |g: usize| (packed.add(g * K::GROUP / 2), units.add(g * K::LANES));
                // Reads of 3 bytes past a group stay inside the row but for its last group.
                for g in 0..whole.saturating_sub(1) {
                    let (packed, units) = group(g);
                    let x = x.add(g * K::GROUP * M);
                    direct_group::<K, M, R, true>(table, packed, k / 2, units, x, &mut acc);
                }
                if whole > 0 {
                    let (packed, units) = group(whole - 1);
                    let x = x.add((whole - 1) * K::GROUP * M);
                    direct_group::<K, M, R, false>(table, packed, k / 2, units, x, &mut acc);
                }
                if rest > 0 {
                    // A copy padded with zeros, codes and scales, meets zeros in `x`.
                    let mut bytes = [[0u8; 64]; R];
                    let (packed, units) = group(whole);
                    for r in 0..R {
                        let from = std::slice::from_raw_parts(packed.add(r * (k / 2)), rest / 2);
                        bytes[r][..rest / 2].copy_from_slice(from);
                        let units = units.add(r * (SEGMENT / UNIT));
                        for unit in rest / UNIT..K::LANES {
                            *units.add(unit) = 0.0;
                        }
                    }
                    let x = x.add(whole * K::GROUP * M);
                    let bytes = bytes.as_ptr().cast();
                    direct_group::<K, M, R, false>(table, bytes, 64, units, x, &mut acc);
                }
            }
            for m in 0..M {
                for r in 0..R {
                    sums[m * BLOCK + r] = K::sum(acc[m][r]);
                }
            }
        }
    }

    /// Liberty 3, second way.
    ///
    /// # Safety
    /// As for [`task`](Self::task).
    #[inline(always)]
    unsafe fn tiled<K: Kernel>(
        &self,
        scales: &mut UnitScales<'_>,
        features: Range<usize>,
        sums: &mut [f32; MAX_ROWS * BLOCK],
    ) {
        const {
            assert!(BLOCK.is_multiple_of(K::WEIGHT_ROWS) && TILE.is_multiple_of(K::GROUP));
        }
        let (k, rows) = (self.weight.in_features, self.layout.rows);
        let mut acc = Buffer::<{ MAX_ROWS * BLOCK * 16 }>::new();
        let mut tile = Buffer::<{ 4 * TILE }>::new();
        let (acc, tile) = (acc.ptr(), tile.ptr());
        let width = if rows > 8 { NARROW_TILE } else { TILE };
        let padded = features.len().next_multiple_of(K::WEIGHT_ROWS);
        // Lanes of row `m` of feature `i` of the block.
        let lanes = |i: usize, m: usize| (i * rows + m) * K::LANES;
        // SAFETY: per step below; `acc` holds `LANES <= 16` floats for `padded <= BLOCK` features
        // of `rows <= MAX_ROWS` rows, `tile` `WEIGHT_ROWS <= 4` rows of `width` codes.
        unsafe {
            for i in 0..if k == 0 { padded * rows } else { 0 } {
                K::store(acc.add(i * K::LANES), K::zero());
            }
            for start in (0..k).step_by(width) {
                let codes = start..k.min(start + width);
                let vectors = codes.len().div_ceil(K::GROUP) * GROUP_VECTORS;
                for i in (0..padded).step_by(K::WEIGHT_ROWS) {
                    for r in 0..K::WEIGHT_ROWS {
                        // Past the block's end its last row stands in; the sums go unread.
                        let o = (features.start + i + r).min(features.end - 1);
                        self.decode::<K>(scales, o, codes.clone(), tile.add(r * K::LANES));
                    }
                    for m in (0..rows).step_by(self.layout.batch) {
                        let x = self.x.add(self.layout.at(m, start / K::GROUP));
                        let acc = acc.add(lanes(i, m));
                        let fresh = start == 0;
                        dot::<K>(self.layout.batch_rows(m), x, tile, vectors, acc, rows, fresh);
                    }
                }
            }
            for i in 0..features.len() {
                for m in 0..rows {
                    sums[m * BLOCK + i] = K::sum(K::load(acc.add(lanes(i, m))));
                }
            }
        }
    }

    /// Decodes `codes` of weight row `o`, scales applied: vector `v` goes to
    /// `to + v * WEIGHT_ROWS * LANES`.
    ///
    /// # Safety
    /// As for [`task`](Self::task); `codes` starts at a group and is no longer than `TILE`; `to`
    /// has room for `WEIGHT_ROWS` rows of its groups, counted from the first row's start.
    #[inline(always)]
    unsafe fn decode<K: Kernel>(
        &self,
        scales: &mut UnitScales<'_>,
        o: usize,
        codes: Range<usize>,
        to: *mut f32,
    ) {
        let weight = self.weight;
        let start = o * weight.in_features + codes.start; // in the flattened weight
        let len = codes.len();
        let (whole, rest) = (len / K::GROUP, len % K::GROUP);
        let mut units = Buffer::<{ TILE / UNIT }>::new();
        let units = units.ptr();
        let mut shifted = [0u8; TILE / 2];
        let bytes = &weight.packed[start / 2..(start + len).div_ceil(2)];
        let bytes = if start % 2 == 0 {
            bytes
        } else {
            // The row starts in a low nibble.
            let next = bytes[1..].iter().copied().chain([0]);
            for ((to, a), b) in shifted.iter_mut().zip(bytes).zip(next) {
                *to = a << 4 | b >> 4;
            }
            &shifted[..len.div_ceil(2)]
        };
        // SAFETY: per step below.
        unsafe {
            let spread = std::slice::from_raw_parts_mut(units, len.div_ceil(UNIT));
            scales.fill(start, spread);
            let table = K::table(weight.table);
            let stride = K::WEIGHT_ROWS * K::LANES;
            let packed = bytes.as_ptr();
            for g in 0..whole {
                let packed = packed.add(g * K::GROUP / 2);
                K::prefetch(packed.wrapping_add(K::WEIGHT_ROWS * weight.in_features / 2));
                let units = units.add(g * K::LANES);
                let to = to.add(g * GROUP_VECTORS * stride);
                // Three bytes past a group are the next group's.
                if g + 1 < whole {
                    decode_group::<K, true>(table, packed, units, to);
                } else {
                    decode_group::<K, false>(table, packed, units, to);
                }
            }
            if rest > 0 {
                let mut padded = [0u8; 64];
                let bytes = &bytes[whole * K::GROUP / 2..];
                padded[..bytes.len()].copy_from_slice(bytes);
                for unit in len.div_ceil(UNIT)..(whole + 1) * K::LANES {
                    *units.add(unit) = 0.0;
                }
                let units = units.add(whole * K::LANES);
                let to = to.add(whole * GROUP_VECTORS * stride);
                decode_group::<K, false>(table, padded.as_ptr(), units, to);
                for i in 0..K::GROUP {
                    if K::CODE_AT[i] as usize >= rest {
                        *to.add(i / K::LANES * stride + i % K::LANES) = 0.0;
                    }
                }
            }
            if start % UNIT != 0 {
                // Liberty 4: codes of a unit behind a border have the next block's scale.
                let block = weight.blocks.blocksize().get();
                for border in (start.next_multiple_of(block)..start + len).step_by(block) {
                    let first = border - start;
                    let mut scale = [0.0];
                    weight.scales.decode(border / block, &mut scale);
                    for code in first..first.next_multiple_of(UNIT).min(len) {
                        let byte = bytes[code / 2];
                        let q = if code % 2 == 0 { byte >> 4 } else { byte & 0x0F };
                        let i = position::<K>(code % K::GROUP);
                        let vector = code / K::GROUP * GROUP_VECTORS + i / K::LANES;
                        *to.add(vector * stride + i % K::LANES) =
                            weight.table[q as usize] * scale[0];
                    }
                }
            }
        }
    }
}

#[repr(align(64))]
struct Line3([f32; MAX_ROWS * BLOCK]);

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

/// Adds a group of `R` weight rows, `row_bytes` apart, times `M` activation rows to `acc`.
///
/// # Safety
/// As for [`Kernel`]; `packed` has a group (and 3 bytes, if `PAST_END`) of each row, `units` their
/// scales `SEGMENT / UNIT` apart, `x` the group's vectors of `M` rows.
#[inline(always)]
unsafe fn direct_group<K: Kernel, const M: usize, const R: usize, const PAST_END: bool>(
    table: K::Table,
    packed: *const u8,
    row_bytes: usize,
    units: *const f32,
    x: *const f32,
    acc: &mut [[K::V; R]; M],
) {
    let per_scale = GROUP_VECTORS / K::SCALES;
    // SAFETY: the caller's promises.
    unsafe {
        let mut codes = [[K::zero(); GROUP_VECTORS]; R];
        for r in 0..R {
            let packed = packed.add(r * row_bytes);
            K::prefetch(packed.wrapping_add(R * row_bytes));
            codes[r] = K::codes::<PAST_END>(table, packed);
        }
        for s in 0..K::SCALES {
            let mut part = [[K::zero(); R]; M];
            for i in 0..per_scale {
                let v = s * per_scale + i;
                for m in 0..M {
                    let x = K::load(x.add((v * M + m) * K::LANES));
                    for r in 0..R {
                        part[m][r] = if i == 0 {
                            K::mul(codes[r][v], x)
                        } else {
                            K::fma(codes[r][v], x, part[m][r])
                        };
                    }
                }
            }
            for r in 0..R {
                let scale = K::scale(units.add(r * (SEGMENT / UNIT)), s);
                for m in 0..M {
                    acc[m][r] = K::fma(part[m][r], scale, acc[m][r]);
                }
            }
        }
    }
}

/// Decodes a group with its scales.
///
/// # Safety
/// As for [`Kernel`]; `packed` has a group (and 3 bytes, if `PAST_END`), `units` its scales, `to`
/// room for its vectors.
#[inline(always)]
unsafe fn decode_group<K: Kernel, const PAST_END: bool>(
    table: K::Table,
    packed: *const u8,
    units: *const f32,
    to: *mut f32,
) {
    // SAFETY: the caller's promises.
    unsafe {
        let codes = K::codes::<PAST_END>(table, packed);
        for (v, &code) in codes.iter().enumerate() {
            let scale = K::scale(units, v * K::SCALES / GROUP_VECTORS);
            K::store(to.add(v * K::WEIGHT_ROWS * K::LANES), K::mul(code, scale));
        }
    }
}

/// Adds `vectors` of `WEIGHT_ROWS` rows of the tile times those of `batch` activation rows to the
/// lanes at `acc` (or sets them, if `fresh`); a weight row's lanes are for `rows` activation rows.
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
    rows: usize,
    fresh: bool,
) {
    // SAFETY: the caller's promises; `batch` is at most `K::ROWS`.
    unsafe {
        macro_rules! dot {
            ($($m:literal)*) => {
                match (batch, K::WEIGHT_ROWS) {
                    $(
                        ($m, 3) if $m <= K::ROWS => dot_rows::<K, $m, 3>(x, tile, vectors, acc, rows, fresh),
                        ($m, 4) if $m <= K::ROWS => dot_rows::<K, $m, 4>(x, tile, vectors, acc, rows, fresh),
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
    rows: usize,
    fresh: bool,
) {
    // SAFETY: the caller's promises.
    unsafe {
        let mut sum = [[K::zero(); R]; M];
        let lanes = |r: usize, m: usize| acc.add((r * rows + m) * K::LANES);
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

/// Reads scales, one for each unit.
struct UnitScales<'a> {
    scales: Scales<'a>,
    block: usize,
    /// Whether so many scales will be asked for that a table of a second-level block's 256 values
    /// pays.
    tabulate: bool,
    /// The second-level block that `table` is for.
    second: usize,
    table: [f32; 256],
}

impl<'a> UnitScales<'a> {
    /// For a task of `features` weight rows.
    #[inline(always)]
    fn new(weight: &Weight4<'a>, features: usize) -> Self {
        let block = weight.blocks.blocksize().get();
        let tabulate = features * weight.in_features / block >= 256;
        Self { scales: weight.scales, block, tabulate, second: usize::MAX, table: [0.0; 256] }
    }

    /// The scales of the units that start at code `start` of the flattened weight; a unit that
    /// holds codes of two blocks gets the first one's.
    #[inline(always)]
    fn fill(&mut self, start: usize, units: &mut [f32]) {
        match self.scales {
            Scales::Plain(absmax) => fill_units(self.block, start, units, |i| absmax[i]),
            Scales::Nested(NestedScales { absmax, code, absmax2, blocksize, offset }) => {
                let shift = blocksize.get().trailing_zeros();
                if self.tabulate {
                    let (second, table) = (&mut self.second, &mut self.table);
                    fill_units(self.block, start, units, |i| {
                        if *second != i >> shift {
                            *second = i >> shift;
                            let absmax2 = absmax2[*second];
                            for (t, c) in table.iter_mut().zip(code) {
                                *t = c * absmax2 + offset;
                            }
                        }
                        table[absmax[i] as usize]
                    });
                } else {
                    fill_units(self.block, start, units, |i| {
                        code[absmax[i] as usize] * absmax2[i >> shift] + offset
                    });
                }
            }
        }
    }
}

/// Sets each unit to the scale of the block that its first code belongs to.
#[inline(always)]
fn fill_units(block: usize, start: usize, units: &mut [f32], mut scale: impl FnMut(usize) -> f32) {
    let first = start / block;
    if block == 64 && start % 64 == 0 {
        // The usual case: a block is 8 units.
        let (blocks, rest) = units.as_chunks_mut::<8>();
        let count = blocks.len();
        for (i, units) in blocks.iter_mut().enumerate() {
            *units = [scale(first + i); 8];
        }
        if !rest.is_empty() {
            rest.fill(scale(first + count));
        }
        return;
    }
    let mut unit = 0;
    for i in first.. {
        if unit == units.len() {
            break;
        }
        let end = ((i + 1) * block - start).div_ceil(UNIT).min(units.len());
        units[unit..end].fill(scale(i));
        unit = end;
    }
}

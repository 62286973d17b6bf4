//! Products with many rows: [`forward`] for more activation rows than `few_rows` takes, and
//! [`grad_input`] for any number. Both are one blocked product,
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
//! are added in order, hence, with `u = 2^-24`, `n` the length of the sum and `w` the weight as
//! `dequantize_4bit` decodes it to float32,
//!
//! ```text
//! |sum - exact| <= (min(n, DEPTH) + n.div_ceil(DEPTH)) * u / (1 - that) * Σ_t |x[t] * w[t]|
//! ```
//!
//! before the bias (one more rounding) and the rounding to `T`.
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
#[cfg(test)]
mod tests;

use super::Weight4;
use crate::Element;
use crate::blocks::BlockSize;
use crate::isa::Isa;
use crate::ops::Scales;
use crate::threads::{self, Chunks, Shared};
use std::cell::Cell;
use std::ops::Range;

/// Sixteen float32: the unit of every block, panel and tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);
const LANES: usize = 16;
const CACHE_LINE: usize = 64;
const _: () = assert!(size_of::<Line>() == 64);

impl Line {
    const ZERO: Self = Self([0.0; LANES]);
}

/// Values of `t` in one stretch: a panel of it (8 KiB) stays in L1 beside what streams from L2.
const DEPTH: usize = 256;
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
/// Scales under a run of codes at most (a run starts anywhere in a block).
const MAX_SCALES: usize = MAX_LANES / BlockSize::ALL[0].get() + 1;
const _: () = assert!(DEPTH <= MAX_LANES);

/// What an instruction set brings: the register tile and the ways in and out of it.
///
/// # Safety
/// Every function requires the instruction set to be present on this machine, and nothing else:
/// the slices are checked.
trait Micro: 'static {
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
    unsafe fn decode(run: &Run<'_>, out: &mut [Line], stride: usize);

    /// Widens elements, 16 to a line, lines `stride` apart; the last is filled up with zeros.
    unsafe fn widen<T: Element>(elements: &[T], out: &mut [Line], stride: usize);

    /// Rounds the first `out.len()` lanes to `T`.
    unsafe fn narrow<T: Element>(line: &Line, out: &mut [T]);

    /// `out[i][j] = rows[j][i]`.
    unsafe fn transpose(rows: [&Line; LANES], out: &mut [Line; LANES]);
}

/// A run of codes in one row of the weight.
struct Run<'a> {
    /// The whole weight's bytes.
    packed: &'a [u8],
    /// Index of the run's first code in the flattened weight.
    first: usize,
    len: usize,
    /// The scales from `first`'s block on.
    scales: &'a [f32],
    /// `log2` of the block size.
    shift: u32,
    table: &'a [f32; 16],
}

/// Up to 16 codes of a run that start anywhere, even within a byte.
struct Group {
    /// The first code is in the highest nibble.
    codes: u64,
    len: usize,
    /// Lanes from `border` on have the second scale.
    border: usize,
    scales: [f32; 2],
}

impl Run<'_> {
    /// Full lines that a kernel may read straight from the bytes, 8 each: all of them if the
    /// run starts at a multiple of 16 (then a line lies within a block), else none.
    fn aligned_lines(&self) -> usize {
        if self.first.is_multiple_of(LANES) { self.len / LANES } else { 0 }
    }

    /// The bytes of those lines, a block or less at a time, and the scale of each.
    #[inline]
    fn aligned(&self) -> impl Iterator<Item = (&[[u8; 8]], f32)> {
        let start = self.first / 2;
        let mut left = self.packed[start..start + self.aligned_lines() * 8].as_chunks::<8>().0;
        let block = (1 << self.shift) / LANES;
        let mut now = block - self.first / LANES % block;
        self.scales.iter().map_while(move |scale| {
            let (lines, rest) = left.split_at(now.min(left.len()));
            (now, left) = (block, rest);
            (!lines.is_empty()).then_some((lines, *scale))
        })
    }

    /// Codes `16 * i ..` of the run.
    #[inline]
    fn group(&self, i: usize) -> Group {
        let at = self.first + i * LANES;
        let len = (self.len - i * LANES).min(LANES);
        let byte = at / 2;
        let nine: [u8; 9] = self.packed.get(byte..byte + 9).map_or_else(
            || {
                let mut end = [0; 9];
                let bytes = &self.packed[byte..(at + len).div_ceil(2)];
                end[..bytes.len()].copy_from_slice(bytes);
                end
            },
            |bytes| bytes.try_into().expect("nine bytes"),
        );
        let [first @ .., last] = nine;
        let mut codes = u64::from_be_bytes(first);
        if at % 2 == 1 {
            codes = codes << 4 | u64::from(last >> 4);
        }
        let block = at >> self.shift;
        let scale = block - (self.first >> self.shift);
        Group {
            codes,
            len,
            border: ((block + 1) << self.shift) - at,
            scales: [self.scales[scale], *self.scales.get(scale + 1).unwrap_or(&0.0)],
        }
    }
}

/// Cache lines to ask for during a tile. What is read next comes in pieces too short for the
/// processor to foresee, and asking for many lines at once would stall it: a tile asks for a few
/// at every 16 values of `t`.
struct Ahead {
    lines: [*const i8; 256],
    len: usize,
}

impl Ahead {
    fn new() -> Self {
        Self { lines: [std::ptr::null(); 256], len: 0 }
    }

    fn lines(&self) -> &[*const i8] {
        &self.lines[..self.len]
    }

    /// Adds a part of a slice, less what lies outside it.
    #[inline]
    fn push<T>(&mut self, slice: &[T], part: Range<usize>) {
        let Some(slice) = slice.get(part) else { return };
        let bytes = slice.as_ptr_range();
        let (start, end) = (bytes.start.cast::<i8>(), bytes.end.cast::<i8>());
        let mut line = start.wrapping_sub(start.addr() % CACHE_LINE);
        while line < end && self.len < self.lines.len() {
            self.lines[self.len] = line;
            self.len += 1;
            line = line.wrapping_add(CACHE_LINE);
        }
    }

    /// The lines to ask for at each of `groups` points of a tile.
    #[inline]
    fn steps(&self, groups: usize) -> impl Iterator<Item = &[*const i8]> {
        let each = self.len.div_ceil(groups).max(1);
        self.lines().chunks(each).chain(std::iter::repeat(&[][..]))
    }
}

/// Starts bringing cache lines near.
#[inline]
fn prefetch(lines: &[*const i8]) {
    for &line in lines {
        #[cfg(target_arch = "x86_64")]
        #[allow(unused_unsafe)] // newer compilers know that it is safe
        // SAFETY: a hint, of any address whatever.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line);
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a hint, of any address whatever. (The intrinsic is not stable.)
        unsafe {
            std::arch::asm!(
                "prfm pldl1keep, [{}]",
                in(reg) line,
                options(nostack, preserves_flags, readonly)
            );
        }
    }
}

impl Weight4<'_> {
    /// Starts bringing codes `columns` of row `o` and their scales into the cache.
    fn fetch(&self, o: usize, columns: Range<usize>, ahead: &mut Ahead) {
        let first = o * self.in_features + columns.start;
        let last = first + columns.len() - 1;
        let shift = self.blocks.blocksize().get().trailing_zeros();
        ahead.push(self.packed, first / 2..last / 2 + 1);
        let scales = first >> shift..(last >> shift) + 1;
        match &self.scales {
            Scales::Plain(absmax) => ahead.push(absmax, scales),
            Scales::Nested(nested) => ahead.push(nested.absmax, scales),
        }
    }

    /// Decodes codes `columns` of row `o`, 16 to a line.
    fn decode<M: Micro>(&self, o: usize, columns: Range<usize>, out: &mut [Line], stride: usize) {
        let first = o * self.in_features + columns.start;
        let shift = self.blocks.blocksize().get().trailing_zeros();
        let which = first >> shift..((first + columns.len() - 1) >> shift) + 1;
        let mut buffer = [0.0; MAX_SCALES];
        let scales = match &self.scales {
            Scales::Plain(absmax) => &absmax[which],
            Scales::Nested(_) => {
                let buffer = &mut buffer[..which.len()];
                self.scales.decode(which.start, buffer);
                buffer
            }
        };
        let run = Run {
            packed: self.packed,
            first,
            len: columns.len(),
            scales,
            shift,
            table: self.table,
        };
        // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
        unsafe { M::decode(&run, out, stride) }
    }
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

struct Forward<'a, T, M> {
    input: &'a [T],
    rows: usize,
    weight: &'a Weight4<'a>,
    bias: Option<&'a [T]>,
    out: Shared<'a, T>,
    micro: std::marker::PhantomData<fn() -> M>,
}

impl<T: Element, M: Micro> Product for Forward<'_, T, M> {
    type M = M;
    const ROWS: Side = Side::Lanes;

    fn rows(&self) -> usize {
        self.rows
    }
    fn features(&self) -> usize {
        self.weight.out_features
    }
    fn depth(&self) -> usize {
        self.weight.in_features
    }

    fn fill_block(
        &self,
        lanes: Range<usize>,
        t: Range<usize>,
        block: &mut [Line],
        stride: usize,
        spare: &mut [Line],
    ) {
        let groups = t.len().div_ceil(LANES);
        let k = self.weight.in_features;
        // `spare[g][m]` is row `m` of 16, columns `16 * g ..`.
        let spare = &mut spare[..groups * LANES];
        for (line, first) in lanes.clone().step_by(LANES).enumerate() {
            let rows = (lanes.end - first).min(LANES);
            for m in 0..rows {
                let row = &self.input[(first + m) * k..][t.clone()];
                // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
                unsafe { M::widen(row, &mut spare[m..], LANES) };
            }
            for m in rows..LANES {
                spare[m..].iter_mut().step_by(LANES).for_each(|l| *l = Line::ZERO);
            }
            let out = block[line * stride..][..groups * LANES].as_chunks_mut::<LANES>().0;
            for (square, out) in spare.as_chunks::<LANES>().0.iter().zip(out) {
                // SAFETY: as above.
                unsafe { M::transpose(square.each_ref(), out) };
            }
        }
    }

    fn fetch_block(
        &self,
        lanes: &Range<usize>,
        t: &Range<usize>,
        steps: Range<usize>,
        n: usize,
        ahead: &mut Ahead,
    ) {
        let k = self.weight.in_features;
        for m in share(lanes, steps, n) {
            ahead.push(self.input, m * k + t.start..m * k + t.end);
        }
    }

    fn fill_row(&self, b: usize, t: Range<usize>, panel: &mut [Line], stride: usize) {
        self.weight.decode::<M>(b, t, panel, stride);
    }

    fn fetch_row(&self, b: usize, t: Range<usize>, ahead: &mut Ahead) {
        self.weight.fetch(b, t, ahead);
    }

    fn finish<'a>(
        &self,
        lanes: Range<usize>,
        broadcast: Range<usize>,
        line: impl Fn(usize, usize) -> &'a Line,
    ) {
        let n = self.weight.out_features;
        let mut square = [Line::ZERO; LANES];
        for (i, first) in lanes.clone().step_by(LANES).enumerate() {
            for o in broadcast.clone().step_by(LANES) {
                let columns = o..(o + LANES).min(broadcast.end);
                let mut bias = Line::ZERO;
                if let Some(all) = self.bias {
                    for (wide, b) in bias.0.iter_mut().zip(&all[columns.clone()]) {
                        *wide = b.to_f32();
                    }
                }
                let sums = std::array::from_fn(|j| {
                    if j < columns.len() { line(i, o + j) } else { &Line::ZERO }
                });
                // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
                unsafe { M::transpose(sums, &mut square) };
                for (m, row) in (first..lanes.end).zip(&mut square) {
                    for (sum, b) in row.0.iter_mut().zip(bias.0) {
                        *sum += b;
                    }
                    // SAFETY: tasks have disjoint lanes (rows) or disjoint columns.
                    let out = unsafe { self.out.part(m * n + columns.start..m * n + columns.end) };
                    // SAFETY: as for `transpose`.
                    unsafe { M::narrow(row, out) };
                }
            }
        }
    }
}

struct GradInput<'a, T, M> {
    grad_output: &'a [T],
    rows: usize,
    weight: &'a Weight4<'a>,
    out: Shared<'a, T>,
    micro: std::marker::PhantomData<fn() -> M>,
}

impl<T: Element, M: Micro> Product for GradInput<'_, T, M> {
    type M = M;
    const ROWS: Side = Side::Broadcast;

    fn rows(&self) -> usize {
        self.rows
    }
    fn features(&self) -> usize {
        self.weight.in_features
    }
    fn depth(&self) -> usize {
        self.weight.out_features
    }

    fn fill_block(
        &self,
        lanes: Range<usize>,
        t: Range<usize>,
        block: &mut [Line],
        stride: usize,
        _: &mut [Line],
    ) {
        let mut near = Ahead::new();
        for (i, o) in t.clone().enumerate() {
            // Asked for long ago, these bytes have left L1 if not L2.
            near.len = 0;
            self.weight.fetch(o + 3, lanes.clone(), &mut near);
            prefetch(near.lines());
            self.weight.decode::<M>(o, lanes.clone(), &mut block[i..], stride);
        }
        for line in block.chunks_mut(stride).take(lanes.len().div_ceil(LANES)) {
            line[t.len()..t.len().next_multiple_of(LANES)].fill(Line::ZERO);
        }
    }

    fn fetch_block(
        &self,
        lanes: &Range<usize>,
        t: &Range<usize>,
        steps: Range<usize>,
        n: usize,
        ahead: &mut Ahead,
    ) {
        for o in share(t, steps, n) {
            self.weight.fetch(o, lanes.clone(), ahead);
        }
    }

    fn fetch_row(&self, b: usize, t: Range<usize>, ahead: &mut Ahead) {
        let n = self.weight.out_features;
        ahead.push(self.grad_output, b * n + t.start..b * n + t.end);
    }

    fn fill_row(&self, b: usize, t: Range<usize>, panel: &mut [Line], stride: usize) {
        let row = &self.grad_output[b * self.weight.out_features..][t];
        // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
        unsafe { M::widen(row, panel, stride) }
    }

    fn finish<'a>(
        &self,
        lanes: Range<usize>,
        broadcast: Range<usize>,
        line: impl Fn(usize, usize) -> &'a Line,
    ) {
        let k = self.weight.in_features;
        for m in broadcast {
            for (i, first) in lanes.clone().step_by(LANES).enumerate() {
                let columns = first..(first + LANES).min(lanes.end);
                // SAFETY: tasks have disjoint rows or disjoint lanes (columns).
                let out = unsafe { self.out.part(m * k + columns.start..m * k + columns.end) };
                // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
                unsafe { M::narrow(line(i, m), out) };
            }
        }
    }
}

/// How a product is cut: every chunk of rows with every chunk of features is a task.
struct Tasks {
    rows: Chunks,
    features: Chunks,
}

impl Tasks {
    /// Chunks as large as the scratch allows, which shares the work of decoding and packing among
    /// many multiplications, but enough of them to keep every thread busy. The result does not
    /// depend on the choice.
    fn new<P: Product>(product: &P) -> Self {
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
        let busy = (4 * threads).div_ceil(rows.count()).min(features.div_ceil(FEW_FEATURES));
        let mut count = features.div_ceil(most).max(busy);
        if count >= threads {
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

fn run<P: Product>(product: &P) {
    let Tasks { rows, features } = Tasks::new(product);
    threads::run(rows.count() * features.count(), |i| {
        let rows = rows.range(i / features.count());
        let features = features.range(i % features.count());
        with_scratch(|scratch| match P::ROWS {
            Side::Lanes => task(product, rows, features, scratch),
            Side::Broadcast => task(product, features, rows, scratch),
        });
    });
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
                fetch.len = 0;
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
fn with_scratch(work: impl FnOnce(&mut [Line])) {
    thread_local!(static KEPT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) });
    let mut scratch = KEPT.take();
    scratch.resize(SCRATCH, Line::ZERO);
    work(&mut scratch);
    KEPT.set(scratch);
}

/// `out = input · weight^T + bias`.
pub(super) fn forward<T: Element>(
    isa: Isa,
    input: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    fn with<T: Element, M: Micro>(
        input: &[T],
        rows: usize,
        weight: &Weight4<'_>,
        bias: Option<&[T]>,
        out: &mut [T],
    ) {
        let out = Shared::new(out);
        run(&Forward::<T, M> { input, rows, weight, bias, out, micro: std::marker::PhantomData });
    }
    match isa {
        _ if out.is_empty() || input.is_empty() => {
            super::scalar::forward(input, rows, weight, bias, out);
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => with::<T, avx512::Avx512>(input, rows, weight, bias, out),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => with::<T, avx2::Avx2>(input, rows, weight, bias, out),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => with::<T, neon::Neon>(input, rows, weight, bias, out),
        _ => super::scalar::forward(input, rows, weight, bias, out),
    }
}

/// `out = grad_output · weight`.
pub(super) fn grad_input<T: Element>(
    isa: Isa,
    grad_output: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    out: &mut [T],
) {
    fn with<T: Element, M: Micro>(
        grad_output: &[T],
        rows: usize,
        weight: &Weight4<'_>,
        out: &mut [T],
    ) {
        let out = Shared::new(out);
        run(&GradInput::<T, M> { grad_output, rows, weight, out, micro: std::marker::PhantomData });
    }
    match isa {
        _ if out.is_empty() || grad_output.is_empty() => {
            super::scalar::grad_input(grad_output, rows, weight, out);
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => with::<T, avx512::Avx512>(grad_output, rows, weight, out),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => with::<T, avx2::Avx2>(grad_output, rows, weight, out),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => with::<T, neon::Neon>(grad_output, rows, weight, out),
        _ => super::scalar::grad_input(grad_output, rows, weight, out),
    }
}

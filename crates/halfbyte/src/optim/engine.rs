//! The walk over tensors, blocks and lanes that all rules share.
//!
//! 8-bit states, a block of 256 at a time, in two passes of which the second reads the L1 cache:
//!
//! ```text
//! for each group of 4 vectors:                    (1)
//!     s = rule.states(g, p, code[q] * absmax)
//!     top = max(top, |s|)
//! for each group of 4 vectors:
//!     p = p + p * shrink + rate * rule.update(s)  (2)
//!     q = nearest code of s * (1 / top)           (3)
//! ```
//!
//! 1. Nothing is written to the tensors before `top` is known: a block whose states are not all
//!    finite, or too small to have a reciprocal, is done again element by element, [`by_element`].
//! 2. In the same loop as the encoding, so that the divider works beside the other units.
//! 3. A second moment above zero never gets the code of zero, [`keep_positive`].

mod coder;

use super::float::{self, Buffer, LEN};
use super::round::{self, Random};
use super::rules::{AdEmaMix, Adagrad, Adam, Lion, Momentum, RmsProp, ScheduleFree, Step, Update};
use super::tensor::{Rounding, Tensor8, Tensor32};
use super::vector::Vector;
use super::{Coefficients, Hyper, Rule};
use crate::code::encode8::nearest;
use crate::code::{Code8, Kind};
use crate::isa::Isa;
use crate::ops::normalize::Normalizer;
use crate::threads;
use crate::{DType, bf16};
use coder::Coder;
use std::ffi::c_void;
use std::ops::Range;

/// Blocks per task.
const TASK: usize = 256;

/// A tensor as its kernels see it. `S` is the type of a state: `f32` or `u8`.
struct Raw<S> {
    n: usize,
    param: (DType, *mut c_void),
    grad: (DType, *const c_void),
    /// A state that is float32 beside 8-bit ones, or null.
    floats: *mut f32,
    /// First moments, then the second; for 8-bit states after a place for `floats`, if it is there.
    states: [*mut S; 3],
    /// Of 8-bit states.
    absmax: [*mut f32; 3],
    rounding: RawRounding,
    /// Learning rate, bias correction and trust ratio.
    rate: f32,
}

#[derive(Clone, Copy)]
enum RawRounding {
    Nearest,
    Stochastic(Random),
    Kahan(*mut bf16),
}

// SAFETY: a `Raw` is made of exclusive borrows that outlive it; tasks touch disjoint blocks.
unsafe impl<S> Sync for Raw<S> {}
// SAFETY: as above.
unsafe impl<S> Send for Raw<S> {}

impl RawRounding {
    fn new(rounding: &mut Rounding<'_>, dtype: DType, step: u64) -> Self {
        match rounding {
            _ if dtype != DType::BF16 => Self::Nearest,
            Rounding::Nearest => Self::Nearest,
            Rounding::Stochastic { seed, stream } => {
                Self::Stochastic(Random { seed: *seed, step, stream: *stream })
            }
            Rounding::Kahan(rest) => Self::Kahan(rest.as_mut_ptr()),
        }
    }
}

/// The parts of states from place `start` on: those of the first kind, one after the other, then
/// the second.
fn parts<S>(start: usize, n: usize, state1: &mut [S], state2: &mut [S]) -> [*mut S; 3] {
    let mut parts = [std::ptr::null_mut(); 3];
    let all = state1.chunks_mut(n.max(1)).chain(state2.chunks_mut(n.max(1)));
    for (part, chunk) in parts[start..].iter_mut().zip(all) {
        *part = chunk.as_mut_ptr();
    }
    parts
}

impl<S> Raw<S> {
    fn blocks(&self) -> usize {
        self.n.div_ceil(LEN)
    }

    /// The elements of a block: where it starts, and how many there are.
    fn block(&self, block: usize) -> (usize, usize) {
        let start = block * LEN;
        (start, LEN.min(self.n - start))
    }

    /// The states from an element on.
    #[inline(always)]
    fn states_at<const N: usize>(&self, start: usize) -> [*mut S; N] {
        std::array::from_fn(|i| self.states[i].wrapping_add(start))
    }

    /// The scales of a block.
    #[inline(always)]
    fn scales_at<const N: usize>(&self, block: usize) -> [*mut f32; N] {
        std::array::from_fn(|i| self.absmax[i].wrapping_add(block))
    }

    /// A block of the parameter as float32, where it is or in `buffer`.
    ///
    /// # Safety
    /// The block is one of this tensor's and nobody else's now; the CPU has `V`'s instruction set.
    #[inline(always)]
    unsafe fn read_param<V: Vector>(&self, block: usize, buffer: &mut Buffer) -> *mut f32 {
        let (start, n) = self.block(block);
        // SAFETY: the block lies inside the tensor.
        unsafe {
            let data = (self.param.0, self.param.1.cast_const());
            let at = float::read::<V>(data, start, n, buffer).cast_mut();
            if let RawRounding::Kahan(rest) = self.rounding {
                round::add_compensation(buffer, std::slice::from_raw_parts(rest.add(start), n));
            }
            at
        }
    }

    /// Puts the parameter back, rounded.
    ///
    /// # Safety
    /// As [`read_param`](Self::read_param).
    #[inline(always)]
    unsafe fn write_param<V: Vector>(&self, block: usize, buffer: &Buffer) {
        let (start, n) = self.block(block);
        // SAFETY: the block lies inside the tensor; roundings other than to nearest are of bf16.
        unsafe {
            let out = || std::slice::from_raw_parts_mut(self.param.1.cast::<bf16>().add(start), n);
            match self.rounding {
                RawRounding::Nearest => float::write::<V>(self.param, start, n, buffer),
                RawRounding::Stochastic(random) => random.round(buffer, block, out()),
                RawRounding::Kahan(rest) => {
                    let rest = std::slice::from_raw_parts_mut(rest.add(start), n);
                    round::round_compensated(buffer, out(), rest);
                }
            }
        }
    }
}

/// What a kernel of 8-bit states is called with, beside the tensor.
struct Job8<'a, U> {
    step: Step<U>,
    codes: [&'a Code8; 2],
    skip_zeros: bool,
}

/// A range of blocks of one tensor, with the coders of one instruction set.
///
/// # Safety
/// The blocks are the tensor's and nobody else's now; the CPU has the instruction set.
#[inline(always)]
unsafe fn blocks8<V: Vector, U: Update<N>, const N: usize>(
    signed: &impl Coder<V>,
    unsigned: &impl Coder<V>,
    job: &Job8<'_, U>,
    t: &Raw<u8>,
    blocks: Range<usize>,
) {
    let mut buffers = [Buffer([0.0; LEN]), Buffer([0.0; LEN])];
    let [g_buffer, p_buffer] = &mut buffers;
    // Zeros, and zeros of the default codes, for what a short block lacks.
    let mut padded = [[0u8; LEN]; N];
    let mut padded_floats = Buffer([0.0; LEN]);
    let mut scratch =
        Scratch { states: [const { Buffer([0.0; LEN]) }; N], carries: Buffer([0.0; LEN]) };
    for block in blocks {
        let (start, n) = t.block(block);
        // SAFETY: the block lies inside the tensor, whose states and scales were checked to have
        // its length; the buffers hold whole blocks.
        unsafe {
            let g = float::read::<V>(t.grad, start, n, g_buffer);
            let p = t.read_param::<V>(block, p_buffer);
            let mut q: [*mut u8; N] = t.states_at(start);
            let scales: [*mut f32; N] = t.scales_at(block);
            let mut floats = t.floats.wrapping_add(start);
            if n < LEN {
                if U::FLOATS > 0 {
                    let data = (DType::F32, floats.cast_const().cast());
                    floats = float::read::<V>(data, 0, n, &mut padded_floats).cast_mut();
                }
                for i in U::FLOATS..N {
                    let zero = if i < N - U::SECOND { 127 } else { 0 };
                    padded[i] = [zero; LEN];
                    padded[i][..n].copy_from_slice(std::slice::from_raw_parts(q[i], n));
                    q[i] = padded[i].as_mut_ptr();
                }
            }
            let b = Block8 { g, p, floats, q, scales };
            if !block8::<V, U, N>(signed, unsigned, &job.step, t.rate, &b, &mut scratch) {
                by_element::<U, N>(job, t.rate, LEN, &b);
            }
            if n < LEN {
                if U::FLOATS > 0 {
                    float::write::<V>((DType::F32, t.floats.cast()), start, n, &padded_floats);
                }
                for i in U::FLOATS..N {
                    let to = std::slice::from_raw_parts_mut(t.states[i].add(start), n);
                    to.copy_from_slice(&padded[i][..n]);
                }
            }
            t.write_param::<V>(block, p_buffer);
        }
    }
}

/// A block of a tensor with 8-bit states.
struct Block8<const N: usize> {
    g: *const f32,
    p: *mut f32,
    /// The state that is float32, if any: the first.
    floats: *mut f32,
    q: [*mut u8; N],
    scales: [*mut f32; N],
}

/// What the second pass over a block takes from the first: new states, and what `update` needs.
struct Scratch<const N: usize> {
    states: [Buffer; N],
    carries: Buffer,
}

/// One whole block. False, and nothing is changed, when it must be done by [`by_element`].
///
/// # Safety
/// Gradient, parameter and states hold 256 elements; the CPU has the instruction set.
#[inline(always)]
unsafe fn block8<V: Vector, U: Update<N>, const N: usize>(
    signed: &impl Coder<V>,
    unsigned: &impl Coder<V>,
    step: &Step<U>,
    rate: f32,
    b: &Block8<N>,
    scratch: &mut Scratch<N>,
) -> bool {
    let Scratch { states, carries } = scratch;
    let group = 4 * V::LANES;
    // SAFETY: all offsets are below 256; the instruction set is there by the caller's contract.
    unsafe {
        let gnorm_scale = V::splat(step.gnorm_scale);
        let mut top = [V::splat(0.0); N];
        for at in (0..LEN).step_by(group) {
            let mut old = [[gnorm_scale; 4]; N];
            for i in 0..N {
                if i < U::FLOATS {
                    for v in 0..4 {
                        old[i][v] = V::load(b.floats.cast_const().add(at + v * V::LANES));
                    }
                    continue;
                }
                let scale = V::splat(*b.scales[i]);
                let values = if i >= N - U::SECOND {
                    unsigned.decode(b.q[i].add(at))
                } else if N == 2 {
                    // With three states the permutes cost more than they hide.
                    signed.decode_beside(b.q[i].add(at))
                } else {
                    signed.decode(b.q[i].add(at))
                };
                for v in 0..4 {
                    old[i][v] = values[v].mul(scale);
                }
            }
            for v in 0..4 {
                let at = at + v * V::LANES;
                let mut s = [gnorm_scale; N];
                for i in 0..N {
                    s[i] = old[i][v];
                }
                let g = V::load(b.g.add(at)).mul(gnorm_scale);
                let p = V::load(b.p.cast_const().add(at));
                let (s, carry) = step.rule.states(g, p, s);
                for i in 0..N {
                    let second = i >= N - U::SECOND;
                    top[i] =
                        if second { top[i].max_bits(s[i]) } else { top[i].max_magnitude(s[i]) };
                    s[i].store(states[i].0.as_mut_ptr().add(at));
                }
                if U::CARRIES {
                    carry.store(carries.0.as_mut_ptr().add(at));
                }
            }
        }
        let mut reciprocals = [0.0; N];
        let mut absmax = [0.0; N];
        for i in 0..N {
            let top = top[i].largest();
            let invertible = i < U::FLOATS || top == 0.0 || top > Normalizer::SMALLEST_DIRECT;
            if !(invertible && top.is_finite()) {
                return false;
            }
            absmax[i] = top;
            reciprocals[i] = if top == 0.0 { 0.0 } else { 1.0 / top };
        }
        let (rate, smallest) = (V::splat(rate), V::splat(unsigned.smallest()));
        for at in (0..LEN).step_by(group) {
            let mut y = [[rate; 4]; N];
            for v in 0..4 {
                let at = at + v * V::LANES;
                let mut s = [rate; N];
                for i in 0..N {
                    s[i] = V::load(states[i].0.as_ptr().add(at));
                    if i < U::FLOATS {
                        s[i].store(b.floats.add(at));
                    } else {
                        y[i][v] = s[i].mul(V::splat(reciprocals[i]));
                    }
                    if i >= N - U::SECOND {
                        y[i][v] = y[i][v].at_least(smallest, s[i]);
                    }
                }
                let carry = if U::CARRIES { V::load(carries.0.as_ptr().add(at)) } else { rate };
                let update = step.rule.update(s, carry);
                let old = V::load(b.p.cast_const().add(at));
                step.param(old, update, rate).store(b.p.add(at));
            }
            for i in U::FLOATS..N {
                if i < N - U::SECOND {
                    signed.encode(y[i], b.q[i].add(at));
                } else {
                    unsigned.encode(y[i], b.q[i].add(at));
                }
            }
        }
        for i in U::FLOATS..N {
            *b.scales[i] = absmax[i];
        }
    }
    true
}

/// The definition: `n` elements of a block, one after the other, with any codes.
///
/// # Safety
/// Gradient, parameter and states hold `n` elements.
unsafe fn by_element<U: Update<N>, const N: usize>(
    job: &Job8<'_, U>,
    rate: f32,
    n: usize,
    b: &Block8<N>,
) {
    let code = |i: usize| job.codes[usize::from(i >= N - U::SECOND)];
    let mut states = [[0.0f32; LEN]; N];
    for j in 0..n {
        // SAFETY: j < n; the scales are the block's.
        unsafe {
            let (g, p) = (*b.g.add(j), b.p.add(j));
            let old: [f32; N] = std::array::from_fn(|i| {
                if i < U::FLOATS {
                    *b.floats.add(j)
                } else {
                    code(i).values()[usize::from(*b.q[i].add(j))] * *b.scales[i]
                }
            });
            let (new, carry) = job.step.rule.states(g * job.step.gnorm_scale, *p, old);
            let s = if !new.iter().all(|s| s.is_finite()) {
                // What is not a moment stays, as the parameter does.
                std::array::from_fn(|i| if i < U::FLOATS { old[i] } else { 0.0 })
            } else if job.skip_zeros && g == 0.0 {
                old
            } else {
                *p = job.step.param(*p, job.step.rule.update(new, carry), rate);
                new
            };
            for i in 0..N {
                states[i][j] = s[i];
            }
        }
    }
    for i in 0..N {
        let s = &states[i][..n];
        if i < U::FLOATS {
            // SAFETY: there are n of them.
            unsafe { std::slice::from_raw_parts_mut(b.floats, n) }.copy_from_slice(s);
            continue;
        }
        let absmax = s.iter().fold(0.0f32, |top, s| top.max(s.abs()));
        let normalizer = Normalizer::new(absmax);
        for (j, &s) in s.iter().enumerate() {
            let index = nearest(code(i), normalizer.apply(s).clamp(-1.0, 1.0));
            let index = if i < N - U::SECOND {
                keep_sign(code(i), index, s)
            } else {
                keep_positive(code(i), index, s)
            };
            // SAFETY: j < n.
            unsafe { *b.q[i].add(j) = index };
        }
        // SAFETY: the scale is the block's.
        unsafe { *b.scales[i] = absmax };
    }
}

/// The neighbouring code if that of `index` has the other sign than `s`: a moment never changes
/// sign through encoding. The default maps hold 0, so their nearest code never has.
fn keep_sign(code: &Code8, index: u8, s: f32) -> u8 {
    let value = code.values()[usize::from(index)];
    if s > 0.0 && value < 0.0 {
        index.saturating_add(1)
    } else if s < 0.0 && value > 0.0 {
        index.saturating_sub(1)
    } else {
        index
    }
}

/// The smallest code above zero if `s` is above zero and `index` is not: a second moment of zero
/// beside a first moment that is not zero would divide it by eps alone. (An element whose gradients
/// are below 1/2500 of its block's largest, and then stop: thousands of learning rates in one step.)
fn keep_positive(code: &Code8, index: u8, s: f32) -> u8 {
    if s > 0.0 && code.values()[usize::from(index)] <= 0.0 {
        code.values().partition_point(|&value| value <= 0.0).min(255) as u8
    } else {
        index
    }
}

/// Any codes, any instruction set.
///
/// # Safety
/// The blocks are the tensor's and nobody else's now.
unsafe fn blocks8_scalar<U: Update<N>, const N: usize>(
    job: &Job8<'_, U>,
    t: &Raw<u8>,
    blocks: Range<usize>,
) {
    let mut buffers = [Buffer([0.0; LEN]), Buffer([0.0; LEN])];
    let [g_buffer, p_buffer] = &mut buffers;
    for block in blocks {
        let (start, n) = t.block(block);
        // SAFETY: the block lies inside the tensor, whose states and scales were checked to have
        // its length; `f32` is on every CPU.
        unsafe {
            let g = float::read::<f32>(t.grad, start, n, g_buffer);
            let p = t.read_param::<f32>(block, p_buffer);
            let floats = t.floats.wrapping_add(start);
            let (q, scales) = (t.states_at(start), t.scales_at(block));
            by_element::<U, N>(job, t.rate, n, &Block8 { g, p, floats, q, scales });
            t.write_param::<f32>(block, p_buffer);
        }
    }
}

/// What a kernel of float32 states is called with, beside the tensor.
struct Job32<U> {
    step: Step<U>,
    skip_zeros: bool,
}

/// A range of blocks of one tensor, states in float32.
///
/// # Safety
/// The blocks are the tensor's and nobody else's now; the CPU has the instruction set.
#[inline(always)]
unsafe fn blocks32<V: Vector, U: Update<N>, const N: usize>(
    job: &Job32<U>,
    t: &Raw<f32>,
    blocks: Range<usize>,
) {
    let mut buffers = [Buffer([0.0; LEN]), Buffer([0.0; LEN])];
    let [g_buffer, p_buffer] = &mut buffers;
    for block in blocks {
        let (start, n) = t.block(block);
        // SAFETY: the block lies inside the tensor, whose states were checked to have its length.
        unsafe {
            let g = float::read::<V>(t.grad, start, n, g_buffer);
            let p = t.read_param::<V>(block, p_buffer);
            let s: [*mut f32; N] = t.states_at(start);
            let whole = if job.skip_zeros { 0 } else { n - n % V::LANES };
            elements32::<V, U, N>(job, t.rate, 0..whole, g, p, s);
            elements32::<f32, U, N>(job, t.rate, whole..n, g, p, s);
            t.write_param::<V>(block, p_buffer);
        }
    }
}

/// # Safety
/// Gradient, parameter and states hold the range, a multiple of `V`'s lanes; the CPU has the
/// instruction set.
#[inline(always)]
unsafe fn elements32<V: Vector, U: Update<N>, const N: usize>(
    job: &Job32<U>,
    rate: f32,
    range: Range<usize>,
    g: *const f32,
    p: *mut f32,
    states: [*mut f32; N],
) {
    // SAFETY: by the caller's contract.
    unsafe {
        let step = &job.step;
        let (gnorm_scale, rate) = (V::splat(step.gnorm_scale), V::splat(rate));
        for at in range.step_by(V::LANES) {
            if V::LANES == 1 && job.skip_zeros && *g.add(at) == 0.0 {
                continue;
            }
            let mut s = [rate; N];
            for i in 0..N {
                s[i] = V::load(states[i].cast_const().add(at));
            }
            let old = V::load(p.cast_const().add(at));
            let (s, carry) = step.rule.states(V::load(g.add(at)).mul(gnorm_scale), old, s);
            for i in 0..N {
                s[i].store(states[i].add(at));
            }
            step.param(old, step.rule.update(s, carry), rate).store(p.add(at));
        }
    }
}

/// The squared norms of update and parameter over a range of blocks. Nothing is changed.
///
/// Summed in float32 over 16 lanes within a block, then in float64: the same for every instruction
/// set.
///
/// # Safety
/// The blocks are the tensor's; the CPU has the instruction set.
#[inline(always)]
unsafe fn norms<V: Vector, U: Update<N>, const N: usize>(
    step: &Step<U>,
    t: &Raw<f32>,
    blocks: Range<usize>,
) -> [f64; 2] {
    const LANES: usize = 16;
    let mut buffers = [Buffer([0.0; LEN]), Buffer([0.0; LEN])];
    let [g_buffer, p_buffer] = &mut buffers;
    let mut total = [0.0; 2];
    for block in blocks {
        let (start, n) = t.block(block);
        let mut sums = [[0.0f32; LANES]; 2];
        // SAFETY: the block lies inside the tensor, whose states were checked to have its length.
        unsafe {
            let g = float::read::<V>(t.grad, start, n, g_buffer);
            let p = t.read_param::<V>(block, p_buffer).cast_const();
            let s: [*const f32; N] = std::array::from_fn(|i| t.states[i].cast_const().add(start));
            let whole = n - n % LANES;
            for at in (0..whole).step_by(V::LANES) {
                add_squares::<V, U, N>(step, at, g, p, s, &mut sums);
            }
            for at in whole..n {
                add_squares::<f32, U, N>(step, at, g, p, s, &mut sums);
            }
        }
        for (total, sums) in total.iter_mut().zip(sums) {
            *total += sums.into_iter().map(f64::from).sum::<f64>();
        }
    }
    total
}

/// # Safety
/// As [`elements32`], for one vector.
#[inline(always)]
unsafe fn add_squares<V: Vector, U: Update<N>, const N: usize>(
    step: &Step<U>,
    at: usize,
    g: *const f32,
    p: *const f32,
    states: [*const f32; N],
    sums: &mut [[f32; 16]; 2],
) {
    // SAFETY: by the caller's contract; at % 16 + V::LANES <= 16.
    unsafe {
        let p = V::load(p.add(at));
        let mut s = [p; N];
        for i in 0..N {
            s[i] = V::load(states[i].add(at));
        }
        let g = V::load(g.add(at)).mul(V::splat(step.gnorm_scale));
        let (s, carry) = step.rule.states(g, p, s);
        let update = step.rule.update(s, carry);
        for (x, sums) in [update, p].into_iter().zip(sums) {
            let sum = sums.as_mut_ptr().add(at % 16);
            x.mul_add(x, V::load(sum.cast_const())).store(sum);
        }
    }
}

type Kernel8<U> = unsafe fn(&Job8<'_, U>, &Raw<u8>, Range<usize>);
type Kernel32<U> = unsafe fn(&Job32<U>, &Raw<f32>, Range<usize>);
type Norms<U> = unsafe fn(&Step<U>, &Raw<f32>, Range<usize>) -> [f64; 2];

/// The kernels of one instruction set: the generic walks with its vectors and its features.
macro_rules! isa_kernels {
    ($module:ident, $vector:ident, $coder:ident, $arch:literal, $features:literal) => {
        #[cfg(target_arch = $arch)]
        mod $module {
            use super::coder::$coder;
            use super::{Job8, Job32, Raw, Step, Update, blocks8, blocks32, norms};
            use crate::optim::vector::$vector;
            use std::ops::Range;

            #[target_feature(enable = $features)]
            pub(super) unsafe fn step8<U: Update<N>, const N: usize>(
                job: &Job8<'_, U>,
                t: &Raw<u8>,
                blocks: Range<usize>,
            ) {
                let (signed, unsigned) = ($coder::<true>::new(), $coder::<false>::new());
                // SAFETY: the caller has the features; the rest is its contract.
                unsafe { blocks8::<$vector, U, N>(&signed, &unsigned, job, t, blocks) }
            }

            #[target_feature(enable = $features)]
            pub(super) unsafe fn step32<U: Update<N>, const N: usize>(
                job: &Job32<U>,
                t: &Raw<f32>,
                blocks: Range<usize>,
            ) {
                // SAFETY: the caller has the features; the rest is its contract.
                unsafe { blocks32::<$vector, U, N>(job, t, blocks) }
            }

            #[target_feature(enable = $features)]
            pub(super) unsafe fn squares<U: Update<N>, const N: usize>(
                step: &Step<U>,
                t: &Raw<f32>,
                blocks: Range<usize>,
            ) -> [f64; 2] {
                // SAFETY: the caller has the features; the rest is its contract.
                unsafe { norms::<$vector, U, N>(step, t, blocks) }
            }
        }
    };
}

isa_kernels!(
    avx512,
    Avx512,
    Coder512,
    "x86_64",
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);
isa_kernels!(avx2, Avx2, Coder256, "x86_64", "avx2,fma,f16c");
isa_kernels!(neon, Neon, Coder128, "aarch64", "neon");

fn kernel8<U: Update<N>, const N: usize>(isa: Isa, job: &Job8<'_, U>) -> Kernel8<U> {
    let default = job.codes[0].kind() == Kind::DynamicSigned
        && (U::SECOND == 0 || job.codes[1].kind() == Kind::DynamicUnsigned);
    match isa {
        _ if !default || job.skip_zeros => blocks8_scalar::<U, N>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::step8::<U, N>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::step8::<U, N>,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::step8::<U, N>,
        _ => blocks8_scalar::<U, N>,
    }
}

fn kernel32<U: Update<N>, const N: usize>(isa: Isa) -> Kernel32<U> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::step32::<U, N>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::step32::<U, N>,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::step32::<U, N>,
        _ => blocks32::<f32, U, N>,
    }
}

fn kernel_norms<U: Update<N>, const N: usize>(isa: Isa) -> Norms<U> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::squares::<U, N>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::squares::<U, N>,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::squares::<U, N>,
        _ => norms::<f32, U, N>,
    }
}

/// All tensors cut into tasks of [`TASK`] blocks.
struct Tasks {
    /// The first task of each tensor, and the number of all.
    first: Vec<usize>,
}

impl Tasks {
    fn new<S>(tensors: &[Raw<S>]) -> Self {
        let mut first = vec![0];
        let mut tasks = 0;
        for t in tensors {
            tasks += t.blocks().div_ceil(TASK);
            first.push(tasks);
        }
        Self { first }
    }

    fn count(&self) -> usize {
        self.first.last().copied().unwrap_or(0)
    }

    /// The tensor and the blocks of a task.
    fn get<S>(&self, task: usize, tensors: &[Raw<S>]) -> (usize, Range<usize>) {
        let tensor = self.first.partition_point(|&first| first <= task) - 1;
        let block = (task - self.first[tensor]) * TASK;
        (tensor, block..(block + TASK).min(tensors[tensor].blocks()))
    }
}

/// Calls `$run::<U, N>($args)` with the type of a rule.
macro_rules! with_rule {
    ($rule:expr, $run:ident($($arg:expr),* $(,)?)) => {
        match $rule {
            Rule::Adam => $run::<Adam, 2>($($arg),*),
            Rule::AdEmaMix => $run::<AdEmaMix, 3>($($arg),*),
            Rule::Momentum => $run::<Momentum, 1>($($arg),*),
            Rule::Lion => $run::<Lion, 1>($($arg),*),
            Rule::RmsProp => $run::<RmsProp, 1>($($arg),*),
            Rule::Adagrad => $run::<Adagrad, 1>($($arg),*),
            Rule::ScheduleFree => $run::<ScheduleFree, 2>($($arg),*),
        }
    };
}

pub(super) fn coefficients(rule: Rule, hyper: &Hyper) -> Coefficients {
    with_rule!(rule, coefficients_of(hyper))
}

fn coefficients_of<U: Update<N>, const N: usize>(hyper: &Hyper) -> Coefficients {
    U::new(hyper).coefficients()
}

pub(super) fn step_8bit(
    isa: Isa,
    rule: Rule,
    hyper: &Hyper,
    codes: [&Code8; 2],
    tensors: &mut [Tensor8<'_>],
) {
    with_rule!(rule, run8(isa, hyper, codes, tensors));
}

fn run8<U: Update<N>, const N: usize>(
    isa: Isa,
    hyper: &Hyper,
    codes: [&Code8; 2],
    tensors: &mut [Tensor8<'_>],
) {
    let job = Job8 { step: U::new(hyper), codes, skip_zeros: hyper.skip_zeros };
    let kernel = kernel8::<U, N>(isa, &job);
    let tensors: Vec<Raw<u8>> = tensors
        .iter_mut()
        .map(|t| {
            let n = t.param.len();
            let param = t.param.raw();
            Raw {
                n,
                param,
                grad: t.grad.raw(),
                floats: t.floats.as_mut_ptr(),
                states: parts(U::FLOATS, n, t.state1, t.state2),
                absmax: parts(U::FLOATS, n.div_ceil(LEN), t.absmax1, t.absmax2),
                rounding: RawRounding::new(&mut t.rounding, param.0, hyper.step),
                rate: job.step.rate as f32,
            }
        })
        .collect();
    let tasks = Tasks::new(&tensors);
    threads::run(tasks.count(), |task| {
        let (tensor, blocks) = tasks.get(task, &tensors);
        // SAFETY: no two tasks share a block; lengths were checked; `isa` was detected here.
        unsafe { kernel(&job, &tensors[tensor], blocks) }
    });
}

pub(super) fn step_32bit(isa: Isa, rule: Rule, hyper: &Hyper, tensors: &mut [Tensor32<'_>]) {
    with_rule!(rule, run32(isa, rule, hyper, tensors));
}

fn run32<U: Update<N>, const N: usize>(
    isa: Isa,
    rule: Rule,
    hyper: &Hyper,
    tensors: &mut [Tensor32<'_>],
) {
    let job = Job32 { step: U::new(hyper), skip_zeros: hyper.skip_zeros };
    let kernel = kernel32::<U, N>(isa);
    let mut raw: Vec<Raw<f32>> = tensors
        .iter_mut()
        .map(|t| {
            let n = t.param.len();
            let param = t.param.raw();
            Raw {
                n,
                param,
                grad: t.grad.raw(),
                floats: std::ptr::null_mut(),
                states: parts(0, n, t.state1, t.state2),
                absmax: [std::ptr::null_mut(); 3],
                rounding: RawRounding::new(&mut t.rounding, param.0, hyper.step),
                rate: job.step.rate as f32,
            }
        })
        .collect();
    let tasks = Tasks::new(&raw);
    if hyper.max_unorm > 0.0 && rule.has_trust_ratio() {
        let sums = squared_norms::<U, N>(isa, &job.step, &raw, &tasks);
        for ((raw, t), [update, param]) in raw.iter_mut().zip(tensors).zip(sums) {
            let (norm, param) = (update.sqrt(), t.param_norm.unwrap_or_else(|| param.sqrt()));
            let bound = hyper.max_unorm * param;
            let ratio = if norm > bound { bound / norm } else { 1.0 };
            raw.rate = (job.step.rate * ratio) as f32;
            if let Some(out) = t.update_norm.as_deref_mut() {
                *out = norm as f32;
            }
        }
    }
    threads::run(tasks.count(), |task| {
        let (tensor, blocks) = tasks.get(task, &raw);
        // SAFETY: no two tasks share a block; lengths were checked; `isa` was detected here.
        unsafe { kernel(&job, &raw[tensor], blocks) }
    });
}

/// The squared norms of update and parameter, for each tensor: the sums of its tasks, in order.
fn squared_norms<U: Update<N>, const N: usize>(
    isa: Isa,
    step: &Step<U>,
    tensors: &[Raw<f32>],
    tasks: &Tasks,
) -> Vec<[f64; 2]> {
    let kernel = kernel_norms::<U, N>(isa);
    let mut sums = vec![[0.0; 2]; tasks.count()];
    let shared = threads::Shared::new(&mut sums);
    threads::run(tasks.count(), |task| {
        let (tensor, blocks) = tasks.get(task, tensors);
        // SAFETY: the task's own sums; no task writes to tensors; `isa` was detected here.
        unsafe { shared.part(task..task + 1)[0] = kernel(step, &tensors[tensor], blocks) };
    });
    tasks
        .first
        .windows(2)
        .map(|range| {
            let sums = &sums[range[0]..range[1]];
            sums.iter().fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d])
        })
        .collect()
}

//! The table of tensors that a kernel takes: `kernels/optim_table.h`, in Rust.

use super::{Rounding, Tensor8, Tensor32};
use crate::Floats;
use halfbyte::DType;
use halfbyte::optim::{BLOCK, Coefficients, Hyper, Rule};

/// Blocks that a group of threads takes at a time.
pub(super) const CHUNK: usize = 32;
/// Blocks whose squares are summed before they join those of the whole tensor.
pub(super) const TASK: usize = 256;
/// Tensors in a table of at most 4096 bytes.
pub(super) const SMALL: usize = 49;
/// Tensors in a table of at most 32764 bytes.
pub(super) const LARGE: usize = 408;

/// What all tensors of a launch share.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Header {
    pub(super) code1: u64,
    pub(super) code2: u64,
    /// Rates of the tensors, float32, or null.
    pub(super) rates: u64,
    /// Squared norms of each task.
    pub(super) sums: u64,
    /// The bits of a float64.
    pub(super) max_unorm: u64,
    /// The bits of a float64.
    pub(super) rate64: u64,
    pub(super) gnorm_scale: f32,
    pub(super) rate: f32,
    pub(super) shrink: f32,
    pub(super) rule: [f32; Coefficients::RULE],
    pub(super) skip_zeros: u32,
    pub(super) step: u32,
    pub(super) tensors: u32,
    /// Chunks or tasks in all.
    pub(super) units: u32,
    pub(super) unused: u32,
}

/// One tensor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    pub(super) param: u64,
    pub(super) grad: u64,
    pub(super) state1: u64,
    pub(super) state2: u64,
    /// With float32 states: where the update's norm goes, or null.
    pub(super) absmax1: u64,
    /// With float32 states: the bits of the parameter's norm.
    pub(super) absmax2: u64,
    /// Kahan's compensation, or the seed.
    pub(super) rest: u64,
    pub(super) n: u64,
    /// Chunks or tasks of the tensors before.
    pub(super) first: u32,
    pub(super) flags: u32,
    pub(super) stream: u32,
    pub(super) unused: u32,
}

/// What a kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<const N: usize> {
    pub(super) header: Header,
    pub(super) tensors: [Entry; N],
}

const _: () = assert!(size_of::<Header>() == 120 && size_of::<Entry>() == 80);
const _: () = assert!(size_of::<Table<SMALL>>() == 4040 && size_of::<Table<LARGE>>() == 32_760);

/// Bits of [`Entry::flags`].
mod flag {
    pub(super) const GRAD_DTYPE: u32 = 2;
    pub(super) const STOCHASTIC: u32 = 1 << 4;
    pub(super) const KAHAN: u32 = 2 << 4;
    pub(super) const ALIGNED: u32 = 1 << 6;
    pub(super) const NORM_GIVEN: u32 = 1 << 7;
}

impl Header {
    pub(super) fn new(rule: Rule, hyper: &Hyper) -> Self {
        let Coefficients { gnorm_scale, rate, shrink, rule } = Coefficients::new(rule, hyper);
        Self {
            max_unorm: hyper.max_unorm.to_bits(),
            rate64: rate.to_bits(),
            gnorm_scale,
            rate: rate as f32,
            shrink,
            rule,
            skip_zeros: hyper.skip_zeros.into(),
            step: hyper.step as u32,
            ..Self::default()
        }
    }

    /// With the addresses of the tensors' rates and of their tasks' sums.
    pub(super) fn with_norms(self, rates: u64, sums: u64) -> Self {
        Self { rates, sums, ..self }
    }
}

impl<const N: usize> Table<N> {
    /// The bytes that hold the first `count` tensors.
    pub(super) fn bytes(&self, count: usize) -> &[u8] {
        let len = size_of::<Header>() + count.min(N) * size_of::<Entry>();
        // SAFETY: the struct is `repr(C)` of integers and floats without padding (see the sizes
        // above), and `len` is at most its size.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), len) }
    }
}

fn dtype_number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
    }
}

/// Whether four elements at this address can be loaded at once.
fn is_aligned(pointer: u64, size: usize) -> bool {
    pointer.is_multiple_of(4 * size as u64)
}

impl Entry {
    /// What both widths have.
    fn new(param: Floats, grad: Floats, rounding: Rounding) -> Self {
        let dtypes = dtype_number(param.dtype()) | dtype_number(grad.dtype()) << flag::GRAD_DTYPE;
        let (rounded, rest, stream) = match rounding {
            _ if param.dtype() != DType::BF16 => (0, 0, 0),
            Rounding::Nearest => (0, 0, 0),
            Rounding::Stochastic { seed, stream } => (flag::STOCHASTIC, seed, stream as u32),
            Rounding::Kahan(rest) => (flag::KAHAN, rest.pointer(), 0),
        };
        Self {
            param: param.pointer(),
            grad: grad.pointer(),
            rest,
            n: param.len() as u64,
            flags: dtypes | rounded,
            stream,
            ..Self::default()
        }
    }

    /// Sets the flag when all of a tensor's memory is aligned: its own and that of its states,
    /// whose elements have `size` bytes. The second of two first states follows the first.
    fn align(mut self, rule: Rule, param: Floats, grad: Floats, states: &[(u64, usize)]) -> Self {
        let kahan = self.flags & flag::KAHAN != 0;
        let aligned = is_aligned(self.param, param.dtype().size())
            && is_aligned(self.grad, grad.dtype().size())
            && (!kahan || is_aligned(self.rest, 2))
            && states.iter().all(|&(pointer, size)| is_aligned(pointer, size))
            && (rule.first_states() == 1 || self.n.is_multiple_of(4));
        self.flags |= if aligned { flag::ALIGNED } else { 0 };
        self
    }

    pub(super) fn of_8bit(rule: Rule, t: &Tensor8) -> Self {
        // An unused state is null, which is aligned.
        let (state1, size) =
            if rule.has_float_state() { (t.floats.pointer(), 4) } else { (t.state1.pointer(), 1) };
        let state2 = if rule.has_second_state() { t.state2.pointer() } else { 0 };
        let entry = Self {
            state1,
            state2,
            absmax1: t.absmax1.pointer(),
            absmax2: t.absmax2.pointer(),
            ..Self::new(t.param, t.grad, t.rounding)
        };
        entry.align(rule, t.param, t.grad, &[(state1, size), (state2, 1)])
    }

    pub(super) fn of_32bit(rule: Rule, t: &Tensor32) -> Self {
        let state2 = if rule.has_second_state() { t.state2.pointer() } else { 0 };
        let mut entry = Self {
            state1: t.state1.pointer(),
            state2,
            absmax1: t.update_norm.map_or(0, |norm| norm.pointer()),
            absmax2: t.param_norm.unwrap_or_default().to_bits(),
            ..Self::new(t.param, t.grad, t.rounding)
        };
        entry.flags |= if t.param_norm.is_some() { flag::NORM_GIVEN } else { 0 };
        entry.align(rule, t.param, t.grad, &[(t.state1.pointer(), 4), (state2, 4)])
    }

    /// Chunks (or tasks) of `blocks` blocks.
    pub(super) fn units(&self, blocks: usize) -> usize {
        BLOCK.over(self.n as usize).count().div_ceil(blocks)
    }
}

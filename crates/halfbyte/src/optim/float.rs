//! Blocks of 256 elements as float32: parameters and gradients of any type, the last block short.
//!
//! A whole block of float32 is worked on where it lies; anything else goes through a buffer in the
//! L1 cache, filled up with zeros.

use super::vector::Vector;
use crate::{DType, Element, bf16, f16};
use std::ffi::c_void;

/// Elements of a block.
pub(super) const LEN: usize = super::BLOCK.get();

/// A block in float32, on cache lines of its own.
#[repr(C, align(64))]
pub(super) struct Buffer(pub(super) [f32; LEN]);

/// Calls `$body` with `$T` as the type that `$dtype` names.
macro_rules! with_type {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::F16 => {
                type $T = f16;
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                $body
            }
        }
    };
}

/// The `n` elements from `start` on, in float32: where they are, or in `buffer`.
///
/// # Safety
/// They are readable, and the CPU has the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn read<V: Vector>(
    (dtype, data): (DType, *const c_void),
    start: usize,
    n: usize,
    buffer: &mut Buffer,
) -> *const f32 {
    // SAFETY: by the caller's contract.
    unsafe {
        if dtype == DType::F32 && n == LEN {
            return data.cast::<f32>().add(start);
        }
        with_type!(dtype, T => widen::<V, T>(data.cast::<T>().add(start), n, buffer));
    }
    buffer.0.as_ptr()
}

/// # Safety
/// As [`read`].
#[inline(always)]
unsafe fn widen<V: Vector, T: Element>(from: *const T, n: usize, buffer: &mut Buffer) {
    // SAFETY: n <= LEN elements are readable; the buffer holds LEN.
    unsafe {
        if n == LEN {
            for i in (0..LEN).step_by(V::LANES) {
                V::load(from.add(i)).store(buffer.0.as_mut_ptr().add(i));
            }
        } else {
            let (filled, rest) = buffer.0.split_at_mut(n);
            for (i, x) in filled.iter_mut().enumerate() {
                *x = from.add(i).read().to_f32();
            }
            rest.fill(0.0);
        }
    }
}

/// Puts `n` elements back from `start` on, rounded to nearest even. Nothing to do for those that
/// [`read`] left where they are.
///
/// # Safety
/// They are writable, and the CPU has the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn write<V: Vector>(
    (dtype, data): (DType, *mut c_void),
    start: usize,
    n: usize,
    buffer: &Buffer,
) {
    // SAFETY: by the caller's contract.
    unsafe {
        if dtype == DType::F32 && n == LEN {
            return;
        }
        with_type!(dtype, T => narrow::<V, T>(buffer, data.cast::<T>().add(start), n));
    }
}

/// # Safety
/// As [`write`].
#[inline(always)]
unsafe fn narrow<V: Vector, T: Element>(buffer: &Buffer, to: *mut T, n: usize) {
    // SAFETY: n <= LEN elements are writable; the buffer holds LEN.
    unsafe {
        if n == LEN {
            for i in (0..LEN).step_by(V::LANES) {
                V::load(buffer.0.as_ptr().add(i)).store(to.add(i));
            }
        } else {
            for (i, x) in buffer.0[..n].iter().enumerate() {
                to.add(i).write(T::from_f32(*x));
            }
        }
    }
}

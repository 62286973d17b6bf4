//! Asking for memory before it is read.

use std::ops::Range;

const CACHE_LINE: usize = 64;

/// Cache lines to ask for while something else is computed. What is read next comes in pieces too
/// short for the processor to foresee, and asking for many lines at once would stall it: so a
/// kernel asks for a few at every step.
pub(super) struct Ahead {
    lines: [*const i8; 256],
    len: usize,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { lines: [std::ptr::null(); 256], len: 0 }
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    pub(super) fn lines(&self) -> &[*const i8] {
        &self.lines[..self.len]
    }

    /// Adds a part of a slice, less what lies outside it.
    #[inline]
    pub(super) fn push<T>(&mut self, slice: &[T], part: Range<usize>) {
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

    /// The lines to ask for at each of `steps` points.
    #[inline]
    pub(super) fn steps(&self, steps: usize) -> impl Iterator<Item = &[*const i8]> {
        let each = self.len.div_ceil(steps).max(1);
        self.lines().chunks(each).chain(std::iter::repeat(&[][..]))
    }
}

/// Starts bringing cache lines near.
#[inline]
pub(super) fn prefetch(lines: &[*const i8]) {
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

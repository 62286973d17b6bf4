//! Products with many rows: a 4-bit weight in the blocked product of [`gemm`].

#[cfg(test)]
mod tests;

use super::{Weight4, scalar};
use crate::Element;
use crate::blocks::BlockSize;
use crate::isa::Isa;
use crate::ops::Scales;
use crate::ops::ahead::Ahead;
use crate::ops::gemm::{self, All, Line, MAX_RUN, Micro, Part, Run, Weight};
use crate::threads::Shared;
use std::ops::Range;

/// Scales under a run of codes at most (a run starts anywhere in a block).
const MAX_SCALES: usize = MAX_RUN / BlockSize::ALL[0].get() + 1;

impl Weight for Weight4<'_> {
    fn out_features(&self) -> usize {
        self.out_features
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn decode_row(&self, o: usize, row: &mut [f32]) {
        scalar::decode_row(self, o, row);
    }

    fn fetch(&self, o: usize, columns: Range<usize>, ahead: &mut Ahead) {
        let first = o * self.in_features + columns.start;
        let last = first + columns.len() - 1;
        let shift = self.blocks.blocksize().get().trailing_zeros();
        ahead.push(self.packed, first / 2..last / 2 + 1);
        let scales = self.first_scale + (first >> shift)..self.first_scale + (last >> shift) + 1;
        match &self.scales {
            Scales::Plain(absmax) => ahead.push(absmax, scales),
            Scales::Nested(nested) => ahead.push(nested.absmax, scales),
        }
    }

    fn decode<M: Micro>(&self, o: usize, columns: Range<usize>, out: &mut [Line], stride: usize) {
        let first = o * self.in_features + columns.start;
        let shift = self.blocks.blocksize().get().trailing_zeros();
        let last = first + columns.len() - 1;
        let which = self.first_scale + (first >> shift)..self.first_scale + (last >> shift) + 1;
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
        unsafe { M::decode4(&run, out, stride) }
    }
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
    let part = Part { weight: *weight, rows: All(rows), bias };
    gemm::forward(isa, input, &[part], &Shared::new(out), gemm::spread);
}

/// `out = grad_output · weight`.
pub(super) fn grad_input<T: Element>(
    isa: Isa,
    grad_output: &[T],
    rows: usize,
    weight: &Weight4<'_>,
    out: &mut [T],
) {
    let part = Part { weight: *weight, rows: All(rows), bias: None };
    gemm::grad_input(isa, grad_output, &[part], out);
}

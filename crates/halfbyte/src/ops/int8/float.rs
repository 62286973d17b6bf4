//! An 8-bit weight in the float32 product.

use super::{INV_127, Weight8, decode};
use crate::ops::ahead::Ahead;
use crate::ops::gemm::{Line, Micro, Weight};
use std::ops::Range;

impl Weight for Weight8<'_> {
    fn out_features(&self) -> usize {
        self.out_features
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn decode_row(&self, o: usize, row: &mut [f32]) {
        let codes = &self.codes[o * self.in_features..];
        row.iter_mut().zip(codes).for_each(|(w, code)| *w = decode(*code, self.scales[o]));
    }

    fn decode<M: Micro>(&self, o: usize, columns: Range<usize>, out: &mut [Line], stride: usize) {
        let codes = &self.codes[o * self.in_features..][columns];
        // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
        unsafe { M::decode8(codes, [self.scales[o], INV_127], out, stride) }
    }

    fn fetch(&self, o: usize, columns: Range<usize>, ahead: &mut Ahead) {
        let row = o * self.in_features;
        ahead.push(self.codes, row + columns.start..row + columns.end);
        ahead.push(self.scales, o..o + 1);
    }
}

//! The two products.

use super::{Ahead, LANES, Line, Micro, Part, Product, Rows, Side, Weight, prefetch, share};
use crate::Element;
use crate::threads::Shared;
use std::marker::PhantomData;
use std::ops::Range;

/// `input · weight^T + bias`.
pub(super) struct Forward<'a, T, M, W, R> {
    pub(super) input: &'a [T],
    pub(super) part: Part<'a, T, W, R>,
    pub(super) out: &'a Shared<'a, T>,
    pub(super) micro: PhantomData<fn() -> M>,
}

impl<T: Element, M: Micro, W: Weight, R: Rows> Product for Forward<'_, T, M, W, R> {
    type M = M;
    const ROWS: Side = Side::Lanes;

    fn rows(&self) -> usize {
        self.part.rows.len()
    }
    fn features(&self) -> usize {
        self.part.weight.out_features()
    }
    fn depth(&self) -> usize {
        self.part.weight.in_features()
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
        let k = self.part.weight.in_features();
        // `spare[g][m]` is row `m` of 16, columns `16 * g ..`.
        let spare = &mut spare[..groups * LANES];
        for (line, first) in lanes.clone().step_by(LANES).enumerate() {
            let rows = (lanes.end - first).min(LANES);
            for m in 0..rows {
                let row = &self.input[self.part.rows.input(first + m) * k..][t.clone()];
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
        let k = self.part.weight.in_features();
        for m in share(lanes, steps, n) {
            let row = self.part.rows.input(m) * k;
            ahead.push(self.input, row + t.start..row + t.end);
        }
    }

    fn fill_row(&self, b: usize, t: Range<usize>, panel: &mut [Line], stride: usize) {
        self.part.weight.decode::<M>(b, t, panel, stride);
    }

    fn fetch_row(&self, b: usize, t: Range<usize>, ahead: &mut Ahead) {
        self.part.weight.fetch(b, t, ahead);
    }

    fn finish<'a>(
        &self,
        lanes: Range<usize>,
        broadcast: Range<usize>,
        line: impl Fn(usize, usize) -> &'a Line,
    ) {
        let n = self.part.weight.out_features();
        let mut square = [Line::ZERO; LANES];
        for (i, first) in lanes.clone().step_by(LANES).enumerate() {
            for o in broadcast.clone().step_by(LANES) {
                let columns = o..(o + LANES).min(broadcast.end);
                let mut bias = Line::ZERO;
                if let Some(all) = self.part.bias {
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
                    let out = self.part.rows.output(m) * n;
                    // SAFETY: tasks have disjoint lanes (rows) or disjoint columns.
                    let out = unsafe { self.out.part(out + columns.start..out + columns.end) };
                    // SAFETY: as for `transpose`.
                    unsafe { M::narrow(row, out) };
                }
            }
        }
    }
}

/// `grad_output · weight`.
pub(super) struct GradInput<'a, T, M, W, R, O> {
    pub(super) grad_output: &'a [T],
    pub(super) weight: W,
    pub(super) rows: R,
    pub(super) out: O,
    pub(super) micro: PhantomData<fn(T) -> M>,
}

/// Where the gradient's sums go.
pub(super) trait Output: Sync {
    /// Takes the sums of columns `columns` (16 or fewer) of a row of the result.
    fn write<M: Micro>(&self, row: usize, columns: Range<usize>, sums: &Line);
}

/// They are rounded.
pub(super) struct Rounded<'a, T> {
    pub(super) out: &'a Shared<'a, T>,
    pub(super) columns: usize,
}

impl<T: Element> Output for Rounded<'_, T> {
    fn write<M: Micro>(&self, row: usize, columns: Range<usize>, sums: &Line) {
        let row = row * self.columns;
        // SAFETY: tasks have disjoint rows or disjoint lanes (columns).
        let out = unsafe { self.out.part(row + columns.start..row + columns.end) };
        // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
        unsafe { M::narrow(sums, out) };
    }
}

/// They are added to those of the other rows of the same token.
pub(super) struct Added<'a> {
    /// For each token from `tokens.start` on, the lines of `lanes`.
    pub(super) sums: Shared<'a, Line>,
    pub(super) tokens: Range<usize>,
    pub(super) lanes: Range<usize>,
    /// Rows of a token.
    pub(super) sharing: usize,
}

impl Output for Added<'_> {
    fn write<M: Micro>(&self, row: usize, columns: Range<usize>, sums: &Line) {
        let token = row / self.sharing - self.tokens.start;
        let line = (columns.start - self.lanes.start) / LANES;
        let at = token * self.lanes.len().div_ceil(LANES) + line;
        // SAFETY: the sums are those of the one task that uses them.
        let old = &mut unsafe { self.sums.part(at..at + 1) }[0];
        for (old, new) in old.0.iter_mut().zip(&sums.0) {
            *old += new;
        }
    }
}

impl<T: Element, M: Micro, W: Weight, R: Rows, O: Output> Product for GradInput<'_, T, M, W, R, O> {
    type M = M;
    const ROWS: Side = Side::Broadcast;

    fn rows(&self) -> usize {
        self.rows.len()
    }
    fn features(&self) -> usize {
        self.weight.in_features()
    }
    fn depth(&self) -> usize {
        self.weight.out_features()
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
            near.clear();
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
        let n = self.weight.out_features();
        let row = self.rows.input(b) * n;
        ahead.push(self.grad_output, row + t.start..row + t.end);
    }

    fn fill_row(&self, b: usize, t: Range<usize>, panel: &mut [Line], stride: usize) {
        let row = &self.grad_output[self.rows.input(b) * self.weight.out_features()..][t];
        // SAFETY: `M` is of the instruction set that `isa` detected on this machine.
        unsafe { M::widen(row, panel, stride) }
    }

    fn finish<'a>(
        &self,
        lanes: Range<usize>,
        broadcast: Range<usize>,
        line: impl Fn(usize, usize) -> &'a Line,
    ) {
        for m in broadcast {
            let row = self.rows.output(m);
            for (i, first) in lanes.clone().step_by(LANES).enumerate() {
                let columns = first..(first + LANES).min(lanes.end);
                self.out.write::<M>(row, columns, line(i, m));
            }
        }
    }
}

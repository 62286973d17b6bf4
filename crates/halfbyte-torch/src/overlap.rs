//! Whether tensors share memory: in time near linear in their number, exactly.

use crate::error::{Error, Result};
use crate::tensor::{Name, Tensor};

/// What a tensor is called, and where it lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) name: Name,
    pub(crate) tensor: &'a Tensor,
    /// Address of the first element.
    pub(crate) start: usize,
    /// Bytes from there to the end of the last element; 0 for an empty tensor.
    pub(crate) reach: usize,
    /// Bytes of an element.
    pub(crate) item: usize,
    /// Whether the elements fill all of it.
    pub(crate) dense: bool,
}

impl Place<'_> {
    /// Whether some byte belongs to both.
    fn overlaps(&self, other: &Self) -> Result<bool> {
        if self.start >= other.start + other.reach || other.start >= self.start + self.reach {
            return Ok(false);
        }
        if self.dense && other.dense {
            return Ok(true);
        }
        // A byte of a tensor lies at start + the sum of x * stride over its dimensions, x from 0 to
        // size - 1, the bytes of an element being one more dimension. Two tensors share a byte when
        // one sum less the other one is the distance of their starts. With x' = size - 1 - x in
        // the sum that is taken away, all terms are positive.
        let mut terms = Terms::default();
        let mut target = other.start as i64 - self.start as i64;
        for (place, taken_away) in [(self, false), (other, true)] {
            let item = place.item as i64;
            let bytes = (1, item - 1);
            let (sizes, strides) = (place.tensor.sizes()?, place.tensor.strides()?);
            let dimensions = sizes.iter().zip(strides).map(|(&n, &stride)| (stride * item, n - 1));
            for (stride, most) in dimensions.chain([bytes]) {
                terms.add(stride, most);
                if taken_away {
                    target += stride * most;
                }
            }
        }
        Ok(terms.reach(target))
    }
}

/// Sums of `x * stride` with `0 <= x <= most`.
#[derive(Default)]
struct Terms(Vec<(i64, i64)>);

impl Terms {
    /// How many candidates are tried. Views of a matrix need two a dimension.
    const PATIENCE: u32 = 100_000;

    fn add(&mut self, stride: i64, most: i64) {
        if stride == 0 || most == 0 {
            return;
        }
        match self.0.iter_mut().find(|term| term.0 == stride) {
            Some(term) => term.1 += most,
            None => self.0.push((stride, most)),
        }
    }

    /// Whether a sum equals `target`; when that cannot be found out soon, true.
    fn reach(mut self, target: i64) -> bool {
        self.0.sort_unstable_by_key(|&(stride, _)| std::cmp::Reverse(stride));
        search(&self.0, target, &mut Self::PATIENCE.clone())
    }
}

fn search(terms: &[(i64, i64)], target: i64, patience: &mut u32) -> bool {
    let Some((&(stride, most), smaller)) = terms.split_first() else {
        return target == 0;
    };
    let rest: i64 = smaller.iter().map(|&(stride, most)| stride * most).sum();
    let least = ((target - rest).max(0) + stride - 1) / stride;
    for x in least..=most.min(target.div_euclid(stride)) {
        let Some(left) = patience.checked_sub(1) else { return true };
        *patience = left;
        if search(smaller, target - x * stride, patience) {
            return true;
        }
    }
    false
}

/// Tensors of which some are written.
#[derive(Default)]
pub(crate) struct Places<'a>(Vec<(Place<'a>, bool)>);

impl<'a> Places<'a> {
    pub(crate) fn with_capacity(tensors: usize) -> Self {
        Self(Vec::with_capacity(tensors))
    }

    pub(crate) fn read(&mut self, place: Place<'a>) {
        self.add(place, false);
    }

    pub(crate) fn written(&mut self, place: Place<'a>) {
        self.add(place, true);
    }

    fn add(&mut self, place: Place<'a>, written: bool) {
        if place.reach > 0 {
            self.0.push((place, written));
        }
    }

    /// Refuses tensors that share memory, unless both are only read.
    pub(crate) fn check(&self) -> Result<()> {
        let mut order: Vec<_> = self.0.iter().map(|tensor| (tensor.0.start, tensor)).collect();
        order.sort_unstable_by_key(|&(start, _)| start);
        // Those that reach beyond the start of the next one: usually none.
        let mut open: Vec<&(Place<'_>, bool)> = Vec::new();
        for (start, next) in order {
            open.retain(|(before, _)| before.start + before.reach > start);
            for before in &open {
                // The one that is written is named first.
                let (first, second) = if next.1 { (next, *before) } else { (*before, next) };
                if first.1 && first.0.overlaps(&second.0)? {
                    let (first, second) = (first.0.name, second.0.name);
                    return Err(Error::Value(format!("{first} must not overlap {second}")));
                }
            }
            open.push(next);
        }
        Ok(())
    }
}

//! The definition.

use crate::Element;
use crate::blocks::BlockSize;
use crate::code::Code8;
use crate::code::encode8::nearest;
use crate::ops::normalize::{self, Normalizer};

pub(super) fn quantize<T: Element>(
    input: &[T],
    code: &Code8,
    blocksize: BlockSize,
    out: &mut [u8],
    absmax: &mut [f32],
) {
    let b = blocksize.get();
    for ((x, q), scale) in input.chunks(b).zip(out.chunks_mut(b)).zip(absmax) {
        *scale = normalize::absmax(x);
        block(x, code, *scale, q);
    }
}

/// One block, its `absmax` known.
pub(super) fn block<T: Element>(x: &[T], code: &Code8, absmax: f32, out: &mut [u8]) {
    let normalizer = Normalizer::new(absmax);
    for (x, q) in x.iter().zip(out) {
        *q = nearest(code, normalizer.apply(x.to_f32()).clamp(-1.0, 1.0));
    }
}

//! The definition.

use crate::Element;
use crate::blocks::BlockSize;
use crate::code::{Code4, FP4_ASCENDING, FP4_MIDPOINTS, FP4_SIGN, NF4_MIDPOINTS};
use crate::ops::normalize::{self, Normalizer};

pub(super) fn quantize<T: Element>(
    input: &[T],
    code: Code4,
    blocksize: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let b = blocksize.get();
    for ((x, bytes), scale) in input.chunks(b).zip(packed.chunks_mut(b / 2)).zip(absmax) {
        *scale = normalize::absmax(x);
        block(x, code, *scale, bytes);
    }
}

/// One block, its `absmax` known.
pub(super) fn block<T: Element>(x: &[T], code: Code4, absmax: f32, packed: &mut [u8]) {
    let normalizer = Normalizer::new(absmax);
    let encode = |x: T| nearest(code, normalizer.apply(x.to_f32()));
    for (pair, byte) in x.chunks(2).zip(packed) {
        let high = encode(pair[0]);
        let low = pair.get(1).map_or(code.zero(), |&x| encode(x));
        *byte = high << 4 | low;
    }
}

/// The nearest code, as the number of borders strictly below (none is below NaN). Values outside
/// [-1, 1] get the outermost codes, which is what clamping them first would do.
fn nearest(code: Code4, y: f32) -> u8 {
    match code {
        Code4::Nf4 => NF4_MIDPOINTS.iter().filter(|&&m| y > m).count() as u8,
        Code4::Fp4 => {
            let rank = FP4_MIDPOINTS.iter().filter(|&&m| y.abs() > m).count();
            let sign = if y < 0.0 { FP4_SIGN } else { 0 };
            sign | FP4_ASCENDING[rank]
        }
    }
}

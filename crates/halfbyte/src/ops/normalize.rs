//! Scaling a block to [-1, 1]: the rule shared by the 4-bit and 8-bit encoders.

use crate::Element;

/// The largest magnitude of a block, in float32.
///
/// Taken as an integer maximum over the bits without their sign, which orders finite values by
/// magnitude and puts infinity and then NaN above them: the result does not depend on the order
/// of the elements, and a block that holds NaN has a NaN `absmax`.
pub(crate) fn absmax<T: Element>(block: &[T]) -> f32 {
    let bits = block.iter().map(|x| x.to_f32().to_bits() & 0x7FFF_FFFF).max().unwrap_or(0);
    f32::from_bits(bits)
}

/// `y = x * (1 / absmax)`, with the two cases in which that product is not what is meant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Normalizer {
    lift: f32,
    reciprocal: f32,
}

impl Normalizer {
    /// Blocks whose `absmax` is below this have no float32 reciprocal: 1 / absmax would overflow.
    /// Vector kernels hand such blocks to the scalar code.
    pub(crate) const SMALLEST_DIRECT: f32 = 2.938_736e-39; // 2^-128

    pub(crate) fn new(absmax: f32) -> Self {
        if absmax == 0.0 {
            // A zero block: every y is 0.
            Self { lift: 1.0, reciprocal: 0.0 }
        } else if absmax <= Self::SMALLEST_DIRECT {
            // Both x and absmax are lifted by 2^64, exactly; their ratio stays the same.
            let lift = f32::from_bits((127 + 64) << 23);
            Self { lift, reciprocal: 1.0 / (absmax * lift) }
        } else {
            Self { lift: 1.0, reciprocal: 1.0 / absmax }
        }
    }

    /// Not yet clamped: rounding can leave |y| one ulp above 1, which encodes as 1 all the same.
    #[inline]
    pub(crate) fn apply(self, x: f32) -> f32 {
        (x * self.lift) * self.reciprocal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absmax_orders_nan_above_infinity_above_numbers() {
        assert_eq!(absmax(&[1.0f32, -3.0, 2.0]), 3.0);
        assert_eq!(absmax::<f32>(&[]), 0.0);
        assert_eq!(absmax(&[1.0, f32::NEG_INFINITY]), f32::INFINITY);
        assert!(absmax(&[f32::INFINITY, f32::NAN, 1.0]).is_nan());
    }

    #[test]
    fn subnormal_blocks_keep_their_ratios() {
        for absmax in [f32::from_bits(1), f32::from_bits(1000), Normalizer::SMALLEST_DIRECT] {
            let n = Normalizer::new(absmax);
            assert_eq!(n.apply(absmax), 1.0, "{absmax:e}");
            assert_eq!(n.apply(0.0), 0.0);
        }
        let above = f32::from_bits(Normalizer::SMALLEST_DIRECT.to_bits() + 1);
        assert!((1.0 / above).is_finite() && (1.0 / Normalizer::SMALLEST_DIRECT).is_infinite());
    }
}

//! Double quantization: the scales of a 4-bit tensor, quantized to 8 bits themselves.

use crate::blocks::BlockSize;
use crate::code::Code8;
use crate::error::{Result, check_len};
use crate::isa;
use crate::ops::quantize_blockwise::kernel;
use crate::threads::{self, Chunks, Shared};
use std::sync::{Mutex, PoisonError};

/// Scales per task.
const TASK: usize = 32 * 1024;

/// Quantizes `absmax - offset` with the signed dynamic code in blocks of `blocksize`, and returns
/// `offset`, the correctly rounded mean of `absmax` (independent of thread count and order).
///
/// - `codes`: one index per scale.
/// - `absmax2`: `ceil(absmax.len() / blocksize)` float32 scales.
///
/// Scales that are infinite or NaN come from weights that are; whoever refuses those has done so
/// before. Here they give the infinite or NaN mean that IEEE 754 addition gives, in any order.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length,
/// [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn quantize_absmax(
    absmax: &[f32],
    blocksize: BlockSize,
    codes: &mut [u8],
    absmax2: &mut [f32],
) -> Result<f32> {
    let blocks = blocksize.over(absmax.len());
    check_len("codes", absmax.len(), codes.len(), "bytes")?;
    check_len("absmax2", blocks.count(), absmax2.len(), "float32 scales")?;
    let kernel = kernel::<f32>(isa::selected()?);
    let code = Code8::dynamic(true);
    let offset = mean(absmax);

    let b = blocksize.get();
    let chunks = Chunks::new(absmax.len(), TASK, b);
    let (codes, absmax2) = (Shared::new(codes), Shared::new(absmax2));
    threads::run(chunks.count(), |i| {
        let r = chunks.range(i);
        // SAFETY: chunks are disjoint and start at block borders.
        let (codes, absmax2) =
            unsafe { (codes.part(r.clone()), absmax2.part(r.start / b..r.end.div_ceil(b))) };
        let mut centred = [0.0f32; BlockSize::B4096.get()];
        for ((x, q), scale) in absmax[r].chunks(b).zip(codes.chunks_mut(b)).zip(absmax2) {
            let centred = &mut centred[..x.len()];
            for (c, x) in centred.iter_mut().zip(x) {
                *c = x - offset;
            }
            // SAFETY: the kernel is that of an ISA detected on this machine; one block each.
            unsafe { kernel(centred, code, blocksize, q, std::slice::from_mut(scale)) };
        }
    });
    Ok(offset)
}

/// The mean of float32 values, exact but for one rounding at the end; 0 for none.
fn mean(values: &[f32]) -> f32 {
    let total = Mutex::new(Sum::default());
    let chunks = Chunks::new(values.len(), TASK, 1);
    threads::run(chunks.count(), |i| {
        let mut sum = Sum::default();
        sum.add(&values[chunks.range(i)]);
        total.lock().unwrap_or_else(PoisonError::into_inner).merge(&sum);
    });
    let total = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    total.mean(values.len() as u64)
}

/// An exact sum of float32 values: for each exponent, the sum of the signed mantissas.
struct Sum {
    /// In units of 2^-149 times 2^index. A mantissa has 24 bits: 2^39 of them do not overflow.
    mantissas: [i64; 254],
    positive_infinity: bool,
    negative_infinity: bool,
    nan: bool,
}

impl Default for Sum {
    fn default() -> Self {
        let mantissas = [0; 254];
        Self { mantissas, positive_infinity: false, negative_infinity: false, nan: false }
    }
}

impl Sum {
    /// Adds up to `TASK` values.
    fn add(&mut self, values: &[f32]) {
        // A bin for each sign and exponent. Its low half sums the mantissas' stored bits and its
        // high half counts the values: one addition for both.
        const COUNT: u32 = 40;
        const { assert!(TASK << 23 <= 1 << COUNT && TASK < 1 << (64 - COUNT)) };
        // Neighbours often fall into one bin. In sets of four an addition need not wait for the
        // one just before.
        let mut bins = [[0u64; 512]; 4];
        for values in values.chunks(4) {
            for (set, value) in bins.iter_mut().zip(values) {
                let bits = value.to_bits();
                set[(bits >> 23) as usize] += u64::from(bits & 0x007F_FFFF) | 1 << COUNT;
            }
        }
        for set in &bins {
            for (bin, &sum) in set.iter().enumerate().filter(|(_, sum)| **sum != 0) {
                let (negative, exponent) = (bin >= 256, bin % 256);
                let (stored, count) = (sum as i64 & ((1 << COUNT) - 1), (sum >> COUNT) as i64);
                if exponent == 255 {
                    // With a mantissa of zero, infinity.
                    self.nan |= stored != 0;
                    *if negative {
                        &mut self.negative_infinity
                    } else {
                        &mut self.positive_infinity
                    } = true;
                    continue;
                }
                let leading_ones = if exponent == 0 { 0 } else { count << 23 };
                let mantissas = stored + leading_ones;
                let bin = &mut self.mantissas[exponent.max(1) - 1];
                *bin += if negative { -mantissas } else { mantissas };
            }
        }
    }

    fn merge(&mut self, other: &Self) {
        for (sum, other) in self.mantissas.iter_mut().zip(&other.mantissas) {
            *sum += other;
        }
        self.positive_infinity |= other.positive_infinity;
        self.negative_infinity |= other.negative_infinity;
        self.nan |= other.nan;
    }

    /// The sum divided by `count`, rounded to nearest even.
    fn mean(&self, count: u64) -> f32 {
        match (self.nan, self.positive_infinity, self.negative_infinity) {
            (false, false, false) => {}
            (false, true, false) => return f32::INFINITY,
            (false, false, true) => return f32::NEG_INFINITY,
            _ => return f32::NAN,
        }
        if count == 0 {
            return 0.0;
        }
        // The sum in digits of 32 bits, the least first: 24 + 253 + 39 bits and a sign.
        let mut digits = [0i128; 11];
        for (shift, &mantissas) in self.mantissas.iter().enumerate() {
            digits[shift / 32] += i128::from(mantissas) << (shift % 32);
        }
        let mut carry = 0;
        for digit in &mut digits {
            carry += *digit;
            *digit = carry & 0xFFFF_FFFF;
            carry >>= 32;
        }
        if carry < 0 {
            let mantissas = self.mantissas.map(|m| -m);
            return -Self { mantissas, ..Self::default() }.mean(count);
        }
        // Divided by the count, in place, from the top.
        let count = i128::from(count);
        let mut remainder = 0;
        for digit in digits.iter_mut().rev() {
            let dividend = remainder << 32 | *digit;
            (*digit, remainder) = (dividend / count, dividend % count);
        }
        // The 24 bits from the highest on, or from the unit on.
        let top = digits.iter().rposition(|&d| d != 0).unwrap_or(0);
        let bit_length = 32 * top as u32 + (128 - digits[top].leading_zeros());
        let shift = bit_length.saturating_sub(24);
        let (first, offset) = ((shift / 32) as usize, shift % 32);
        let above = digits.get(first + 1).map_or(0, |d| d << 32);
        let mantissa = (above | digits[first]) >> offset & 0x00FF_FFFF;
        // The leading one of the mantissa adds 1 to the exponent field; that of a subnormal is 0.
        let mut bits = (shift << 23) + mantissa as u32;
        // What was cut off, against one half.
        let (cut_off, half) = if shift == 0 {
            (2 * remainder, count)
        } else {
            let (place, below) = ((shift - 1) / 32, (shift - 1) % 32);
            let place = place as usize;
            let lower = remainder != 0 || digits[..place].iter().any(|&d| d != 0);
            let part = digits[place] & ((2 << below) - 1);
            (2 * part + i128::from(lower), 2 << below)
        };
        if cut_off > half || (cut_off == half && bits % 2 == 1) {
            bits += 1;
        }
        f32::from_bits(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{NonFinite, quantize_blockwise};
    use num_bigint::BigInt;
    use proptest::prelude::*;

    /// In units of 2^-149.
    fn exact(x: f32) -> BigInt {
        let bits = x.to_bits();
        let (exponent, stored) = (bits >> 23 & 0xFF, bits & 0x7F_FFFF);
        let magnitude = match exponent {
            0 => BigInt::from(stored),
            _ => BigInt::from(stored | 1 << 23) << (exponent - 1),
        };
        if x.is_sign_negative() { -magnitude } else { magnitude }
    }

    /// `mean` is the float32 nearest to the exact mean: no neighbour is nearer, and of two equally
    /// near it is the even one. Compared multiplied by the count, so without division.
    fn check_mean(values: &[f32]) {
        let mean = mean(values);
        let sum: BigInt = values.iter().map(|&x| exact(x)).sum();
        let distance = |x: f32| {
            let difference = exact(x) * values.len() - &sum;
            if difference < BigInt::ZERO { -difference } else { difference }
        };
        for neighbour in [mean.next_up(), mean.next_down()] {
            if neighbour.is_finite() {
                let (ours, theirs) = (distance(mean), distance(neighbour));
                assert!(
                    ours < theirs || ours == theirs && mean.to_bits().is_multiple_of(2),
                    "{mean:e}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn mean_is_correctly_rounded(bits in prop::collection::vec(any::<u32>(), 1..50)) {
            let mut values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            values.retain(|x| x.is_finite());
            if !values.is_empty() {
                check_mean(&values);
            }
        }

        #[test]
        fn mean_of_close_values_is_correctly_rounded(
            base in 0u32..0x7F7F_0000,
            offsets in prop::collection::vec(0u32..0x1_0000, 1..300),
        ) {
            check_mean(&offsets.iter().map(|o| f32::from_bits(base + o)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn means_at_the_edges() {
        let tiny = f32::from_bits(1);
        for values in [
            &[0.0][..],
            &[-0.0, 0.0],
            &[tiny],
            &[tiny, 0.0],
            &[tiny, tiny, 0.0],
            &[f32::MIN_POSITIVE, 0.0],
            &[f32::MIN_POSITIVE, -tiny],
            &[1.0, 1.0f32.next_up()],
            &[1.0f32.next_up(), 1.0f32.next_up().next_up()],
            &[1.0, 1.0f32.next_up(), tiny],
            &[f32::MAX; 7],
            &[f32::MIN; 7],
            &[f32::MAX, f32::MIN, tiny],
            &[f32::MAX, f32::MIN, -tiny, -tiny],
            &[1e30, 1.0, -1e30],
        ] {
            check_mean(values);
        }
        assert_eq!(mean(&[]), 0.0);
        assert_eq!(mean(&[f32::MAX; 7]), f32::MAX);
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert_eq!(mean(&[1.0, inf]), inf);
        assert_eq!(mean(&[-inf, f32::MAX]), -inf);
        assert!(mean(&[-inf, 1.0, inf]).is_nan() && mean(&[1.0, nan]).is_nan());
        assert!(mean(&[1.0, f32::from_bits(0xFF80_0001)]).is_nan());
    }

    #[test]
    fn mean_does_not_depend_on_threads_or_order() {
        let mut values: Vec<f32> = (0..3 * TASK + 77).map(|i| (i as f32 * 0.37).sin()).collect();
        check_mean(&values);
        let expected = mean(&values);
        values.reverse();
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| mean(&values)), expected);
        }
    }

    #[test]
    fn equals_the_blockwise_quantization_of_the_centred_scales() {
        let lengths = [0, 1, 31, 255, 256, 257, TASK, 2 * TASK + 300];
        for (len, b) in lengths.into_iter().flat_map(|len| BlockSize::ALL.map(|b| (len, b))) {
            let absmax: Vec<f32> = (0..len).map(|i| 0.02 + 0.01 * (i as f32).sin()).collect();
            let count = b.over(len).count();
            let (mut codes, mut absmax2) = (vec![7; len], vec![-1.0; count]);
            let offset = quantize_absmax(&absmax, b, &mut codes, &mut absmax2).unwrap();
            assert_eq!(offset, mean(&absmax));
            let centred: Vec<f32> = absmax.iter().map(|a| a - offset).collect();
            let (mut q, mut scales) = (vec![0; len], vec![0.0; count]);
            let code = Code8::dynamic(true);
            quantize_blockwise(&centred, code, b, NonFinite::Refuse, &mut q, &mut scales).unwrap();
            assert!(codes == q && absmax2 == scales, "{len} {b:?}");
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        for (codes, absmax2) in [(9, 1), (11, 1), (10, 0), (10, 2)] {
            let (mut codes, mut absmax2) = (vec![0; codes], vec![0.0; absmax2]);
            assert!(
                quantize_absmax(&[1.0; 10], BlockSize::B256, &mut codes, &mut absmax2).is_err()
            );
        }
    }
}

//! Roundings to bfloat16 that keep small updates: stochastic and compensated.

use super::float::{Buffer, LEN};
use crate::bf16;

/// Philox4x32-10 (Salmon et al., SC 2011).
#[inline(always)]
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..10 {
        let a = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Where a tensor's random bits come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Random {
    pub(super) seed: u64,
    pub(super) step: u64,
    pub(super) stream: u64,
}

impl Random {
    /// 16 random bits for each of the 256 elements of a block.
    ///
    /// ```text
    /// counter = (group of 8 elements: 64 bits, step: 32, stream: 32), key = seed
    /// element 8 i + j: the j-th 16 bits of the four words, low halves first
    /// ```
    #[inline(always)]
    fn block(self, block: usize) -> [u16; LEN] {
        let mut bits = [0; LEN];
        let (groups, _) = bits.as_chunks_mut::<8>();
        for (i, out) in groups.iter_mut().enumerate() {
            let group = (block * (LEN / 8) + i) as u64;
            let counter =
                [group as u32, (group >> 32) as u32, self.step as u32, self.stream as u32];
            let words = philox(counter, [self.seed as u32, (self.seed >> 32) as u32]);
            for (j, word) in words.into_iter().enumerate() {
                out[2 * j] = word as u16;
                out[2 * j + 1] = (word >> 16) as u16;
            }
        }
        bits
    }

    /// Rounds up with the probability of the part cut off. A value that is a bfloat16 stays.
    #[inline(always)]
    pub(super) fn round(self, x: &Buffer, block: usize, out: &mut [bf16]) {
        let random = self.block(block);
        for ((x, random), out) in x.0.iter().zip(random).zip(out) {
            let bits = x.to_bits();
            // Infinity and NaN have all exponent bits set; a carry would change them.
            let finite = bits & 0x7F80_0000 != 0x7F80_0000;
            let rounded = (bits.wrapping_add(u32::from(random)) >> 16) as u16;
            *out = if finite { bf16::from_bits(rounded) } else { bf16::from_f32_const(*x) };
        }
    }
}

/// Adds what earlier roundings cut off.
#[inline(always)]
pub(super) fn add_compensation(x: &mut Buffer, rest: &[bf16]) {
    for (x, rest) in x.0.iter_mut().zip(rest) {
        *x += rest.to_f32_const();
    }
}

/// Rounds to nearest even and keeps what is cut off, itself a bfloat16.
#[inline(always)]
pub(super) fn round_compensated(x: &Buffer, out: &mut [bf16], rest: &mut [bf16]) {
    for ((x, out), rest) in x.0.iter().zip(out).zip(rest) {
        *out = bf16::from_f32_const(*x);
        let cut = *x - out.to_f32_const();
        *rest = bf16::from_f32_const(if cut.is_finite() { cut } else { 0.0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the authors' Random123 distribution.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]
        );
        assert_eq!(
            philox(
                [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344],
                [0xA409_3822, 0x299F_31D0]
            ),
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]
        );
    }

    #[test]
    fn stochastic_rounding_is_exact_in_expectation() {
        let (low, high) = (bf16::from_f32_const(1.0), bf16::from_f32_const(1.0 + 1.0 / 128.0));
        for share in [0.0, 0.001, 0.25, 0.5, 0.9] {
            let x = Buffer([1.0 + share / 128.0; LEN]);
            let mut ups = 0;
            for block in 0..400 {
                let mut out = [bf16::ZERO; LEN];
                Random { seed: 1, step: 2, stream: 3 }.round(&x, block, &mut out);
                assert!(out.iter().all(|&y| y == low || y == high));
                ups += out.iter().filter(|&&y| y == high).count();
            }
            let n = 400.0 * LEN as f32;
            let deviation = (share * (1.0 - share) / n).sqrt();
            assert!((ups as f32 / n - share).abs() <= 4.0 * deviation, "{share}: {ups} of {n}");
        }
    }

    #[test]
    fn bits_depend_on_seed_step_stream_and_element() {
        let base = Random { seed: 1, step: 1, stream: 0 };
        let others = [
            (Random { seed: 2, ..base }, 0),
            (Random { seed: 1 << 32 | 1, ..base }, 0),
            (Random { step: 2, ..base }, 0),
            (Random { stream: 1, ..base }, 0),
            (base, 1),
        ];
        for (other, block) in others {
            let (a, b) = (base.block(0), other.block(block));
            let same = a.iter().zip(&b).filter(|(a, b)| a == b).count();
            assert!(same < 4, "{other:?} {block}");
        }
    }

    #[test]
    fn infinity_and_nan_keep_their_kind() {
        let mut x = Buffer([f32::INFINITY; LEN]);
        (x.0[1], x.0[2]) = (f32::NEG_INFINITY, f32::from_bits(0x7FFF_FFFF));
        let mut out = [bf16::ZERO; LEN];
        Random { seed: 0, step: 0, stream: 0 }.round(&x, 0, &mut out);
        assert_eq!((out[0], out[1]), (bf16::INFINITY, bf16::NEG_INFINITY));
        assert!(out[2].is_nan());
    }

    #[test]
    fn compensation_holds_what_was_cut_off() {
        let mut x = Buffer([0.0; LEN]);
        for (i, x) in x.0.iter_mut().enumerate() {
            *x = (i as f32 + 1.0).sqrt() * if i % 2 == 0 { 1.0 } else { -1.0 };
        }
        let (mut out, mut rest) = ([bf16::ZERO; LEN], [bf16::ZERO; LEN]);
        round_compensated(&x, &mut out, &mut rest);
        for i in 0..LEN {
            let sum = out[i].to_f32() + rest[i].to_f32();
            assert!((sum - x.0[i]).abs() <= x.0[i].abs() / 65_536.0, "{i}");
        }
    }
}

//! Cases and properties over every available instruction set.

use super::*;
use crate::Error;
use crate::ops::normalize::Normalizer;
use crate::{bf16, f16};
use proptest::prelude::*;

type Quantized = (Vec<u8>, Vec<u32>);

fn quantize_with<T: Element>(isa: Isa, input: &[T], code: Code4, blocks: Blocks) -> Quantized {
    // What no result is, so that an unwritten byte or scale shows, and around the buffers, so that
    // a stray write does.
    const GUARD: usize = 64;
    let mut packed = vec![0x5A; blocks.packed_len() + 2 * GUARD];
    let mut absmax = vec![-1.0f32; blocks.count() + 2 * GUARD];
    let (bytes, scales) = (blocks.packed_len() + GUARD, blocks.count() + GUARD);
    run(isa, input, code, blocks, &mut packed[GUARD..bytes], &mut absmax[GUARD..scales]);
    let (before, packed) = packed.split_at(GUARD);
    let (packed, after) = packed.split_at(blocks.packed_len());
    assert!(before.iter().chain(after).all(|&byte| byte == 0x5A), "{isa} wrote past packed");
    let (before, absmax) = absmax.split_at(GUARD);
    let (absmax, after) = absmax.split_at(blocks.count());
    assert!(before.iter().chain(after).all(|&scale| scale == -1.0), "{isa} wrote past absmax");
    (packed.to_vec(), absmax.iter().map(|a| a.to_bits()).collect())
}

fn assert_all_agree<T: Element>(values: &[f32], blocksize: BlockSize) {
    let input: Vec<T> = values.iter().map(|&x| T::from_f32(x)).collect();
    let blocks = blocksize.over(input.len());
    for code in Code4::ALL {
        let expected = quantize_with(Isa::Scalar, &input, code, blocks);
        for isa in isa::available() {
            let got = quantize_with(isa, &input, code, blocks);
            let at = format!("{isa} {code} {:?} {blocks:?}", T::DTYPE);
            assert_eq!(got.1, expected.1, "absmax: {at}");
            if let Some(i) = (0..got.0.len()).find(|&i| got.0[i] != expected.0[i]) {
                let pair = &input[2 * i..input.len().min(2 * i + 2)];
                panic!("byte {i} is {:02x}, not {:02x}: {pair:?} {at}", got.0[i], expected.0[i]);
            }
        }
    }
}

fn assert_all_types_agree(values: &[f32], blocksize: BlockSize) {
    assert_all_agree::<f32>(values, blocksize);
    assert_all_agree::<f16>(values, blocksize);
    assert_all_agree::<bf16>(values, blocksize);
}

/// Bell-shaped values from a linear congruential generator.
fn weights(len: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(|_| 0.02 * (uniform() + uniform() + uniform() + uniform())).collect()
}

#[test]
fn every_variant_equals_the_definition_for_every_block_size() {
    for blocksize in BlockSize::ALL {
        let b = blocksize.get();
        let sizes = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 96 * 64, 3 * TASK + 4133];
        for len in sizes.into_iter().chain([b - 1, b + 1, 3 * b - 2, 3 * b + 33]) {
            assert_all_types_agree(&weights(len), blocksize);
        }
    }
}

/// A value next to each border, for scales that are not powers of two either.
#[test]
fn ties_and_their_neighbours_agree() {
    for absmax in [1.0f32, 0.75, 3.1, 1e-20, 6e4] {
        for code in Code4::ALL {
            let stairs = staircase::Staircase::of(code);
            let mut values = vec![];
            for border in stairs.borders {
                let x = border * absmax;
                values.extend([x, x.next_up(), x.next_down(), -x]);
            }
            values.extend([0.0, -0.0, absmax, -absmax, f32::from_bits(1), -f32::from_bits(1)]);
            values.resize(128, absmax);
            assert_all_types_agree(&values, BlockSize::new(128).unwrap());
        }
    }
}

#[test]
fn extreme_blocks_agree() {
    let smallest = Normalizer::SMALLEST_DIRECT;
    for special in [
        0.0,
        -0.0,
        f32::from_bits(1),
        smallest.next_down(),
        smallest,
        smallest.next_up(),
        f32::MIN_POSITIVE,
        6e-8,
        65504.0,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -f32::NAN,
    ] {
        for len in [1, 63, 64, 65, 200, 4097] {
            for at in [0, len / 2, len - 1] {
                // Alone, among zeros, among values of its own size and among ordinary ones.
                for filler in [0.0, -0.0, special * 0.4, -special, 1.0] {
                    let mut values = vec![filler; len];
                    values[at] = special;
                    assert_all_types_agree(&values, BlockSize::B64);
                    assert_all_types_agree(&values, BlockSize::B4096);
                }
            }
        }
    }
}

/// Every bfloat16 and every float16, in the company of a few different maxima.
#[test]
fn every_half_agrees() {
    for absmax in [1e-30, 1e-3, 0.7, 1.0, 300.0] {
        let mut values = vec![];
        for bits in 0..=u16::MAX {
            let halves = [bf16::from_bits(bits).to_f32(), f16::from_bits(bits).to_f32()];
            for x in halves {
                values.push(if x.abs() <= absmax { x } else { absmax });
            }
        }
        assert_all_types_agree(&values, BlockSize::B256);
    }
}

#[test]
fn the_staircases_are_the_definition() {
    for code in Code4::ALL {
        let stairs = staircase::Staircase::of(code);
        let rank = |y: f32| stairs.borders.iter().filter(|&&m| y > m).count();
        let near = stairs.borders.into_iter().flat_map(|m| [m.next_down(), m, m.next_up(), -m]);
        let bits = (0..=u32::MAX).step_by(4099).map(f32::from_bits).filter(|y| !y.is_nan());
        for y in near.chain(bits) {
            // One element, scaled by 1: the definition's code is in the high nibble.
            let mut byte = [0];
            scalar::block(&[y], code, 1.0, &mut byte);
            assert_eq!(stairs.codes[rank(y)], byte[0] >> 4, "{code} {y:e}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let input: Vec<bf16> = weights(5 * TASK + 77).into_iter().map(bf16::from_f32).collect();
    let blocks = BlockSize::B64.over(input.len());
    let expected = quantize_with(Isa::Scalar, &input, Code4::Nf4, blocks);
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let got = pool.install(|| quantize_with(isa::detect(), &input, Code4::Nf4, blocks));
        assert!(got == expected, "{threads} threads");
    }
}

#[test]
fn buffers_of_another_length_are_refused() {
    let input = [1.0f32; 65];
    for (bytes, scales, which) in
        [(32, 2, "packed"), (34, 2, "packed"), (33, 1, "absmax"), (33, 3, "absmax")]
    {
        let (mut packed, mut absmax) = (vec![0; bytes], vec![0.0; scales]);
        let result = quantize_4bit(
            &input,
            Code4::Nf4,
            BlockSize::B64,
            NonFinite::Refuse,
            &mut packed,
            &mut absmax,
        );
        assert!(matches!(result, Err(Error::Length { buffer, .. }) if buffer == which));
    }
}

#[test]
fn non_finite_input_is_refused_or_shows_in_its_scale() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut input = [1.0f32; 150];
        input[70] = bad;
        let (mut packed, mut absmax) = ([0; 75], [0.0; 3]);
        let mut go = |rule| {
            quantize_4bit(&input, Code4::Fp4, BlockSize::B64, rule, &mut packed, &mut absmax)
        };
        let refused = go(NonFinite::Refuse);
        assert!(matches!(refused, Err(Error::NonFinite { block: 1, start: 64, end: 128 })));
        go(NonFinite::Propagate).unwrap();
        assert!(!absmax[1].is_finite() && absmax[0] == 1.0 && absmax[2] == 1.0);
    }
}

/// Decoding what was encoded gives a code that no other code is nearer than.
#[test]
fn codes_are_nearest() {
    let values = weights(4096);
    for code in Code4::ALL {
        let blocks = BlockSize::B64.over(values.len());
        let (packed, absmax) = quantize_with(isa::detect(), &values, code, blocks);
        for (i, x) in values.iter().enumerate() {
            let q = if i % 2 == 0 { packed[i / 2] >> 4 } else { packed[i / 2] & 15 };
            let y = f64::from(*x) / f64::from(f32::from_bits(absmax[i / 64]));
            let error = |q: usize| (f64::from(code.table()[q]) - y).abs();
            let best = (0..16).map(error).fold(f64::INFINITY, f64::min);
            assert!(error(q.into()) <= best + 1e-7, "{code} {y} as {q}");
        }
    }
}

fn any_values() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        8 => -1.0f32..1.0,
        1 => Just(0.0f32),
        1 => any::<u32>().prop_map(f32::from_bits),
    ];
    let finite = prop::collection::vec(-2.0f32..2.0, 0..700);
    prop_oneof![finite, prop::collection::vec(value, 0..700)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_input_agrees(values in any_values(), size in 0usize..8) {
        assert_all_types_agree(&values, BlockSize::ALL[size]);
    }

    /// A power of two as a factor changes the scales and nothing else.
    #[test]
    fn scaling_by_a_power_of_two_keeps_the_codes(
        values in prop::collection::vec(-1.0f32..1.0, 1..300),
        exponent in -60i32..60,
    ) {
        let factor = 2f32.powi(exponent);
        let scaled: Vec<f32> = values.iter().map(|x| x * factor).collect();
        let exact = values.iter().zip(&scaled).all(|(x, s)| s / factor == *x);
        prop_assume!(exact);
        let blocks = BlockSize::B64.over(values.len());
        for code in Code4::ALL {
            let a = quantize_with(isa::detect(), &values, code, blocks);
            let b = quantize_with(isa::detect(), &scaled, code, blocks);
            prop_assert_eq!(a.0, b.0);
        }
    }
}

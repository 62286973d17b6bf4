use super::{FEW_ROWS, Group, Left, Order, Product, run};
use crate::isa::{self, Isa};
use crate::ops::int8::{INT8_MAX_DEPTH, Weight8, scalar};
use crate::{Element, bf16, f16};

/// A small reproducible generator (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn codes(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| self.next() as i8).collect()
    }

    /// Values in [-1, 1).
    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() as i32) as f32 / 2.0f32.powi(31)).collect()
    }
}

/// Every variant that this machine can run, also those that it would not choose.
fn variants() -> Vec<(&'static str, Isa)> {
    isa::available().into_iter().map(|isa| (isa.name(), isa)).collect()
}

fn product<T: Element, O: Product>(
    isa: Isa,
    left: &Left<'_, T>,
    order: Order<'_>,
    groups: &[Group<'_, O>],
    len: usize,
) -> Vec<O> {
    let mut out = vec![O::default(); len];
    run(isa, left, order, groups, &mut out);
    out
}

/// Row counts on both sides of every border: few rows, tiles of 6, 8 and 12.
const ROWS: [usize; 12] = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 24, 31];

#[test]
fn sums_are_exact_on_every_instruction_set() {
    let mut random = Random(1);
    for depth in [0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 130, 4096, 4101] {
        for (i, m) in ROWS.into_iter().enumerate() {
            let n = [1, 3, 4, 15, 16, 17, 31, 32, 33, 65][(i + depth) % 10];
            let (a, b) = (random.codes(m * depth), random.codes(n * depth));
            let expected: Vec<i32> = (0..m * n)
                .map(|i| scalar::dot(&a[i / n * depth..][..depth], &b[i % n * depth..][..depth]))
                .collect();
            let left = Left::<f32> { input: &[], codes: Some(&a), stats: &[], depth };
            let weight = Weight8 { codes: &b, scales: &[], out_features: n, in_features: depth };
            for (name, isa) in variants() {
                let group = Group::<i32> { weight, bias: None, outliers: &[], rows: 0..m };
                let got = product(isa, &left, Order::Same, &[group], m * n);
                assert_eq!(got, expected, "{name} {m}x{n}x{depth}");
            }
        }
    }
}

#[test]
fn the_longest_rows_of_extreme_codes_do_not_overflow() {
    let depth = INT8_MAX_DEPTH;
    for (a, b) in [(-128, -128), (-128, 127), (127, -128), (127, 127)] {
        let weights = vec![b; 2 * depth];
        for m in [1, FEW_ROWS + 1] {
            let rows = vec![a; m * depth];
            let expected = vec![i32::from(a) * i32::from(b) * depth as i32; m * 2];
            let left = Left::<f32> { input: &[], codes: Some(&rows), stats: &[], depth };
            let weight =
                Weight8 { codes: &weights, scales: &[], out_features: 2, in_features: depth };
            for (name, isa) in variants() {
                let group = Group::<i32> { weight, bias: None, outliers: &[], rows: 0..m };
                let got = product(isa, &left, Order::Same, &[group], m * 2);
                assert_eq!(got, expected, "{name} {a}*{b} {m} rows");
            }
        }
    }
}

/// A whole layer on every instruction set against the definition, bit for bit.
fn layers<T: Element>(bits: fn(T) -> u32) {
    let mut random = Random(7);
    for (i, m) in ROWS.into_iter().enumerate() {
        for outliers in [0, 1, 5, 70] {
            let depth = [70, 96, 128, 513][(i + outliers) % 4];
            let n = [1, 16, 33, 50][i % 4];
            let mut input = random.floats(m * depth);
            let columns: Vec<usize> = (0..outliers).map(|j| j * depth / outliers).collect();
            for row in input.chunks_exact_mut(depth) {
                for &c in &columns {
                    row[c] *= 1e3;
                }
            }
            let input: Vec<T> = input.into_iter().map(T::from_f32).collect();
            let codes = random.codes(n * depth);
            let scales = random.floats(n);
            let bias: Vec<T> = random.floats(n).into_iter().map(T::from_f32).collect();
            let stats: Vec<f32> = random.floats(m).iter().map(|r| r.abs() + 1.0).collect();
            let weight = Weight8::new(&codes, &scales, n, depth).unwrap();
            for bias in [None, Some(&bias[..])] {
                let mut quantized = vec![0; m * depth];
                let left = Left { input: &input, codes: None, stats: &stats, depth };
                for (i, codes) in quantized.chunks_exact_mut(depth).enumerate() {
                    left.row(Isa::Scalar, i, stats[i], &columns, codes);
                }
                let mut expected = vec![T::default(); m * n];
                scalar::mixed_scaled_mm(
                    &input,
                    &quantized,
                    &stats,
                    &weight,
                    &columns,
                    bias,
                    &mut expected,
                );
                for (name, isa) in variants() {
                    for codes in [None, Some(&quantized[..])] {
                        let left = Left { codes, ..left };
                        let group = Group { weight, bias, outliers: &columns, rows: 0..m };
                        let got = product(isa, &left, Order::Same, &[group], m * n);
                        for (got, expected) in got.iter().zip(&expected) {
                            assert_eq!(
                                bits(*got),
                                bits(*expected),
                                "{name} {m}x{n}x{depth} {outliers} outliers: {got:?} {expected:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn layers_are_the_same_on_every_instruction_set_float32() {
    layers::<f32>(f32::to_bits);
}

#[test]
fn layers_are_the_same_on_every_instruction_set_float16() {
    layers::<f16>(|x| u32::from(x.to_bits()));
}

#[test]
fn layers_are_the_same_on_every_instruction_set_bfloat16() {
    layers::<bf16>(|x| u32::from(x.to_bits()));
}

#[test]
fn routed_rows_equal_each_weight_alone() {
    let (depth, n, share, tokens) = (77, 35, 2, 40);
    let mut random = Random(3);
    let input = random.floats(tokens * depth);
    let stats: Vec<f32> = random.floats(tokens * share).iter().map(|r| r.abs() + 1.0).collect();
    let weights: Vec<(Vec<i8>, Vec<f32>)> =
        (0..3).map(|_| (random.codes(n * depth), random.floats(n))).collect();
    // Positions in the order of their weight; the second weight has few rows.
    let mut out: Vec<usize> = (0..tokens * share).collect();
    out.sort_by_key(|i| i * 7919 % 83);
    let borders = [0, 50, 53, tokens * share];
    let outliers: [&[usize]; 3] = [&[4, 50], &[1], &[]];
    let left = Left { input: &input, codes: None, stats: &stats, depth };
    for (name, isa) in variants() {
        let group = |e: usize| {
            let (codes, scales) = &weights[e];
            let weight = Weight8::new(codes, scales, n, depth).unwrap();
            let (outliers, rows) = (outliers[e], borders[e]..borders[e + 1]);
            Group::<f32> { weight, bias: None, outliers, rows }
        };
        let groups = [group(0), group(1), group(2)];
        let order = Order::Routed { out: &out, share };
        let got = product(isa, &left, order, &groups, tokens * share * n);
        for (e, group) in groups.iter().enumerate() {
            for i in group.rows.clone() {
                let token = out[i] / share;
                let mut codes = vec![0; depth];
                left.row(isa, token, stats[i], group.outliers, &mut codes);
                let row = &input[token * depth..][..depth];
                let mut expected = vec![0.0; n];
                scalar::mixed_scaled_mm(
                    row,
                    &codes,
                    &stats[i..=i],
                    &group.weight,
                    group.outliers,
                    None,
                    &mut expected,
                );
                let got = &got[out[i] * n..][..n];
                assert_eq!(got, expected, "{name} expert {e} row {i}");
            }
        }
    }
}

#[test]
fn more_outliers_and_columns_than_a_stretch_and_more_rows_than_a_pass() {
    let (depth, n) = (4500, 33);
    let m = super::MAX_ROWS.min(super::PASS / depth) + 30;
    let mut random = Random(5);
    let input = random.floats(m * depth);
    let stats = vec![1.0; m];
    let (codes, scales) = (random.codes(n * depth), random.floats(n));
    let weight = Weight8::new(&codes, &scales, n, depth).unwrap();
    let outliers: Vec<usize> = (0..depth).step_by(3).collect();
    assert!(outliers.len() > super::OUTLIERS && depth > super::DEPTH);
    let left = Left { input: &input, codes: None, stats: &stats, depth };
    let of = |isa| {
        let group = Group::<f32> { weight, bias: None, outliers: &outliers, rows: 0..m };
        product(isa, &left, Order::Same, &[group], m * n)
    };
    let expected = of(Isa::Scalar);
    for (name, isa) in variants() {
        assert!(of(isa) == expected, "{name}");
    }
}

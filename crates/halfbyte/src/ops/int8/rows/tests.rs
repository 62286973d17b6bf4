//! Cases and properties over every available instruction set, against `int8/scalar.rs`.

use super::*;
use crate::isa;
use crate::ops::int8::scalar as definition;
use proptest::prelude::*;

const COLUMNS: [usize; 12] = [71, 96, 127, 128, 129, 130, 191, 255, 256, 257, 320, 1000];
const THRESHOLDS: [f32; 9] = [0.0, 0.5, 6.0, 1e-45, 1e-6, 7e4, f32::MAX, f32::INFINITY, -1.0];

/// A reproducible stream of numbers in [0, 1).
fn uniform(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32
    }
}

/// About normally distributed numbers: rows that are zero, tiny, huge, subnormal or ties; columns
/// of outliers; and in some rows a NaN or an infinity.
fn sample<T: Element>(rows: usize, columns: usize, seed: u64) -> Vec<T> {
    let mut next = uniform(seed);
    let mut a = Vec::with_capacity(rows * columns);
    for r in 0..rows {
        let special = (next() * 30.0) as usize;
        let at = (next() * columns as f32) as usize;
        for c in 0..columns {
            let normal = (0..6).map(|_| next()).sum::<f32>() - 3.0;
            let mut x = match (r + seed as usize) % 9 {
                2 => 0.0,
                3 => normal * 1e-42,
                4 => normal * 1e-7,
                5 => normal * 1e4,
                7 if c == 0 => 127.0, // the rest of this row then is halves of codes
                6 | 7 => (normal * 20.0).round() + 0.5,
                _ => normal,
            };
            if seed % 3 == 1 && c % 37 == 5 {
                x *= 40.0;
            }
            if c == at {
                x = match special {
                    0 => f32::NAN,
                    1 => f32::INFINITY,
                    2 => f32::NEG_INFINITY,
                    3 => -f32::NAN,
                    4 | 5 => 6.0, // exactly at a threshold
                    6 | 7 => -0.5,
                    _ => x,
                };
            }
            a.push(T::from_f32(x));
        }
    }
    a
}

/// Everything that the two quantizing ops give. Which NaN a statistic is says nothing.
#[derive(Debug, PartialEq)]
struct Quantized {
    codes: Vec<i8>,
    col_codes: Vec<i8>,
    row_stats: Vec<u32>,
    col_stats: Vec<u32>,
    outliers: Vec<usize>,
}

fn stat_bits(stats: &[f32]) -> Vec<u32> {
    stats.iter().map(|s| if s.is_nan() { f32::NAN } else { *s }.to_bits()).collect()
}

/// By the definition when there is no instruction set. Buffers are filled before, so that what a
/// kernel leaves out shows.
fn quantized<T: Element>(isa: Option<Isa>, a: &[T], columns: usize, threshold: f32) -> Quantized {
    let rows = a.len().checked_div(columns).unwrap_or(3);
    let (mut codes, mut row_stats) = (vec![99; a.len()], vec![-1.0; rows]);
    let (mut col_codes, mut col_stats) = (vec![99; a.len()], vec![-1.0; columns]);
    let outliers = if let Some(isa) = isa {
        let outliers = quantize(isa, a, columns, threshold, &mut codes, &mut row_stats);
        let (mut again, mut stats) = (vec![99; a.len()], vec![-1.0; rows]);
        let both = quantize_both(
            isa,
            a,
            columns,
            threshold,
            &mut again,
            &mut col_codes,
            &mut stats,
            &mut col_stats,
        );
        assert_eq!(both, outliers, "{isa} columns {columns} threshold {threshold}");
        assert_eq!(again, codes, "{isa} columns {columns} threshold {threshold}");
        assert_eq!(stat_bits(&stats), stat_bits(&row_stats));
        stats.fill(-1.0);
        assert_eq!(all_stats(isa, a, columns, threshold, &mut stats), outliers);
        assert_eq!(stat_bits(&stats), stat_bits(&row_stats));
        outliers
    } else {
        let outliers = definition::quantize_rows(a, columns, threshold, &mut codes, &mut row_stats);
        definition::quantize_columns(
            a,
            columns,
            threshold,
            &outliers,
            &mut col_codes,
            &mut col_stats,
        );
        outliers
    };
    let (row_stats, col_stats) = (stat_bits(&row_stats), stat_bits(&col_stats));
    Quantized { codes, col_codes, row_stats, col_stats, outliers }
}

fn every_isa_quantizes_as_defined<T: Element>() {
    let mut seed = 0;
    for columns in (0..=70).chain(COLUMNS) {
        for rows in [0, 1, 2, 3, 17] {
            seed += 1;
            let a = sample::<T>(rows, columns, seed);
            for threshold in THRESHOLDS {
                let want = quantized(None, &a, columns, threshold);
                for isa in isa::available() {
                    let got = quantized(Some(isa), &a, columns, threshold);
                    assert!(
                        got == want,
                        "{isa} {} {rows} x {columns} threshold {threshold} seed {seed}",
                        T::DTYPE
                    );
                }
            }
        }
    }
}

#[test]
fn every_isa_quantizes_as_defined_f32() {
    every_isa_quantizes_as_defined::<f32>();
}

#[test]
fn every_isa_quantizes_as_defined_f16() {
    every_isa_quantizes_as_defined::<f16>();
}

#[test]
fn every_isa_quantizes_as_defined_bf16() {
    every_isa_quantizes_as_defined::<bf16>();
}

/// The bits of elements; any NaN is one NaN.
fn element_bits<T: Element>(x: &[T]) -> Vec<u32> {
    stat_bits(&x.iter().map(|x| x.to_f32()).collect::<Vec<_>>())
}

fn every_isa_decodes_as_defined<T: Element>() {
    let mut next = uniform(5);
    for columns in (0..=70).chain(COLUMNS) {
        for rows in [0, 1, 2, 17] {
            let n = rows * columns;
            let codes: Vec<i8> = (0..n).map(|_| (next() * 256.0) as u8 as i8).collect();
            let acc: Vec<i32> = (0..n).map(|_| ((next() - 0.5) * 4e9) as i32).collect();
            let mut stats = |len| -> Vec<f32> {
                let odd = [0.0, 1e-44, 3e38, f32::INFINITY, f32::NAN, 1e-20, 1e30];
                let mut stat = |i| match (next() * 40.0) as usize {
                    k if k < odd.len() && i > 0 => odd[k],
                    _ => next() * 9.0,
                };
                (0..len).map(&mut stat).collect()
            };
            let (row_stats, col_stats, bias) = (stats(rows), stats(columns), stats(columns));

            let mut want = vec![T::default(); n];
            let mut got = want.clone();
            definition::dequantize_rows(&codes, columns, &row_stats, &mut want);
            for isa in isa::available() {
                got.fill(T::from_f32(9.0));
                dequantize(isa, &codes, columns, &row_stats, &mut got);
                assert_eq!(element_bits(&got), element_bits(&want), "{isa} {rows} x {columns}");
            }
            for bias in [None, Some(&*bias)] {
                definition::mm_dequant(&acc, &row_stats, &col_stats, bias, &mut want);
                for isa in isa::available() {
                    got.fill(T::from_f32(9.0));
                    mm_dequant(isa, &acc, &row_stats, &col_stats, bias, &mut got);
                    assert_eq!(element_bits(&got), element_bits(&want), "{isa} {rows} x {columns}");
                }
            }
        }
    }
}

#[test]
fn every_isa_decodes_as_defined_f32() {
    every_isa_decodes_as_defined::<f32>();
}

#[test]
fn every_isa_decodes_as_defined_f16() {
    every_isa_decodes_as_defined::<f16>();
}

#[test]
fn every_isa_decodes_as_defined_bf16() {
    every_isa_decodes_as_defined::<bf16>();
}

#[test]
fn a_bound_parts_all_halves_as_the_threshold_does() {
    fn check<T: Element>(all: &[T]) {
        let thresholds = [1e-45, 5e-8, 6e-8, 0.5, 3.3, 6.0, 65504.0, 65505.0, 65536.0, 3.39e38];
        for threshold in thresholds.into_iter().chain([f32::MAX, f32::INFINITY]) {
            let bound = Bound::<i16>::new::<T>(threshold);
            for &x in all {
                let magnitude = bits::<T, i16>(&[x])[0] & i16::MAX;
                let outlier = magnitude > bound.limit && magnitude <= bound.infinity;
                assert_eq!(outlier, definition::is_outlier(x, threshold), "{x:?} {threshold}");
            }
        }
        for threshold in [0.0, -0.0, -1.0, f32::NAN, f32::NEG_INFINITY] {
            assert_eq!(Bound::<i16>::new::<T>(threshold).limit, i16::MAX);
        }
    }
    check(&(0..=u16::MAX).map(f16::from_bits).collect::<Vec<_>>());
    check(&(0..=u16::MAX).map(bf16::from_bits).collect::<Vec<_>>());
}

#[test]
fn special_values_in_every_lane() {
    let specials =
        [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 6.0, -6.5, 0.0];
    for special in specials {
        for lane in 0..135 {
            let mut a = sample::<f32>(1, 135, 0);
            a[lane] = special;
            let half: Vec<bf16> = a.iter().map(|&x| bf16::from_f32(x)).collect();
            for threshold in [0.0, 6.0, f32::INFINITY] {
                let want = quantized(None, &a, 135, threshold);
                let want_half = quantized(None, &half, 135, threshold);
                for isa in isa::available() {
                    let at = format!("{isa} {special} at {lane} threshold {threshold}");
                    assert_eq!(quantized(Some(isa), &a, 135, threshold), want, "{at}");
                    assert_eq!(quantized(Some(isa), &half, 135, threshold), want_half, "{at}");
                }
            }
        }
    }
}

#[test]
fn stats_keep_flags_that_are_set() {
    let mut row = vec![1.0f32; 100];
    (row[3], row[70], row[99]) = (-7.0, f32::INFINITY, 6.0);
    for isa in isa::available() {
        let mut flags = vec![0; 100];
        flags[50] = 1;
        // SAFETY: the instruction set is available.
        let stat = unsafe { stats(isa, &row, 6.0, &mut flags) };
        assert_eq!(stat, 1.0);
        let set: Vec<usize> = (0..100).filter(|&c| flags[c] == 1).collect();
        assert_eq!(set, [3, 50, 70, 99], "{isa}");
        // SAFETY: as above.
        assert_eq!(unsafe { stats(isa, &row, 0.0, &mut []) }, f32::INFINITY);
    }
}

#[test]
fn encoding_takes_halves_to_even_and_clamps() {
    let row = [0.5f32, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e30, -1e30, -127.5, f32::NAN];
    let want = [0i8, 2, 2, 0, -2, 126, 127, 127, -127, -127, 0];
    for isa in isa::available() {
        for start in 0..70 {
            let mut long = vec![0.0; start];
            long.extend(row);
            let mut codes = vec![99; long.len()];
            // SAFETY: the instruction set is available.
            unsafe { encode(isa, &long, 1.0, &mut codes) };
            assert_eq!(codes[start..], want, "{isa} from {start}");
            assert!(codes[..start].iter().all(|&q| q == 0));
        }
    }
}

/// A step is `r / 127`. On top of half a step come the roundings of the scale, of the product and
/// of decoding; rows so small that their scale would overflow may lose all.
#[test]
fn errors_stay_below_half_a_step() {
    let mut next = uniform(11);
    for size in [1.0f32, 1e-3, 1e-30, 3e-39, 1e-41, 1e30] {
        let a: Vec<f32> = (0..16 * 500).map(|_| (next() - 0.5) * size).collect();
        for isa in isa::available() {
            let (mut codes, mut stats) = (vec![0; a.len()], vec![0.0; 16]);
            quantize(isa, &a, 500, 0.0, &mut codes, &mut stats);
            let mut out = vec![0.0f32; a.len()];
            dequantize(isa, &codes, 500, &stats, &mut out);
            for (i, (&a, &out)) in a.iter().zip(&out).enumerate() {
                let r = f64::from(stats[i / 500]);
                let lost = if r < 127.0 / f64::from(f32::MAX) { r } else { 0.0 };
                let limit = r / 254.0 * (1.0 + f64::exp2(-13.0)) + lost;
                let error = (f64::from(a) - f64::from(out)).abs();
                assert!(error <= limit, "{isa} {a:e} became {out:e}, r {r:e}");
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let columns = 3000;
    let a = sample::<bf16>(301, columns, 4);
    let acc: Vec<i32> = (0..a.len()).map(|i| (i as i32).wrapping_mul(7919)).collect();
    let results = [1, 2, 3, 7].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let isa = isa::detect();
            let q = quantized(Some(isa), &a, columns, 6.0);
            let stats: Vec<f32> = q.row_stats.iter().map(|&b| f32::from_bits(b)).collect();
            let (mut decoded, mut scaled) = (vec![0.0f32; a.len()], vec![bf16::ZERO; a.len()]);
            dequantize(isa, &q.codes, columns, &stats, &mut decoded);
            mm_dequant(isa, &acc, &stats, &vec![0.25; columns], None, &mut scaled);
            (q, element_bits(&decoded), element_bits(&scaled))
        })
    });
    assert!(!results[0].0.outliers.is_empty());
    assert!(results.iter().all(|r| *r == results[0]));
}

#[test]
fn unaligned_slices() {
    let a = sample::<bf16>(1, 1000, 1);
    for start in 1..40 {
        let a = &a[start..];
        let want = quantized(None, a, a.len(), 6.0);
        for isa in isa::available() {
            let (mut codes, mut stats) = (vec![0; a.len() + start], [0.0]);
            quantize(isa, a, a.len(), 6.0, &mut codes[start..], &mut stats);
            assert_eq!(codes[start..], want.codes, "{isa} from {start}");
            assert!(codes[..start].iter().all(|&q| q == 0));
            let (mut out, mut whole) = (vec![0.0f32; a.len() + start], vec![0.0; a.len()]);
            dequantize(isa, &codes[start..], a.len(), &[2.0], &mut out[start..]);
            definition::dequantize_rows(&want.codes, a.len(), &[2.0], &mut whole);
            assert_eq!(out[start..], whole, "{isa} from {start}");
        }
    }
}

proptest! {
    #[test]
    fn any_bits_quantize_as_defined(
        bits in prop::collection::vec(any::<u32>(), 0..400),
        rows in 1usize..4,
        threshold in any::<u32>(),
    ) {
        let columns = bits.len() / rows;
        let bits = &bits[..columns * rows];
        let a: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        let h: Vec<f16> = bits.iter().map(|&b| f16::from_bits(b as u16)).collect();
        let b: Vec<bf16> = bits.iter().map(|&b| bf16::from_bits(b as u16)).collect();
        for threshold in [0.0, 6.0, f32::from_bits(threshold)] {
            let want = quantized(None, &a, columns, threshold);
            let want_h = quantized(None, &h, columns, threshold);
            let want_b = quantized(None, &b, columns, threshold);
            for isa in isa::available() {
                prop_assert_eq!(&quantized(Some(isa), &a, columns, threshold), &want);
                prop_assert_eq!(&quantized(Some(isa), &h, columns, threshold), &want_h);
                prop_assert_eq!(&quantized(Some(isa), &b, columns, threshold), &want_b);
            }
        }
    }
}

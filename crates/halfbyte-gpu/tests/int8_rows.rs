//! The codes and statistics of `LLM.int8()` equal the core's, bit for bit, on every device at hand.

mod common;
mod placed;
mod random;

use halfbyte::{Element, NonFinite};
use halfbyte_gpu::{DeviceSlice, ops};
use placed::{Bits, Placed, assert_same, cast};
use random::{Columns, Random, workspace};

fn stats_of(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

/// `int8_vectorwise_quant`, `int8_double_quant` and `int8_vectorwise_dequant` of one matrix.
fn rows<T: Element + Bits>(values: &[f32], columns: usize, threshold: f32, shift: usize) {
    let a: Vec<T> = cast(values);
    let rows = a.len() / columns;
    let (mut codes, mut stats) = (vec![0; a.len()], vec![0.0; rows]);
    let (mut by_column, mut maxima) = (vec![0; a.len()], vec![0.0; columns]);
    let rule = NonFinite::Propagate;
    let found = halfbyte::int8_double_quant(
        &a,
        columns,
        threshold,
        rule,
        &mut codes,
        &mut by_column,
        &mut stats,
        &mut maxima,
    )
    .unwrap();
    let mut decoded = vec![T::default(); a.len()];
    halfbyte::int8_vectorwise_dequant(&codes, columns, &stats, &mut decoded).unwrap();

    for device in common::portable_devices() {
        let stream = common::stream(device);
        let at = format!("{device} {} {rows}x{columns} from {threshold}, shift {shift}", T::DTYPE);
        let x = Placed::new(&stream, &a, shift);
        let q = Placed::unwritten(&stream, codes.len(), shift);
        let r = Placed::unwritten(&stream, rows, 0);
        let scratch = workspace(device, ops::int8_vectorwise_quant_workspace(columns));
        let list = Columns::new(&stream, columns);
        let outliers = (shift != 1).then(|| list.outliers());
        let (input, scratch) = (x.floats(), scratch.slice());
        ops::int8_vectorwise_quant(
            &stream,
            input,
            columns,
            threshold,
            q.slice(),
            r.slice(),
            outliers,
            scratch,
        )
        .unwrap();
        assert_eq!(stats_of(&r.read(&stream)), stats_of(&stats), "statistics, {at}");
        assert_eq!(q.read(&stream), codes, "codes, {at}");
        if outliers.is_some() {
            assert_eq!(list.read(&stream), found, "outliers, {at}");
        }

        let y = Placed::unwritten(&stream, a.len(), shift);
        ops::int8_vectorwise_dequant(&stream, q.slice(), columns, r.slice(), y.floats()).unwrap();
        assert_same::<T>(&y.read(&stream), &decoded, &at);

        let q = Placed::unwritten(&stream, codes.len(), shift);
        let p = Placed::unwritten(&stream, codes.len(), shift);
        let r = Placed::unwritten(&stream, rows, 0);
        let c = Placed::unwritten(&stream, columns, 0);
        let list = Columns::new(&stream, columns);
        ops::int8_double_quant(
            &stream,
            input,
            columns,
            threshold,
            q.slice(),
            p.slice(),
            r.slice(),
            c.slice(),
            Some(list.outliers()),
            scratch,
        )
        .unwrap();
        assert_eq!(q.read(&stream), codes, "row codes, {at}");
        assert_eq!(p.read(&stream), by_column, "column codes, {at}");
        assert_eq!(stats_of(&r.read(&stream)), stats_of(&stats), "row statistics, {at}");
        assert_eq!(stats_of(&c.read(&stream)), stats_of(&maxima), "column statistics, {at}");
        assert_eq!(list.read(&stream), found, "outliers, {at}");
    }
}

/// Columns on both sides of every border: the 8 elements of a thread, words of flags, a group.
#[test]
fn rows_of_any_length() {
    let mut random = Random(1);
    for (i, columns) in [1, 7, 8, 31, 32, 33, 64, 255, 520, 2049].into_iter().enumerate() {
        for m in [1, 3, 18] {
            let outliers = [0, 1, 5, 70][(i + m) % 4];
            let values = random.activations(m, columns, outliers);
            let threshold = [0.0, 6.0][usize::from(outliers > 0)];
            for_all_dtypes!(rows(&values, columns, threshold, (i + m) % 3));
        }
    }
}

/// More elements than one group takes, and more columns than its flags.
#[test]
fn large_matrices() {
    let mut random = Random(2);
    let values = random.activations(21, 2048, 9);
    for_all_dtypes!(rows(&values, 2048, 6.0, 0));
    for_all_dtypes!(rows(&values, 2048, 0.0, 0));
    let values = random.activations(1, 40_000, 70);
    rows::<halfbyte::bf16>(&values, 40_000, 6.0, 0);
    rows::<f32>(&values[..33_001], 33_001, 6.0, 1);
}

/// Outliers next to the threshold, rows of nothing else, and values that no scale fits.
#[test]
fn special_values() {
    let specials = [
        0.0,
        -0.0,
        6.0,
        6.0f32.next_down(),
        -6.0f32.next_up(),
        f32::from_bits(1),
        f32::MIN_POSITIVE,
        6e-8,
        1e-38,
        65504.0,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -f32::NAN,
    ];
    for special in specials {
        for filler in [0.0, special, 0.3 * special, 5.9] {
            let mut values = vec![filler; 3 * 40];
            values[47] = special;
            for threshold in [0.0, f32::NAN, 6.0, f32::from_bits(1), f32::INFINITY] {
                for_all_dtypes!(rows(&values, 40, threshold, 0));
            }
        }
    }
}

/// Without rows, and without columns.
#[test]
fn empty_matrices() {
    for device in common::devices() {
        let stream = common::stream(device);
        for (m, columns) in [(0, 5), (4, 0), (0, 0)] {
            let x = Placed::<f32>::new(&stream, &[], 0);
            let q = Placed::<i8>::unwritten(&stream, 0, 0);
            let r = Placed::<f32>::unwritten(&stream, m, 0);
            let list = Columns::new(&stream, columns);
            let scratch = workspace(device, ops::int8_vectorwise_quant_workspace(columns));
            let (outliers, scratch) = (Some(list.outliers()), scratch.slice());
            ops::int8_vectorwise_quant(
                &stream,
                x.floats(),
                columns,
                6.0,
                q.slice(),
                r.slice(),
                outliers,
                scratch,
            )
            .unwrap();
            assert_eq!(r.read(&stream), vec![0.0; m], "{device}");
            assert!(list.read(&stream).is_empty(), "{device}");
        }
        let out = Placed::<i32>::unwritten(&stream, 300, 1);
        let none = DeviceSlice::empty();
        ops::int8_linear_matmul(&stream, none, none, 0, out.slice()).unwrap();
        assert_eq!(out.read(&stream), [0; 300], "{device}");
    }
}

/// A caller's list, in any order, with repetitions and numbers that are no columns.
#[test]
fn columns_as_callers_list_them() {
    let lists: [&[i64]; 4] = [&[], &[7], &[9, 0, 3, 9, 1], &[-1, 10, i64::MAX, 4, i64::MIN, 4, 2]];
    let mut random = Random(3);
    let a = random.floats(6 * 10);
    for device in common::devices() {
        let stream = common::stream(device);
        for given in lists {
            let inside = |c: &&i64| (0..10).contains(*c);
            let mut sorted: Vec<usize> = given.iter().filter(inside).map(|&c| c as usize).collect();
            sorted.sort_unstable();
            let columns = Placed::new(&stream, given, 1);
            let list = Columns::new(&stream, 10);
            ops::int8_outliers(&stream, columns.slice(), 10, list.outliers()).unwrap();
            assert_eq!(list.read(&stream), sorted, "{device} {given:?}");

            let x = Placed::new(&stream, &a, 1);
            let out = Placed::unwritten(&stream, 6 * given.len(), 1);
            ops::int8_gather_columns(&stream, x.floats(), 10, columns.slice(), out.floats())
                .unwrap();
            let at =
                |m: usize, c: i64| if (0..10).contains(&c) { a[m * 10 + c as usize] } else { 0.0 };
            let expected: Vec<f32> =
                (0..6).flat_map(|m| given.iter().map(move |&c| at(m, c))).collect();
            assert_same(&out.read(&stream), &expected, &format!("{device} {given:?}"));
        }
    }
}

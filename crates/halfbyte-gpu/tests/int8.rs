//! The products of `LLM.int8()` equal the core's, bit for bit, on every device at hand; the gradient
//! is within its stated bound.

mod common;
mod placed;
mod random;

use halfbyte::{DType, Element};
use halfbyte_gpu::{DeviceSlice, Stream, ops};
use placed::{Bits, Placed, assert_same, cast};
use random::{Columns, Random, workspace};

// ---- products ------------------------------------------------------------------------------------

/// `int8_linear_matmul`, and `int8_mm_dequant` of its sums.
fn sums(random: &mut Random, m: usize, n: usize, depth: usize, shift: usize) {
    let (a, b) = (random.codes(m * depth), random.codes(n * depth));
    let mut expected = vec![0; m * n];
    halfbyte::int8_linear_matmul(&a, &b, depth, &mut expected).unwrap();
    let (row_stats, col_stats, bias) = (random.floats(m), random.floats(n), random.floats(n));
    let bias = (shift != 1).then_some(bias);
    let mut scaled = vec![half(0.0); m * n];
    let core_bias = bias.as_deref();
    halfbyte::int8_mm_dequant(&expected, &row_stats, &col_stats, core_bias, &mut scaled).unwrap();
    for device in common::devices() {
        let stream = common::stream(device);
        let at = format!("{device} {m}x{n}x{depth} shift {shift}");
        let x = Placed::new(&stream, &a, shift);
        let w = Placed::new(&stream, &b, shift / 2 * 2);
        let out = Placed::unwritten(&stream, m * n, shift);
        ops::int8_linear_matmul(&stream, x.slice(), w.slice(), depth, out.slice()).unwrap();
        assert_eq!(out.read(&stream), expected, "{at}");

        let r = Placed::new(&stream, &row_stats, 0);
        let c = Placed::new(&stream, &col_stats, 0);
        let bias = bias.as_ref().map(|bias| Placed::new(&stream, bias, 1));
        let y = Placed::unwritten(&stream, m * n, shift);
        let device_bias = bias.as_ref().map(Placed::slice);
        let (acc, floats) = (out.slice(), y.floats());
        ops::int8_mm_dequant(&stream, acc, r.slice(), c.slice(), device_bias, floats).unwrap();
        assert_same(&y.read(&stream), &scaled, &at);
    }
}

fn half(x: f32) -> halfbyte::f16 {
    halfbyte::f16::from_f32(x)
}

/// Depths on both sides of every step, rows and outputs on both sides of every tile.
#[test]
fn sums_are_exact() {
    let mut random = Random(4);
    for (i, depth) in [1, 3, 4, 15, 16, 31, 33, 64, 100, 130, 272, 1040].into_iter().enumerate() {
        for (j, m) in [1, 2, 5, 8, 9, 16, 17, 65].into_iter().enumerate() {
            let n = [1, 2, 7, 16, 31, 33, 66][(i + j) % 7];
            sums(&mut random, m, n, depth, [0, 0, 1, 3][(i + j) % 4]);
        }
    }
}

/// Enough tiles for the large ones to be chosen, in bands of rows.
#[test]
fn large_tiles() {
    let mut random = Random(5);
    for (m, n, depth) in [(129, 257, 80), (300, 130, 48), (1160, 20, 33)] {
        sums(&mut random, m, n, depth, 0);
    }
}

#[test]
fn the_longest_rows_of_extreme_codes_do_not_overflow() {
    let depth = halfbyte::INT8_MAX_DEPTH;
    for (m, left, right) in [(1, -128, -128), (9, -128, -128), (9, 127, -128)] {
        let (a, b) = (vec![left; m * depth], vec![right; 2 * depth]);
        let expected = vec![i32::from(left) * i32::from(right) * depth as i32; m * 2];
        for device in common::portable_devices() {
            let stream = common::stream(device);
            let (x, w) = (Placed::new(&stream, &a, 0), Placed::new(&stream, &b, 0));
            let out = Placed::unwritten(&stream, m * 2, 0);
            ops::int8_linear_matmul(&stream, x.slice(), w.slice(), depth, out.slice()).unwrap();
            assert_eq!(out.read(&stream), expected, "{device} {m} rows of {left} by {right}");
        }
    }
}

/// A weight `[n, depth]` with scales.
struct Weight {
    codes: Vec<i8>,
    scales: Vec<f32>,
    n: usize,
    depth: usize,
}

impl Weight {
    fn new(random: &mut Random, n: usize, depth: usize) -> Self {
        Self { codes: random.codes(n * depth), scales: random.floats(n), n, depth }
    }

    fn core(&self) -> halfbyte::Weight8<'_> {
        halfbyte::Weight8::new(&self.codes, &self.scales, self.n, self.depth).unwrap()
    }
}

/// A weight on the device.
struct Placed8 {
    weight: ops::Weight8,
    _memory: (Placed<i8>, Placed<f32>),
}

impl Placed8 {
    fn new(stream: &Stream, weight: &Weight, shift: usize) -> Self {
        let codes = Placed::new(stream, &weight.codes, shift);
        let scales = Placed::new(stream, &weight.scales, shift);
        let tied = ops::Weight8::new(codes.slice(), scales.slice(), weight.n, weight.depth);
        Self { weight: tied.unwrap(), _memory: (codes, scales) }
    }
}

/// A layer, whole and in its two halves, on every device.
fn layer<T: Element + Bits>(
    random: &mut Random,
    m: usize,
    n: usize,
    depth: usize,
    outliers: usize,
    shift: usize,
) {
    let input: Vec<T> = cast(&random.activations(m, depth, outliers));
    let weight = Weight::new(random, n, depth);
    let bias: Option<Vec<T>> = (shift != 2).then(|| cast(&random.floats(n)));
    let threshold = if outliers > 0 { 6.0 } else { 0.0 };
    let mut expected = vec![T::default(); m * n];
    let core = weight.core();
    let found =
        halfbyte::int8_linear(&input, m, &core, threshold, bias.as_deref(), &mut expected).unwrap();
    for device in common::devices() {
        let stream = common::stream(device);
        let at = format!("{device} {} {m}x{n}x{depth}, {outliers} outliers", T::DTYPE);
        let x = Placed::new(&stream, &input, shift);
        let w = Placed8::new(&stream, &weight, shift);
        let b = bias.as_ref().map(|bias| Placed::new(&stream, bias, 1));
        let bias = b.as_ref().map(Placed::floats);
        let y = Placed::unwritten(&stream, m * n, shift);
        let list = Columns::new(&stream, depth);
        let asked = (shift != 1).then(|| list.outliers());
        let scratch = workspace(device, ops::int8_linear_workspace(m, depth));
        let (input, out) = (x.floats(), y.floats());
        ops::int8_linear(
            &stream,
            input,
            m,
            &w.weight,
            threshold,
            bias,
            out,
            asked,
            scratch.slice(),
        )
        .unwrap();
        assert_same::<T>(&y.read(&stream), &expected, &at);
        if asked.is_some() {
            assert_eq!(list.read(&stream), found, "{at}");
        }

        let q = Placed::unwritten(&stream, m * depth, shift);
        let r = Placed::unwritten(&stream, m, 0);
        let list = list.outliers();
        let scratch = scratch.slice();
        ops::int8_vectorwise_quant(
            &stream,
            input,
            depth,
            threshold,
            q.slice(),
            r.slice(),
            Some(list),
            scratch,
        )
        .unwrap();
        let y = Placed::unwritten(&stream, m * n, shift);
        let (codes, stats) = (q.slice(), r.slice());
        if outliers > 0 {
            let (list, out) = (Some(list), y.floats());
            ops::int8_mixed_scaled_mm(&stream, input, codes, stats, &w.weight, list, bias, out)
        } else {
            ops::int8_scaled_mm(&stream, codes, stats, &w.weight, bias, y.floats())
        }
        .unwrap();
        assert_same::<T>(&y.read(&stream), &expected, &format!("in two halves, {at}"));
    }
}

#[test]
fn layers_equal_the_definition() {
    let mut random = Random(6);
    for (i, m) in [1, 3, 8, 9, 17, 70].into_iter().enumerate() {
        for (j, outliers) in [0, 1, 5, 40].into_iter().enumerate() {
            let depth = [70, 96, 128, 513, 1200][(i + j) % 5];
            let n = [1, 16, 33, 50, 64][(i + 2 * j) % 5];
            for_all_dtypes!(layer(&mut random, m, n, depth, outliers, (i + j) % 3));
        }
    }
}

#[test]
fn layers_of_large_tiles_equal_the_definition() {
    let mut random = Random(7);
    layer::<halfbyte::bf16>(&mut random, 131, 260, 96, 20, 0);
    layer::<halfbyte::f16>(&mut random, 260, 131, 80, 0, 0);
    layer::<f32>(&mut random, 129, 140, 50, 3, 0);
}

// ---- the gradient ----------------------------------------------------------------------------------

/// Against float64, within the bound that the launcher states.
fn gradient<T: Element + Bits>(
    random: &mut Random,
    m: usize,
    n: usize,
    depth: usize,
    shift: usize,
) {
    let grad: Vec<T> = cast(&random.floats(m * n));
    let weight = Weight::new(random, n, depth);
    for device in common::devices() {
        let stream = common::stream(device);
        let g = Placed::new(&stream, &grad, shift);
        let w = Placed8::new(&stream, &weight, shift);
        let out = Placed::<T>::unwritten(&stream, m * depth, shift);
        ops::int8_linear_grad_input(&stream, g.floats(), m, &w.weight, out.floats()).unwrap();
        let got = out.read(&stream);
        let tensor_cores = device.capability() >= if T::DTYPE == DType::BF16 { 80 } else { 75 };
        let (weights, result, least) = match T::DTYPE {
            DType::F32 => (-40, -24, 0.0),
            DType::F16 => (if tensor_cores { -11 } else { -40 }, -11, 2.0f64.powi(-25)),
            DType::BF16 => (if tensor_cores { -8 } else { -40 }, -8, 0.0),
        };
        let relative = 2.0f64.powi(weights) + (n + 2) as f64 * 2.0f64.powi(-23);
        for (i, got) in got.iter().enumerate() {
            let (r, c) = (i / depth, i % depth);
            let (mut sum, mut most, mut grads) = (0.0f64, 0.0f64, 0.0f64);
            for o in 0..n {
                let x = f64::from(grad[r * n + o].to_f32());
                let code = f64::from(weight.codes[o * depth + c]);
                let term = x * code * f64::from(weight.scales[o]) / 127.0;
                sum += term;
                most += term.abs();
                grads += x.abs();
            }
            let bound = relative * most + least * (grads + 1.0) + 2.0f64.powi(result) * sum.abs();
            let off = (f64::from(got.to_f32()) - sum).abs();
            assert!(
                off <= bound,
                "{device} {} {m}x{n}x{depth}: row {r}, column {c} is {off} off, beyond {bound}",
                T::DTYPE
            );
        }
    }
}

#[test]
fn gradients_are_within_the_bound() {
    let mut random = Random(8);
    for (i, n) in [1, 7, 32, 40, 100].into_iter().enumerate() {
        for (j, m) in [1, 33, 65].into_iter().enumerate() {
            let depth = [1, 16, 70, 64, 129][(i + j) % 5];
            for_all_dtypes!(gradient(&mut random, m, n, depth, (i + j) % 2));
        }
    }
    gradient::<halfbyte::bf16>(&mut random, 136, 72, 144, 0);
    gradient::<halfbyte::f16>(&mut random, 130, 50, 260, 0);
    gradient::<halfbyte::bf16>(&mut random, 3, 0, 5, 0);
}

/// A layer without columns is its bias; one without rows or outputs is nothing.
#[test]
fn empty_layers() {
    let mut random = Random(9);
    for (m, n, depth) in [(3, 5, 0), (12, 5, 0), (0, 5, 8), (4, 0, 8)] {
        for_all_dtypes!(layer(&mut random, m, n, depth, 0, 0));
        for_all_dtypes!(gradient(&mut random, m, n, depth, 0));
    }
}

/// Each launcher says which buffer has what length or dtype.
#[test]
fn lengths_and_dtypes_are_checked() {
    let device = common::portable_devices()[0];
    let stream = common::stream(device);
    let [eight, nine] = [8, 9].map(|len| Placed::<f32>::unwritten(&stream, len, 0));
    let halves = Placed::<halfbyte::f16>::unwritten(&stream, 8, 0);
    let codes = Placed::<i8>::unwritten(&stream, 8, 0);
    let scratch = workspace(device, ops::int8_linear_workspace(2, 4));
    let two = eight.slice().part("two", 0, 2).unwrap();
    let weight = ops::Weight8::new(codes.slice(), two, 2, 4).unwrap();
    let square = two.part("two", 0, 2).unwrap();
    let out = Placed::<f32>::unwritten(&stream, 4, 0);
    let linear = |input, bias, bytes| {
        let scratch = scratch.slice().part("scratch", 0, bytes).unwrap();
        ops::int8_linear(&stream, input, 2, &weight, 6.0, bias, out.floats(), None, scratch)
    };
    let all = scratch.len();
    let refused = [
        (
            ops::Weight8::new(codes.slice(), two, 3, 3).map(drop),
            "codes must hold 9 elements, got 8",
        ),
        (
            ops::Weight8::new(codes.slice(), two, 1, 8).map(drop),
            "scales must hold 1 elements, got 2",
        ),
        (linear(nine.floats(), None, all), "input must hold 8 elements, got 9"),
        (linear(eight.floats(), Some(eight.floats()), all), "bias must hold 2 elements, got 8"),
        (linear(halves.floats(), None, all), "out must be of dtype float16, got float32"),
        (
            ops::int8_scaled_mm(&stream, codes.slice(), two, &weight, None, nine.floats()),
            "out must hold 4 elements, got 9",
        ),
        (
            ops::int8_linear_grad_input(&stream, out.floats(), 2, &weight, nine.floats()),
            "out must hold 8 elements, got 9",
        ),
        (
            ops::int8_vectorwise_dequant(&stream, codes.slice(), 4, square, nine.floats()),
            "out must hold 8 elements, got 9",
        ),
    ];
    for (result, message) in refused {
        assert_eq!(result.unwrap_err().to_string(), message);
    }
    let error = linear(eight.floats(), None, all - 1).unwrap_err().to_string();
    assert_eq!(error, format!("workspace must hold {all} elements, got {}", all - 1));
    let long = halfbyte::INT8_MAX_DEPTH + 1;
    let error = ops::Weight8::new(DeviceSlice::empty(), DeviceSlice::empty(), 0, long)
        .unwrap_err()
        .to_string();
    assert!(error.contains(&format!("got {long}")), "{error}");
    linear(eight.floats(), None, all).unwrap();
}

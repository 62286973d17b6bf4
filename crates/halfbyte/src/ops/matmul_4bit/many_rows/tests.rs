//! Every instruction set against the float64 product, within the bound that the module states.

use super::{forward, grad_input};
use crate::isa::{self, Isa};
use crate::ops::gemm::DEPTH;
use crate::ops::{NestedScales, Scales, Weight4};
use crate::{BlockSize, Code4, Code8, DType, Element};
use half::{bf16, f16};
use proptest::prelude::*;

/// Reproducible numbers: the same case fails the same way.
struct Numbers(u64);

impl Numbers {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }
    /// Between -1 and 1.
    fn signed(&mut self) -> f32 {
        self.bits() as f32 / (1u32 << 30) as f32 - 1.0
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    out_features: usize,
    in_features: usize,
    blocksize: BlockSize,
    code: Code4,
    nested: bool,
    bias: bool,
}

/// A weight's parts, and its dequantized float32 values.
struct Parts {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    absmax_codes: Vec<u8>,
    absmax2: Vec<f32>,
    dequantized: Vec<f64>,
}

impl Case {
    fn parts(&self, numbers: &mut Numbers) -> Parts {
        let len = self.out_features * self.in_features;
        let blocks = self.blocksize.over(len);
        let mut parts = Parts {
            packed: (0..blocks.packed_len()).map(|_| numbers.bits() as u8).collect(),
            absmax: (0..blocks.count()).map(|_| numbers.signed().abs() + 0.01).collect(),
            absmax_codes: (0..blocks.count()).map(|_| numbers.bits() as u8).collect(),
            absmax2: (0..BlockSize::B256.over(blocks.count()).count())
                .map(|_| numbers.signed().abs())
                .collect(),
            dequantized: Vec::new(),
        };
        let mut scales = vec![0.0; blocks.count()];
        self.scales(&parts).decode(0, &mut scales);
        parts.dequantized = (0..len)
            .map(|i| {
                let q = parts.packed[i / 2] >> (4 - i % 2 * 4) & 15;
                f64::from(self.code.table()[q as usize] * scales[i / self.blocksize.get()])
            })
            .collect();
        parts
    }

    fn scales<'a>(&self, parts: &'a Parts) -> Scales<'a> {
        if self.nested {
            Scales::Nested(NestedScales {
                absmax: &parts.absmax_codes,
                code: Code8::dynamic(true).values(),
                absmax2: &parts.absmax2,
                blocksize: BlockSize::B256,
                offset: 0.5,
            })
        } else {
            Scales::Plain(&parts.absmax)
        }
    }

    fn weight<'a>(&self, parts: &'a Parts) -> Weight4<'a> {
        Weight4::new(
            &parts.packed,
            self.scales(parts),
            self.code.table(),
            self.blocksize,
            self.out_features,
            self.in_features,
        )
        .unwrap()
    }
}

fn elements<T: Element>(n: usize, numbers: &mut Numbers) -> Vec<T> {
    (0..n).map(|_| T::from_f32(numbers.signed())).collect()
}

/// The module's bound: a chain of `DEPTH`, then a chain of stretches.
fn bound(terms: usize, absolute: f64) -> f64 {
    let k = (terms.min(DEPTH) + terms.div_ceil(DEPTH)) as f64 * 2f64.powi(-24);
    k / (1.0 - k) * absolute
}

/// `got` against `Σ xs + bias`, given the sum, the sum of absolute values and the bias.
fn check<T: Element>(got: T, terms: usize, sum: f64, absolute: f64, bias: f64, at: &str) {
    let mut slack = bound(terms, absolute);
    let exact = sum + bias;
    slack += 2f64.powi(-24) * (exact.abs() + slack); // the bias is added in float32
    let (unit, tiny) = match T::DTYPE {
        DType::F32 => (0.0, 0.0),
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DType::BF16 => (2f64.powi(-8), 2f64.powi(-134)),
    };
    slack += unit * (exact.abs() + slack) + tiny;
    let error = (f64::from(got.to_f32()) - exact).abs();
    assert!(error <= slack, "{at}: error {error:e} over {slack:e}, exact {exact}, got {got:?}");
}

fn check_case<T: Element>(case: Case) {
    let Case { rows, out_features: n, in_features: k, .. } = case;
    let mut numbers = Numbers((rows * 31 + n * 17 + k) as u64);
    let parts = case.parts(&mut numbers);
    let weight = case.weight(&parts);
    let input = elements::<T>(rows * k, &mut numbers);
    let grad = elements::<T>(rows * n, &mut numbers);
    let bias = case.bias.then(|| elements::<T>(n, &mut numbers));
    let wide = |x: &T| f64::from(x.to_f32());
    let (input64, grad64): (Vec<_>, Vec<_>) =
        (input.iter().map(wide).collect(), grad.iter().map(wide).collect());
    let dot = |terms: &mut dyn Iterator<Item = (f64, f64)>| {
        terms.fold((0.0, 0.0), |(sum, absolute), (x, w)| (sum + x * w, absolute + (x * w).abs()))
    };
    let w = &parts.dequantized;
    let exact: Vec<_> = (0..rows * n)
        .map(|i| {
            let (m, o) = (i / n, i % n);
            dot(&mut (0..k).map(|t| (input64[m * k + t], w[o * k + t])))
        })
        .collect();
    let exact_grad: Vec<_> = (0..rows * k)
        .map(|i| {
            let (m, t) = (i / k, i % k);
            dot(&mut (0..n).map(|o| (grad64[m * n + o], w[o * k + t])))
        })
        .collect();
    for isa in isa::available().into_iter().filter(|isa| *isa != Isa::Scalar) {
        let mut out = vec![T::from_f32(f32::NAN); rows * n];
        forward(isa, &input, rows, &weight, bias.as_deref(), &mut out);
        for (i, (got, (sum, absolute))) in out.iter().zip(&exact).enumerate() {
            let bias = bias.as_ref().map_or(0.0, |b| wide(&b[i % n]));
            let at = format!("{isa} {:?} {case:?} forward {:?}", T::DTYPE, (i / n, i % n));
            check(*got, k, *sum, *absolute, bias, &at);
        }
        let mut out = vec![T::from_f32(f32::NAN); rows * k];
        grad_input(isa, &grad, rows, &weight, &mut out);
        for (i, (got, (sum, absolute))) in out.iter().zip(&exact_grad).enumerate() {
            let at = format!("{isa} {:?} {case:?} gradient {:?}", T::DTYPE, (i / k, i % k));
            check(*got, n, *sum, *absolute, 0.0, &at);
        }
    }
}

fn check_types(case: Case) {
    check_case::<f32>(case);
    check_case::<f16>(case);
    check_case::<bf16>(case);
}

const PLAIN: Case = Case {
    rows: 1,
    out_features: 1,
    in_features: 1,
    blocksize: BlockSize::B64,
    code: Code4::Nf4,
    nested: false,
    bias: false,
};

#[test]
fn shapes() {
    let (nested, bias) = (true, true);
    for (i, (rows, out_features, in_features)) in [
        (0, 5, 7),
        (3, 0, 7),
        (3, 5, 0),
        (0, 0, 0),
        (1, 1, 1),
        (1, 64, 96),
        (2, 96, 64),
        (3, 7, 33),
        (4, 33, 31),
        (8, 8, 256),
        (9, 17, 257),
        (15, 48, 255),
        (16, 16, 16),
        (17, 15, 512),
        (31, 100, 100),
        (33, 50, 130),
        (48, 96, 64),
        (49, 49, 49),
        (64, 64, 96),
        (65, 31, 63),
        (96, 13, 300),
        (128, 70, 65),
        (257, 20, 40),
        (300, 9, 600),
        (7, 600, 24),
        (5, 24, 1100),
    ]
    .into_iter()
    .enumerate()
    {
        let code = Code4::ALL[i % 2];
        let case = Case { rows, out_features, in_features, code, ..PLAIN };
        check_types(case);
        check_types(Case { nested, bias, ..case });
    }
}

#[test]
fn block_sizes() {
    for blocksize in BlockSize::ALL {
        for (rows, out_features, in_features) in [(5, 96, 64), (20, 65, 127), (50, 33, 288)] {
            for nested in [false, true] {
                let case = Case { rows, out_features, in_features, blocksize, nested, ..PLAIN };
                check_case::<f32>(case);
                check_case::<bf16>(case);
            }
        }
    }
}

/// The bytes that `threads` threads produce.
fn bytes(isa: Isa, case: Case, threads: usize) -> (Vec<u16>, Vec<u16>) {
    let Case { rows, out_features: n, in_features: k, .. } = case;
    let mut numbers = Numbers(1);
    let parts = case.parts(&mut numbers);
    let weight = case.weight(&parts);
    let input = elements::<bf16>(rows * k, &mut numbers);
    let grad = elements::<bf16>(rows * n, &mut numbers);
    let (mut out, mut grad_out) = (vec![bf16::ZERO; rows * n], vec![bf16::ZERO; rows * k]);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        forward(isa, &input, rows, &weight, None, &mut out);
        grad_input(isa, &grad, rows, &weight, &mut grad_out);
    });
    let bits = |x: Vec<bf16>| x.into_iter().map(bf16::to_bits).collect();
    (bits(out), bits(grad_out))
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    for (rows, out_features, in_features) in [(20, 300, 700), (270, 130, 513), (3, 1000, 96)] {
        let case = Case { rows, out_features, in_features, ..PLAIN };
        for isa in isa::available() {
            let one = bytes(isa, case, 1);
            for threads in [2, 3] {
                assert!(bytes(isa, case, threads) == one, "{isa} {threads} threads {case:?}");
            }
        }
    }
}

/// `<grad, forward(input)>` equals `<grad_input(grad), input>`: each is the other's adjoint.
#[test]
fn the_gradient_is_the_adjoint_of_the_forward_product() {
    for (rows, n, k) in [(1, 40, 70), (33, 130, 257), (100, 64, 96)] {
        let case = Case { rows, out_features: n, in_features: k, ..PLAIN };
        let mut numbers = Numbers(7);
        let parts = case.parts(&mut numbers);
        let weight = case.weight(&parts);
        let input = elements::<f32>(rows * k, &mut numbers);
        let grad = elements::<f32>(rows * n, &mut numbers);
        let inner = |a: &[f32], b: &[f32]| -> (f64, f64) {
            let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.fold((0.0, 0.0), |(sum, absolute), p| (sum + p, absolute + p.abs()))
        };
        for isa in isa::available() {
            let (mut y, mut x_grad) = (vec![0.0; rows * n], vec![0.0; rows * k]);
            forward(isa, &input, rows, &weight, None, &mut y);
            grad_input(isa, &grad, rows, &weight, &mut x_grad);
            let (left, scale) = inner(&grad, &y);
            let (right, _) = inner(&x_grad, &input);
            assert!((left - right).abs() <= 1e-5 * scale, "{isa} {case:?}: {left} and {right}");
        }
    }
}

/// What is not finite stays in the rows and columns that it belongs to, and reaches all of them.
#[test]
fn infinities_and_nans_stay_in_their_rows() {
    let case = Case { rows: 20, out_features: 21, in_features: 37, ..PLAIN };
    let mut numbers = Numbers(3);
    let parts = case.parts(&mut numbers);
    let weight = case.weight(&parts);
    for isa in isa::available() {
        let mut input = elements::<f32>(20 * 37, &mut numbers);
        input[5 * 37 + 36] = f32::NAN;
        let mut out = vec![0.0; 20 * 21];
        forward(isa, &input, 20, &weight, None, &mut out);
        for (i, y) in out.iter().enumerate() {
            assert_eq!(y.is_nan(), i / 21 == 5, "{isa} forward {i}");
        }
        let mut grad = elements::<f32>(20 * 21, &mut numbers);
        grad[19 * 21] = f32::NAN;
        let mut out = vec![0.0; 20 * 37];
        grad_input(isa, &grad, 20, &weight, &mut out);
        for (i, y) in out.iter().enumerate() {
            assert_eq!(y.is_nan(), i / 37 == 19, "{isa} gradient {i}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_shape(
        rows in 0usize..70,
        out_features in 0usize..70,
        in_features in 0usize..300,
        blocksize in prop::sample::select(&BlockSize::ALL[..]),
        fp4: bool,
        nested: bool,
        bias: bool,
    ) {
        let code = if fp4 { Code4::Fp4 } else { Code4::Nf4 };
        let case = Case { rows, out_features, in_features, blocksize, code, nested, bias };
        check_case::<f32>(case);
        check_case::<f16>(case);
    }
}
